"""Which rows a training step reads, and the tensors it needs for them.

An epoch visits every window of the corpus once in an order that depends only on (seed, epoch), so a
run resumed at step s continues with exactly the windows an uninterrupted run would have used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .ops.sparse_targets import SparseTargets


@dataclass(frozen=True)
class Batch:
    """One forward pass. Shapes: B windows of T inputs, n scored rows among the B * T positions."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    scored: torch.Tensor | None
    """(n,) int64 positions into the flattened B * T; None when every position is scored."""
    labels: torch.Tensor
    """(n,) int64 next tokens of the scored positions."""
    targets: SparseTargets | None
    """n target rows in the same order; None when the objective uses none."""

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (n, D): the hidden states of the scored positions, a view if that is all."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.scored is None else flat.index_select(0, self.scored)

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; a CPU batch is returned as it is."""
        if device.type == "cpu":
            return self
        move = {"device": device, "non_blocking": True}
        return Batch(
            self.input_ids.to(**move),
            None if self.scored is None else self.scored.to(**move),
            self.labels.to(**move),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )


class WindowBatches:
    """Cuts the windows of a corpus into batches of equal shape.

    `spans` is (W, 2) int64: the scored rows [start, end) of each window, every window reading
    `min(block, num_rows)` inputs that end at `end`. All batches have the same `input_ids` shape; a
    short last batch is filled with unscored copies, so a compiled trunk sees one shape only.
    """

    def __init__(self, token_ids, spans: np.ndarray, block: int, *, seed: int, targets=None):
        self.token_ids = token_ids
        self.spans = np.asarray(spans, dtype=np.int64)
        self.length = min(block, len(token_ids) - 1)
        self.seed = seed
        self.targets = targets
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.spans)

    def order(self, epoch: int) -> np.ndarray:
        """Window indices of `epoch`, a permutation fixed by (seed, epoch)."""
        if epoch not in self._orders:
            # A batch may straddle two epochs; older ones are never asked for again.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return self._orders[epoch]

    def take(self, first: int, stop: int, size: int) -> Batch:
        """Windows `first`..`stop` of the endless sequence of epochs, as a batch of `size`."""
        count = len(self)
        picked = [self.order(g // count)[g % count] for g in range(first, stop)]
        return self.gather(self.spans[picked], size)

    def gather(self, spans: np.ndarray, size: int) -> Batch:
        """The batch that scores the rows of `spans` (n windows, n <= size)."""
        starts, ends = spans[:, 0], spans[:, 1]
        first_inputs = ends - self.length
        padded = np.concatenate([first_inputs, np.repeat(first_inputs[:1], size - len(spans))])
        positions = padded[:, None] + np.arange(self.length)
        input_ids = torch.from_numpy(self.token_ids[positions].astype(np.int64))

        rows = np.concatenate([np.arange(s, e) for s, e in spans])
        labels = torch.from_numpy(self.token_ids[rows + 1].astype(np.int64))
        scored = None
        if len(rows) != positions.size:
            window = np.repeat(np.arange(len(spans)), ends - starts)
            scored = torch.from_numpy(rows - first_inputs[window] + window * self.length)
        targets = None
        if self.targets is not None:
            targets = concatenate_rows([self.targets.rows(int(s), int(e)) for s, e in spans])
        return Batch(input_ids, scored, labels, targets)


def concatenate_rows(pieces: list[SparseTargets]) -> SparseTargets:
    """The rows of all `pieces`, one after the other."""
    counts = torch.cat([piece.row_offsets.diff() for piece in pieces])
    row_offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_offsets[1:])
    return SparseTargets(
        row_offsets,
        torch.cat([piece.token_ids for piece in pieces]),
        torch.cat([piece.probs for piece in pieces]),
    )
