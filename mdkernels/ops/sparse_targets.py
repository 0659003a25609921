"""SparseTargets: per-row distributions over the vocabulary, stored as CSR."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import count, find_fault, plain_tensor, raise_fault, within

PROB_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseTargets:
    """N distributions over the vocabulary in compressed sparse rows.

    Row i holds ``token_ids[row_offsets[i]:row_offsets[i+1]]`` with the matching ``probs``.
    A kNN distribution has between 1 and K entries, so rows are ragged; nothing is padded.
    Repeated ids within a row add up. A row's mass (sum of probs) need not be 1.

    Args:
        row_offsets: (N+1,) int64, ascending from 0 to nnz.
        token_ids: (nnz,) int32, in [0, V).
        probs: (nnz,) fp32, fp16 or bf16 (fp64 for the reference), >= 0.

    Construction checks shapes, dtypes and devices, which is free. Values are checked by
    `validate` and, on the CPU, by every operator that reads them.
    """

    row_offsets: Tensor
    token_ids: Tensor
    probs: Tensor

    def __post_init__(self) -> None:
        for name, dtypes in (
            ("row_offsets", (torch.int64,)),
            ("token_ids", (torch.int32,)),
            ("probs", PROB_DTYPES),
        ):
            value = getattr(self, name)
            plain_tensor(f"SparseTargets.{name}", value)
            if value.dtype not in dtypes:
                wanted = " or ".join(str(d) for d in dtypes)
                raise TypeError(f"SparseTargets.{name}: expected {wanted}, got {value.dtype}")
            if value.ndim != 1 or not value.is_contiguous():
                raise ValueError(
                    f"SparseTargets.{name}: expected a contiguous vector, got shape "
                    f"{tuple(value.shape)} with strides {value.stride()}"
                )
            if value.device != self.row_offsets.device:
                raise ValueError(
                    f"SparseTargets.{name}: on {value.device}, but row_offsets on "
                    f"{self.row_offsets.device}; use .to(device)"
                )
        if self.row_offsets.shape[0] == 0:
            raise ValueError("SparseTargets.row_offsets: needs N+1 >= 1 entries, got 0")
        if self.token_ids.shape != self.probs.shape:
            raise ValueError(
                f"SparseTargets: token_ids has {self.token_ids.shape[0]} entries, "
                f"probs {self.probs.shape[0]}; expected as many"
            )

    @property
    def num_rows(self) -> int:
        return self.row_offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        return self.token_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.row_offsets.device

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return (
            f"SparseTargets(rows={self.num_rows}, nnz={self.nnz}, probs={self.probs.dtype}, "
            f"device={self.device})"
        )

    def validate(self, vocab_size: int) -> SparseTargets:
        """Check every value and return self. Synchronises with the device.

        Raises:
            ValueError: offsets that do not ascend from 0 to nnz, an id outside [0, vocab_size), a
                negative or non-finite probability.
        """
        vocab_size = count("vocab_size", vocab_size)
        raise_fault(find_fault(self.row_offsets, self.token_ids, vocab_size), vocab_size)
        if not within(self.probs, 0, torch.finfo(self.probs.dtype).max):
            bad = ~(self.probs >= 0) | self.probs.isinf()
            where = int(bad.nonzero()[0, 0])
            row = int(torch.searchsorted(self.row_offsets, where, right=True)) - 1
            raise ValueError(
                f"targets.probs: row {row} has {float(self.probs[where])}; expected finite, >= 0"
            )
        return self

    def to(self, device, *, non_blocking: bool = False) -> SparseTargets:
        """All three tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """All three tensors in page-locked host memory, for asynchronous copies."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> SparseTargets:
        return SparseTargets(
            function(self.row_offsets), function(self.token_ids), function(self.probs)
        )

    def row_ids(self) -> Tensor:
        """(nnz,) int64: the row of each entry."""
        rows = torch.arange(self.num_rows, device=self.device)
        return torch.repeat_interleave(rows, self.row_offsets.diff(), output_size=self.nnz)

    def rows(self, start: int, stop: int) -> SparseTargets:
        """Rows [start, stop) as views of token_ids and probs. Reads two offsets on the host."""
        try:
            start, stop = operator.index(start), operator.index(stop)
        except TypeError:
            raise TypeError(
                f"rows: expected two integers, got [{start!r:.30}, {stop!r:.30})"
            ) from None
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows: [{start}, {stop}) is not within [0, {self.num_rows})")
        offsets = self.row_offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return SparseTargets(offsets - first, self.token_ids[first:last], self.probs[first:last])

    def select(self, rows: Tensor) -> SparseTargets:
        """The rows picked by a boolean mask (N,) or by row numbers (M,) int64, in that order."""
        plain_tensor("rows", rows)
        # uint8 would silently be a mask to one indexing operation and not to the next.
        if rows.dtype not in (torch.bool, torch.int64, torch.int32):
            raise TypeError(f"rows: expected bool, int64 or int32, got {rows.dtype}")
        if rows.ndim != 1:
            raise ValueError(f"rows: expected a vector, got shape {tuple(rows.shape)}")
        if rows.dtype == torch.bool:
            if tuple(rows.shape) != (self.num_rows,):
                raise ValueError(
                    f"rows: expected a mask of shape ({self.num_rows},), got {tuple(rows.shape)}"
                )
            rows = rows.nonzero().squeeze(1)
        lengths = self.row_offsets.diff()[rows]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        # Entry j of the result sits at its row's old start plus its place within the row.
        shift = self.row_offsets[:-1][rows] - offsets[:-1]
        source = torch.arange(int(offsets[-1]), device=self.device)
        source += torch.repeat_interleave(shift, lengths, output_size=len(source))
        return SparseTargets(offsets, self.token_ids[source], self.probs[source])

    def to_dense(self, vocab_size: int) -> Tensor:
        """(N, vocab_size) in the dtype of probs; repeated ids summed. Synchronises with the device.

        Raises:
            ValueError: offsets or ids that `validate` refuses.
        """
        vocab_size = count("vocab_size", vocab_size)
        raise_fault(find_fault(self.row_offsets, self.token_ids, vocab_size), vocab_size)
        dense = self.probs.new_zeros(self.num_rows, vocab_size)
        index = (self.row_ids(), self.token_ids.long())
        return dense.index_put_(index, self.probs, accumulate=True)

    @classmethod
    def from_dense(cls, probs: Tensor) -> SparseTargets:
        """The non-zero entries (NaN is one) of an (N, V) matrix, ids ascending within a row."""
        plain_tensor("probs", probs)
        if probs.ndim != 2:
            raise ValueError(f"probs: expected shape (rows, vocab), got {tuple(probs.shape)}")
        rows, ids = probs.nonzero(as_tuple=True)
        return cls(_offsets(rows, probs.shape[0]), ids.int(), probs[rows, ids])

    @classmethod
    def from_padded(cls, ids: Tensor, probs: Tensor, mask: Tensor | None = None) -> SparseTargets:
        """From the padded top-k layout of other trainers.

        Args:
            ids: (N, K) integer token ids; those that count must fit int32.
            probs: (N, K) probabilities (exponentiate log-probs first).
            mask: (N, K) bool, True where an entry counts; default: where probs > 0 or NaN, which is
                left for the loss or `validate` to show.
        """
        plain_tensor("ids", ids)
        plain_tensor("probs", probs)
        if mask is not None:
            plain_tensor("mask", mask)
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"ids: expected integers, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape != probs.shape:
            raise ValueError(
                f"ids, probs: expected one shape (rows, k), got {tuple(ids.shape)} and "
                f"{tuple(probs.shape)}"
            )
        if mask is None:
            mask = ~(probs <= 0)
        elif mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool {tuple(ids.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        rows, slots = mask.nonzero(as_tuple=True)
        wide = ids[rows, slots]
        narrow = wide.int()
        if not torch.equal(narrow.to(wide.dtype), wide):
            where = int((narrow != wide).nonzero()[0, 0])
            raise ValueError(f"ids: {int(wide[where])} does not fit int32; is it padding?")
        return cls(_offsets(rows, ids.shape[0]), narrow, probs[rows, slots])

    @classmethod
    def empty(cls, num_rows: int, device=None) -> SparseTargets:
        """num_rows rows without targets: what a cross-entropy-only step passes."""
        num_rows = count("num_rows", num_rows)
        return cls(
            torch.zeros(num_rows + 1, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=torch.float32, device=device),
        )

    @classmethod
    def cat(cls, pieces: Iterable[SparseTargets]) -> SparseTargets:
        """The rows of all `pieces`, one after the other, in new tensors: `torch.cat` for targets.

        Probabilities take the widest dtype among the pieces. Raises ValueError without a piece.
        """
        if not isinstance(pieces, Iterable):
            raise TypeError(
                f"pieces: expected a list of SparseTargets, got {type(pieces).__name__}"
            )
        pieces = list(pieces)
        if not pieces:
            raise ValueError("pieces: expected one or more SparseTargets, got none")
        for piece in pieces:
            if not isinstance(piece, SparseTargets):
                raise TypeError(
                    f"pieces: expected SparseTargets, got {type(piece).__name__} among them"
                )
        lengths = torch.cat([piece.row_offsets.diff() for piece in pieces])
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        ids, probs = ([getattr(p, name) for p in pieces] for name in ("token_ids", "probs"))
        return cls(offsets, torch.cat(ids), torch.cat(probs))


def _offsets(rows: Tensor, num_rows: int) -> Tensor:
    """CSR offsets of ascending row numbers."""
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=num_rows), 0, out=offsets[1:])
    return offsets
