"""What logit_mix, mix_argmax, mix_sample and mix_verify have in common: their first arguments,
checked and in the one form that their backends take."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, native

WEIGHT_SLACK = 1e-6  # rounding of weights that were meant to add up to 1
# Kernels multiply by the reciprocal in fp32: outside it is 0, a subnormal or infinite.
TEMPERATURE_RANGE = (1e-30, 1e30)

# The schema of that form. `weights`: one number per model, base first, adding up to 1.
# `row_weights`: (N, memories) instead, the base gets the rest of each row.
SCHEMA = (
    "Tensor base_logits, Tensor[] memory_logits, Tensor? row_weights, float[] weights, "
    "float memory_temperature"
)


def canonical(base_logits, memory_logits, mix_weight, memory_temperature) -> tuple:
    """The arguments of `SCHEMA`. Raises ValueError or TypeError naming the argument at fault."""
    checks.logits_matrix("base_logits", base_logits)
    if isinstance(memory_logits, Tensor):
        memories, names = [memory_logits], ("memory_logits",)
    elif isinstance(memory_logits, (list, tuple)) and memory_logits:
        memories = list(memory_logits)
        names = [f"memory_logits[{k}]" for k in range(len(memories))]
    else:
        raise TypeError(
            "memory_logits: expected a tensor or a non-empty list of tensors, got "
            f"{type(memory_logits).__name__}"
            + (" without elements" if isinstance(memory_logits, (list, tuple)) else "")
        )
    rows, device = base_logits.shape[0], base_logits.device
    wide = base_logits.dtype == torch.float64
    for name, memory in zip(names, memories, strict=True):
        checks.logits_matrix(name, memory)
        if memory.shape[0] != rows:
            raise ValueError(f"{name}: {memory.shape[0]} rows, base_logits has {rows}")
        if memory.device != device:
            raise ValueError(f"{name}: on {memory.device}, base_logits on {device}; use .to()")
        wide = wide or memory.dtype == torch.float64
    memory_temperature = checks.number("memory_temperature", memory_temperature)
    low, high = TEMPERATURE_RANGE
    if not low <= memory_temperature <= high:
        raise ValueError(
            f"memory_temperature: expected a number in [{low:g}, {high:g}], got "
            f"{memory_temperature}"
        )
    row_weights, weights = _weights(mix_weight, len(memories), rows, device)
    if row_weights is not None:
        row_weights = row_weights.to(torch.float64 if wide else torch.float32)
    if wide:  # the dtype that decides over the backend
        base_logits = base_logits.double()
    return base_logits, memories, row_weights, weights, memory_temperature


def plain(op, base_logits, memory_logits, mix_weight, memory_temperature, backend):
    """(backend module, arguments of `SCHEMA`) of an ordinary eager call, or None.

    Ordinary: two matrices that are neither subclasses nor views with a negation to be done, one
    number as weight, no gradient, nobody watching, no MDK_BACKEND. On one Zen 4 core a call for a
    row of 64 takes 7 us this way and 15 with `canonical` and the dispatcher; the kernel takes as
    long for a row of 50257. The second argument is then a tuple, (device type, rows, width,
    inputs, weights, memory tensor), instead of a list of tensors. None leaves every refusal to
    `canonical`.
    """
    low, high = TEMPERATURE_RANGE
    if (
        torch.compiler.is_compiling()
        or dispatch.watched()
        or type(memory_temperature) is not float
        or not low <= memory_temperature <= high
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return None
    extension = native.load("_cpu").module
    if extension is None:
        return None
    found = extension.plain_mixture(base_logits, memory_logits, mix_weight, torch.is_grad_enabled())
    if found is None:
        return None
    module = dispatch.resolve_requested(op, backend, found[0], base_logits.dtype)
    if not getattr(module, "PLAIN", False):
        return None
    return module, (base_logits, found, None, found[4], memory_temperature)


def recorded(arguments: tuple) -> bool:
    """Whether autograd would record what is computed from these. Within forward-mode
    differentiation any input may carry a tangent."""
    base, memories, row_weights = arguments[:3]
    return torch.autograd.forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (
            base.requires_grad
            or any(memory.requires_grad for memory in memories)
            or (row_weights is not None and row_weights.requires_grad)
        )
    )


def unrecorded(arguments: tuple):
    """`torch.no_grad()` if it would change anything: entering it costs a tenth of a call."""
    return torch.no_grad() if recorded(arguments) else contextlib.nullcontext()


def differentiable_backend(op: str, arguments: tuple, backend: str):
    """The backend module to call directly when a gradient is wanted, else None."""
    if not recorded(arguments):
        return None
    base = arguments[0]
    return dispatch.resolve(op, backend, base.device.type, base.dtype, differentiable=True)


def mixture_width(base_logits: Tensor, memory_logits: list[Tensor] | tuple) -> int:
    if type(memory_logits) is tuple:  # of `plain`
        return memory_logits[2]
    return max(base_logits.shape[1], *(memory.shape[1] for memory in memory_logits))


def inputs_of(base_logits: Tensor, memory_logits: list[Tensor] | tuple, most: int, backend: str):
    """(address, row stride, width, dtype code) of the base and of every memory, as the extensions
    take them."""
    if type(memory_logits) is tuple:  # of `plain`
        return memory_logits[3]
    if len(memory_logits) > most:
        raise ValueError(
            f"memory_logits: the {backend} backend mixes at most {most} memories, got "
            f"{len(memory_logits)}; use backend='reference'"
        )
    inputs = []
    for k, logits in enumerate((base_logits, *memory_logits)):
        checks.storage_covers("memory_logits" if k else "base_logits", logits)
        code = native.DTYPE_CODE[logits.dtype]
        inputs.append((logits.data_ptr(), logits.stride(0), logits.shape[1], code))
    return inputs


SMALLEST_WEIGHT = 2.0**-126  # a positive weight stays one in fp32


def live_models(
    models, row_weights, weights, memory_temperature, *, all_models, base_needed
) -> list[tuple[Any, float, float]]:
    """(model, scale, weight) of the models, base first, that a kernel has to look at. With row
    weights that is decided row by row, so it is all of them, and the weight here means nothing.
    `memory_temperature`: a number, or one per memory."""
    temperatures = memory_temperature
    if isinstance(temperatures, float):
        temperatures = [temperatures] * (len(models) - 1)
    scales = (1.0, *(1.0 / temperature for temperature in temperatures))
    live = []
    for k, (x, scale) in enumerate(zip(models, scales, strict=True)):
        if row_weights is not None:
            live.append((x, scale, 0.0))
        elif weights[k] > 0.0:
            live.append((x, scale, max(weights[k], SMALLEST_WEIGHT)))
        elif all_models or (base_needed and k == 0):
            live.append((x, scale, 0.0))
    return live


def raise_row_fault(fault, row_weights: Tensor | None) -> None:
    """Turn a native fault (what, row, value), or None, into a ValueError."""
    if fault is None:
        return
    what, row, memory = fault
    if what == "mix_weight":
        raise ValueError(
            f"mix_weight: row {row} has {float(row_weights[row, memory])} for memory {memory}, "
            "expected a number in [0, 1]"
        )
    if what == "mix_weight_sum":
        raise ValueError(
            f"mix_weight: the weights of row {row} add up to {float(row_weights[row].sum())}; the "
            "memories together can have at most 1, the base gets the rest"
        )
    raise ValueError(
        f"base_logits, memory_logits: row {row} holds NaN, +inf or nothing but -inf, so there is "
        "no distribution to draw from"
    )


def find_weight_fault(row_weights: Tensor | None):
    """What the native kernels check, for the reference backend on CPU tensors."""
    if row_weights is None or row_weights.device.type != "cpu":
        return None
    bad = ~((row_weights >= 0) & (row_weights <= 1))
    if bool(bad.any()):
        return ("mix_weight", *bad.nonzero()[0].tolist())
    bad = row_weights.double().sum(1) > 1 + WEIGHT_SLACK
    if bool(bad.any()):
        return "mix_weight_sum", int(bad.nonzero()[0, 0]), 0
    return None


def weights_valid(row_weights: Tensor) -> Tensor:
    """(N,) bool: weights in [0, 1] that add up to at most 1."""
    inside = ((row_weights >= 0) & (row_weights <= 1)).all(1)
    return inside & (row_weights.double().sum(1) <= 1 + WEIGHT_SLACK)


def _weights(mix_weight, memories: int, rows: int, device) -> tuple[Tensor | None, list[float]]:
    if isinstance(mix_weight, (float, int)):
        if memories == 1 and 0.0 <= mix_weight <= 1.0:
            return None, [1.0 - mix_weight, float(mix_weight)]
        if memories > 1:
            raise ValueError(
                f"mix_weight: got one number for {memories} memories; pass a list with the weight "
                "of each"
            )
        return None, _with_base([mix_weight])
    if isinstance(mix_weight, Tensor):
        return weight_matrix(mix_weight, memories, rows, device), []
    if isinstance(mix_weight, Sequence) and not isinstance(mix_weight, str):
        if len(mix_weight) != memories:
            raise ValueError(
                f"mix_weight: {len(mix_weight)} weights for {memories} memories; the base's weight "
                "is what they leave of 1 and is not listed"
            )
        if not any(isinstance(weight, Tensor) for weight in mix_weight):
            return None, _with_base(mix_weight)
        columns = [
            weight_matrix(weight, 1, rows, device, f"mix_weight[{k}]")[:, 0]
            if isinstance(weight, Tensor)
            else torch.full((rows,), checks.probability(f"mix_weight[{k}]", weight), device=device)
            for k, weight in enumerate(mix_weight)
        ]
        return torch.stack(columns, 1), []
    raise TypeError(
        "mix_weight: expected a number, a tensor, or a list with one of them per memory, got "
        f"{type(mix_weight).__name__}"
    )


def _with_base(weights) -> list[float]:
    weights = [checks.probability("mix_weight", weight) for weight in weights]
    total = math.fsum(weights)
    if total > 1 + WEIGHT_SLACK:
        raise ValueError(
            f"mix_weight: the weights {weights} add up to {total}; the memories together can have "
            "at most 1, the base gets the rest"
        )
    return [max(0.0, 1.0 - total), *weights]


def weight_matrix(weight: Tensor, memories: int, rows: int, device, name="mix_weight") -> Tensor:
    """(rows, memories), from a tensor of any of the shapes that `logit_mix` takes."""
    checks.plain_tensor(name, weight)
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {weight.dtype}")
    if weight.ndim == 0:
        weight = weight.to(device)  # as torch does with a scalar beside tensors
    if weight.device != device:
        raise ValueError(f"{name}: on {weight.device}, the logits on {device}; use .to()")
    shape = tuple(weight.shape)
    if memories == 1 and shape in ((), (1,)):
        return weight.reshape(1, 1).expand(rows, 1)
    if memories == 1 and shape == (rows,):
        return weight[:, None]
    if memories > 1 and shape == (memories,):
        return weight.expand(rows, memories)
    if shape == (rows, memories):
        return weight
    expected = f"({rows},), one per row" if memories == 1 else f"({memories},), one per memory"
    raise ValueError(
        f"{name}: expected shape {expected}, or {(rows, memories)}, rows by memories, got {shape}"
    )
