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
        """Copy to `device`, without waiting where the batch is pinned."""
        move = {"device": device, "non_blocking": True}
        return Batch(
            self.input_ids.to(**move),
            None if self.scored is None else self.scored.to(**move),
            self.labels.to(**move),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the batch."""
        targets = self.targets
        parts = () if targets is None else (targets.row_offsets, targets.token_ids, targets.probs)
        return [t for t in (self.input_ids, self.scored, self.labels, *parts) if t is not None]


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
        orders = self._orders  # replaced, never changed: a prefetching thread reads it too
        if epoch not in orders:
            # A batch may straddle two epochs; older ones are rarely asked for again.
            orders = {e: o for e, o in orders.items() if e == epoch - 1}
            orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self._orders = orders
        return orders[epoch]

    def picked(self, first: int, stop: int) -> np.ndarray:
        """(stop - first, 2) scored rows of windows `first`..`stop` of the endless sequence of
        epochs."""
        count = len(self)
        return self.spans[[self.order(g // count)[g % count] for g in range(first, stop)]]

    def take(self, first: int, stop: int, size: int, *, pin: bool = False) -> Batch:
        """Windows `first`..`stop` of the endless sequence of epochs, as a batch of `size`."""
        return self.gather(self.picked(first, stop), size, pin=pin)

    def gather(self, spans: np.ndarray, size: int, *, pin: bool = False) -> Batch:
        """The batch that scores the rows of `spans` (n windows, n <= size), in fresh memory.

        n = 0 gives `size` windows without a scored row: what is left for a process of several when
        the last batch of a run is shorter than their number. `pin` as in `TargetRows.gather`.
        """
        counts = spans[:, 1] - spans[:, 0]
        rows, length = int(counts.sum()), self.length
        input_ids = torch.empty(size, length, dtype=torch.int64, pin_memory=pin)
        labels = torch.empty(rows, dtype=torch.int64, pin_memory=pin)
        scored = None
        if rows != size * length:
            scored = torch.empty(rows, dtype=torch.int64, pin_memory=pin)
        inputs, following = input_ids.numpy(), labels.numpy()
        row = 0
        for window, (start, stop) in enumerate(spans.tolist()):
            inputs[window] = self.token_ids[stop - length : stop]
            next_row = row + stop - start
            following[row:next_row] = self.token_ids[start + 1 : stop + 1]
            if scored is not None:
                end = (window + 1) * length
                scored.numpy()[row:next_row] = np.arange(end - (stop - start), end)
            row = next_row
        inputs[len(spans) :] = inputs[0] if len(spans) else self.token_ids[:length]
        targets = None if self.targets is None else self.targets.gather(spans, pin=pin)
        return Batch(input_ids, scored, labels, targets)
