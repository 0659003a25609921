"""Argument checks shared by the operators. Every message names the argument, what came, what was
expected and the way out."""

import operator

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_tensor(name: str, value) -> None:
    """Refuse anything whose data pointer would not be the data."""
    if type(value) is Tensor and value.layout is torch.strided:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):  # DTensor, without importing torch.distributed
        raise TypeError(
            f"{name}: got a DTensor. Call the op inside the module that owns the LM head (FSDP "
            "gathers its weight there), or pass .full_tensor() / .to_local()"
        )
    if value.is_sparse or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")


def logits_matrix(name: str, value: Tensor) -> None:
    """(N, V) floating point with unit stride within a row; any row stride."""
    if (
        type(value) is Tensor
        and value.layout is torch.strided
        and value.ndim == 2
        and value.dtype in FLOAT_DTYPES
        and (value.stride(1) == 1 or value.shape[1] == 1)
        and value.shape[1]
    ):
        return
    plain_tensor(name, value)
    if value.ndim != 2:
        raise ValueError(
            f"{name}: expected shape (rows, vocab), got {tuple(value.shape)}; "
            "flatten leading dimensions with .flatten(0, -2)"
        )
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating point dtype, got {value.dtype}")
    width = value.shape[1]
    if width == 0:
        raise ValueError(f"{name}: the vocabulary dimension is empty, got {tuple(value.shape)}")
    if width > 1 and value.stride(1) != 1:
        raise ValueError(
            f"{name}: rows must be contiguous (stride 1 within a row), got strides "
            f"{value.stride()}; call .contiguous()"
        )


def integer_vector(name: str, value: Tensor, length: int, device, *, of: str) -> None:
    """(length,) int64 on `device`."""
    plain_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}; convert with .long()")
    if tuple(value.shape) != (length,):
        raise ValueError(
            f"{name}: expected shape ({length},), one per row of {of}, got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} as {of}, got {value.device}")


def storage_covers(name: str, value: Tensor) -> None:
    """FSDP frees storage behind a tensor's back; a raw pointer into it would be a crash."""
    if value.numel() == 0:
        return
    if value.is_contiguous():
        extent = value.numel()
    else:
        extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    needed = (value.storage_offset() + extent) * value.element_size()
    if value.untyped_storage().nbytes() < needed:
        raise RuntimeError(f"{name}: its storage has been freed (is it an FSDP parameter shard?)")


def loss_storages(logits, row_offsets, token_ids, probs, labels) -> None:
    """`storage_covers` of what a loss kernel reads."""
    storage_covers("logits", logits)
    for name, value in (
        ("targets.row_offsets", row_offsets),
        ("targets.token_ids", token_ids),
        ("targets.probs", probs),
        ("labels", labels),
    ):
        if value is not None:
            storage_covers(name, value)


def integer(name: str, value) -> None:
    """A Python int that fits int64."""
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int that fits 64 bits, got {value}")


def count(name: str, value) -> int:
    """An int >= 0, of whatever kind has an index."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer >= 0, got {value!r:.60}") from None
    if value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value}")
    return value


def number(name: str, value) -> float:
    """A float, whatever it is; NaN and the infinities are the caller's to refuse."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def probability(name: str, value: float) -> float:
    """A float in [0, 1]; NaN is refused."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number in [0, 1], got {value!r}") from None
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def find_fault(row_offsets, token_ids, vocab, labels=None, ignore_index=-100):
    """The first (what, row, value) that breaks the sparse target contract, or None."""
    steps = row_offsets.diff()
    if row_offsets[0] != 0:
        return "first_offset", 0, int(row_offsets[0])
    if bool((steps < 0).any()):
        row = int((steps < 0).nonzero()[0, 0])
        return "descending_offsets", row, int(row_offsets[row + 1])
    if int(row_offsets[-1]) != len(token_ids):
        return "last_offset", len(row_offsets) - 1, int(row_offsets[-1])
    # Two numbers instead of masks: targets may be maps larger than memory.
    if not within(token_ids, 0, vocab - 1):
        where = int(((token_ids < 0) | (token_ids >= vocab)).nonzero()[0, 0])
        row = int(torch.searchsorted(row_offsets, where, right=True)) - 1
        return "token_id", row, int(token_ids[where])
    if labels is not None:
        bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            return "label", row, int(labels[row])
    return None


def within(values: Tensor, low: float, high: float) -> bool:
    """Whether all `values` lie in [low, high], which NaN does not. Makes no mask of them."""
    if not values.numel():
        return True
    least, most = values.aminmax()
    return bool((least >= low) & (most <= high))


def raise_fault(fault, vocab: int) -> None:
    """Turn a native validation fault (what, row, value), or None, into a ValueError."""
    if fault is None:
        return
    what, row, value = fault
    message = {
        "first_offset": f"targets.row_offsets: must start at 0, got {value}",
        "descending_offsets": (
            f"targets.row_offsets: must ascend, but row {row} ends at {value}, before it starts"
        ),
        "last_offset": (
            f"targets.row_offsets: must end at the number of token_ids, but ends at {value}"
        ),
        "token_id": (
            f"targets.token_ids: row {row} has id {value}, outside [0, {vocab}); is the tokenizer "
            "that of the logits?"
        ),
        "label": (
            f"labels: row {row} has label {value}, outside [0, {vocab}) and not ignore_index"
        ),
    }
    raise ValueError(message[what])
