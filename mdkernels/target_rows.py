"""Sparse targets as a training run reads them: by row, from maps or memory, never dense.

`TargetRows` serves the rows of any `SparseTargets`; `targets.TargetStore` is one over the maps of
an artefact. `LabelledTargets` holds targets that other software made, with the next token of each
row, so that they are compared with the corpus instead of being taken on trust.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from .artifact import ArtifactError, digest
from .corpus import Corpus
from .ops.sparse_targets import SparseTargets

_WAY_OUT = (
    "Targets need one row per token but the last, in the order of the corpus: build the corpus "
    "from the token stream they were made for, or the targets with `mdkernels targets`"
)


class TargetRows:
    """R sparse rows on the CPU, possibly much larger than memory. Reading a row touches only it."""

    def __init__(self, targets: SparseTargets, *, normalize: bool = False):
        self._all, self._normalize = targets, normalize

    @property
    def num_rows(self) -> int:
        return self._all.num_rows

    @property
    def nnz(self) -> int:
        return self._all.nnz

    def rows(self, start: int, stop: int) -> SparseTargets:
        """Rows [start, stop), a row may be empty.

        Views of what is stored, which must not be written to; where rows have to be normalised
        (fp16 artefacts, whose rounding changed the sums), fp32 copies.
        """
        targets = self._all.rows(start, stop)
        if not self._normalize:
            return targets
        probs = targets.probs.float()
        _divide_by_row_sums(probs.numpy(), targets.row_offsets.numpy())
        return SparseTargets(targets.row_offsets, targets.token_ids, probs)

    def gather(self, spans: np.ndarray, *, pin: bool = False) -> SparseTargets:
        """The rows of all `spans`, one span after the other, as `rows` gives them.

        Args:
            spans: (n, 2) int64 [start, stop) pairs of rows.
            pin: put the result into page-locked memory, for an asynchronous copy to a GPU.

        One copy per span and array, into fresh memory: no loop over rows, no concatenation.
        """
        stored, offsets = self._all, self._all.row_offsets.numpy()
        lows, highs = offsets[spans[:, 0]], offsets[spans[:, 1]]
        rows, nnz = int((spans[:, 1] - spans[:, 0]).sum()), int((highs - lows).sum())
        row_offsets = torch.empty(rows + 1, dtype=torch.int64, pin_memory=pin)
        token_ids = torch.empty(nnz, dtype=torch.int32, pin_memory=pin)
        dtype = torch.float32 if self._normalize else stored.probs.dtype
        probs = torch.empty(nnz, dtype=dtype, pin_memory=pin)
        # numpy copies on this thread: torch would wake its pool for each of them, and a pool that
        # a busy machine does not schedule takes 100 ms for what a memcpy does in 20 us.
        ids_in, ids_out, probs_in, probs_out = map(
            _numpy, (stored.token_ids, token_ids, stored.probs, probs)
        )
        shifted = row_offsets.numpy()
        shifted[0] = row = entry = 0
        for (start, stop), low, high in zip(
            spans.tolist(), lows.tolist(), highs.tolist(), strict=True
        ):
            next_row, next_entry = row + stop - start, entry + high - low
            np.add(offsets[start + 1 : stop + 1], entry - low, out=shifted[row + 1 : next_row + 1])
            ids_out[entry:next_entry] = ids_in[low:high]
            if self._normalize:
                _widen(stored.probs[low:high], probs[entry:next_entry])
            else:
                probs_out[entry:next_entry] = probs_in[low:high]
            row, entry = next_row, next_entry
        if self._normalize:
            _divide_by_row_sums(probs_out, shifted)
        return SparseTargets(row_offsets, token_ids, probs)


class LabelledTargets(TargetRows):
    """Targets from elsewhere, in memory: rows in the order of a corpus, each with its next token.

    What `mdkernels.integrations.official.read_targets` returns, and what other trainers' top-k
    teachers give through `SparseTargets.from_padded`. Probabilities are used as they are; a row's
    mass need not be 1.

    Args:
        targets: R rows.
        labels: (R,) int64, the token that follows each row.

    Raises TypeError or ValueError for labels that do not belong to `targets` by shape.
    """

    kind = "targets"

    def __init__(self, targets: SparseTargets, labels: Tensor):
        if not isinstance(targets, SparseTargets) or not isinstance(labels, Tensor):
            raise TypeError(
                "targets: expected a pair (SparseTargets, labels tensor), got "
                f"({type(targets).__name__}, {type(labels).__name__})"
            )
        if labels.dtype != torch.int64 or tuple(labels.shape) != (targets.num_rows,):
            raise ValueError(
                f"targets: labels must be int64 ({targets.num_rows},), one next token per row, got "
                f"{labels.dtype} {tuple(labels.shape)}"
            )
        super().__init__(targets.to("cpu"))
        self.labels = labels.cpu()
        arrays = (self._all.row_offsets, self._all.token_ids, self._all.probs, self.labels)
        checksums = [zlib.crc32(array.view(torch.uint8).numpy()) for array in arrays]
        self.content_id: str = digest([self.kind, str(self._all.probs.dtype), checksums])

    def check_corpus(self, corpus: Corpus) -> None:
        """Raise ArtifactError unless row r predicts the token after token r of `corpus`, for all r.

        Names the first differing row. Also refuses ids and probabilities that no row of this
        vocabulary can have.
        """
        check_labels(self.labels, corpus)
        check_num_rows(self.num_rows, corpus)
        try:
            self._all.validate(corpus.vocab_size)
        except ValueError as error:
            raise ArtifactError(f"targets do not fit {corpus.artifact}: {error}") from error


def check_labels(labels: Tensor, corpus: Corpus, start: int = 0) -> None:
    """Raise ArtifactError at the first of `labels`, those of rows `start` and on, that is not the
    next token of its row in `corpus`. Rows behind the end of the corpus are left to
    `check_num_rows`."""
    following = corpus.token_ids[start + 1 : start + 1 + len(labels)].astype(np.int64)
    differing = np.flatnonzero(labels[: len(following)].numpy() != following)
    if len(differing):
        place = int(differing[0])
        raise ArtifactError(
            f"targets do not fit {corpus.artifact}: row {start + place} is the first that differs, "
            f"its label is {int(labels[place])}, the next token of the corpus {following[place]}. "
            f"{_WAY_OUT}"
        )


def check_num_rows(num_rows: int, corpus: Corpus) -> None:
    """Raise ArtifactError unless `corpus` has `num_rows` rows."""
    if num_rows != corpus.num_rows:
        raise ArtifactError(
            f"targets do not fit {corpus.artifact}: they have {num_rows} rows, the corpus "
            f"{corpus.num_rows}; row {min(num_rows, corpus.num_rows)} is the first that only one "
            f"of them has. {_WAY_OUT}"
        )


def _widen(stored: Tensor, out: Tensor) -> None:
    """fp16 to fp32: by torch, which takes a sixth of numpy's time, in pieces that it does not hand
    to its thread pool."""
    for source, target in zip(stored.split(1 << 14), out.split(1 << 14), strict=True):
        target.copy_(source)


def _numpy(tensor: Tensor) -> np.ndarray:
    """The memory of `tensor`; bf16, which numpy lacks, as 16-bit integers."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _divide_by_row_sums(probs: np.ndarray, offsets: np.ndarray) -> None:
    """In place, fp32; every row that has entries must have a positive sum."""
    counts = np.diff(offsets)
    filled = counts > 0
    if filled.any():  # reduceat sums from each start to the next one
        sums = np.add.reduceat(probs, offsets[:-1][filled])
        probs /= np.repeat(sums, counts[filled])
