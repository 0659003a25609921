"""What the operators on hidden @ weight.T share: argument checks, and the logits by chunks of rows
in one reused buffer. Why chunks, and how many rows: linear_sparse_kl/README.md."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, native

ROW_ALIGNMENT = 64  # bytes: a row of the buffer starts on a cache line, whatever the vocabulary
CHUNK_MULTIPLE = 32  # rows: whole tiles of a matrix product
# Bytes of logits at a time. On a CPU the rows decide first: past CPU_ROWS of them the products gain
# little, and the buffer should stay small beside the gradient of the weight. On a GPU it is the
# limit of all scratch; where the sum of that gradient alone takes more than half of it, small
# chunks would read and write the sum too often, and the limit is that of the logits.
SCRATCH_BYTES = {"cpu": 256 << 20}
GPU_SCRATCH_BYTES = 320_000_000
CPU_ROWS = 416


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the three tensors of a linear layer; returns the dtype in which it is computed, which
    is that of autocast where it is enabled, as for F.linear."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        checks.plain_tensor(name, value)
        if value.ndim != 2:
            shape = "(rows, width)" if name == "hidden" else "(vocab, width)"
            raise ValueError(
                f"{name}: expected shape {shape}, got {tuple(value.shape)}; "
                "flatten leading dimensions with .flatten(0, -2)"
            )
        if value.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name}: expected a floating point dtype, got {value.dtype}")
    vocab, width = weight.shape
    if vocab == 0 or width == 0:
        raise ValueError(f"weight: expected shape (vocab, width), none 0, got {(vocab, width)}")
    if hidden.shape[1] != width:
        raise ValueError(
            f"weight: expected shape (vocab, {hidden.shape[1]}) for hidden of width "
            f"{hidden.shape[1]}, got {(vocab, width)}; it is multiplied as hidden @ weight.T"
        )
    if bias is not None:
        checks.plain_tensor("bias", bias)
        if tuple(bias.shape) != (vocab,):
            raise ValueError(f"bias: expected shape ({vocab},), got {tuple(bias.shape)}")
    dtype = _computed_in(hidden)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"{name}: on {value.device}, hidden on {hidden.device}; use .to()")
        if _computed_in(value) != dtype:
            raise TypeError(
                f"{name}: {value.dtype}, but hidden is {hidden.dtype}; convert one of them with "
                ".to(), or call the op under torch.autocast"
            )
    return dtype


def _computed_in(tensor: Tensor) -> torch.dtype:
    """As autocast casts the operands of a matrix product: all but fp64."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not _has_autocast(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@torch.compiler.assume_constant_result  # the compilers of torch before 2.12 cannot look into it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def check_chunk_rows(chunk_rows: int | None) -> int:
    """0 stands for the default."""
    if chunk_rows is None:
        return 0
    checks.integer("chunk_rows", chunk_rows)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, or None to choose, got {chunk_rows}")
    return chunk_rows


def default_chunk_rows(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, beside: int = 0
) -> int:
    """Chunks of nearly equal size within the scratch limit of the device, `beside` bytes of which
    are taken."""
    limit = SCRATCH_BYTES.get(device.type, GPU_SCRATCH_BYTES)
    if device.type != "cpu" and beside <= limit // 2:
        limit -= beside
    most = limit // (_row_stride(vocab, dtype) * dtype.itemsize)
    if device.type == "cpu":
        most = min(most, CPU_ROWS)
    most = max(most // CHUNK_MULTIPLE * CHUNK_MULTIPLE, 1)
    if rows <= most:
        return max(rows, 1)
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def _row_stride(vocab: int, dtype: torch.dtype) -> int:
    step = ROW_ALIGNMENT // dtype.itemsize
    return -(-vocab // step) * step


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, and such that a matrix product reads it in place: once, not once per chunk."""
    tensor = tensor.to(dtype)
    return tensor if 1 in tensor.stride() else tensor.contiguous()


class Layer:
    """hidden @ weight.T + bias in `dtype`, some rows at a time."""

    def __init__(self, hidden, weight, bias, chunk_rows: int, dtype: torch.dtype, beside: int = 0):
        for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if value is not None:
                checks.storage_covers(name, value)
        self.hidden, self.weight = _operand(hidden, dtype), _operand(weight, dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.rows, self.vocab = len(hidden), len(weight)
        if not chunk_rows:
            size = self.rows, self.vocab
            chunk_rows = default_chunk_rows(*size, dtype, hidden.device, beside)
        self.chunk_rows = max(min(chunk_rows, self.rows), 1)
        self.num_chunks = -(-self.rows // self.chunk_rows)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their hidden states, their logits). The logits are the consumer's to overwrite,
        and are gone with the next chunk."""
        if self.rows == 0:
            return
        stride = _row_stride(self.vocab, self.weight.dtype)
        buffer = native.empty_huge(self.weight, (self.chunk_rows, stride))[:, : self.vocab]
        for start in range(0, self.rows, self.chunk_rows):
            rows = slice(start, min(start + self.chunk_rows, self.rows))
            hidden, logits = self.hidden[rows], buffer[: rows.stop - start]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield rows, hidden, logits


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in tensors)
