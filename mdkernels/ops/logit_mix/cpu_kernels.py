"""Launcher of the C++ kernel csrc/cpu/logit_mix.inl. Nothing here copies or converts the logits."""

import torch
from torch import Tensor

from .. import native
from ..checks import storage_covers
from .arguments import mixture_width, raise_row_fault

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_MEMORIES = 15  # kMixTerms of csrc/cpu/mix_kernels.h, less the base


def forward(
    base_logits, memory_logits, row_weights, weights, memory_temperature, base_scale
) -> Tensor:
    shape = (base_logits.shape[0], mixture_width(base_logits, memory_logits))
    out = native.empty_huge(base_logits, shape, dtype=torch.float32)
    models = mixture(base_logits, memory_logits, row_weights, weights)
    fault = native.load("_cpu").module.logit_mix(
        *models,
        memory_temperature,
        base_scale,
        out.data_ptr(),
        shape[1],
        torch.get_num_threads(),
    )
    raise_row_fault(fault, row_weights)
    return out


def mixture(base_logits, memory_logits, row_weights, weights) -> tuple:
    """(rows, inputs, weights, row weights) as the extension takes them."""
    if len(memory_logits) > MOST_MEMORIES:
        raise ValueError(
            f"memory_logits: the cpu backend mixes at most {MOST_MEMORIES} memories, got "
            f"{len(memory_logits)}; use backend='reference'"
        )
    inputs = [_input("base_logits", base_logits)]
    inputs += [_input("memory_logits", memory) for memory in memory_logits]
    rows = (0, 0, 0) if row_weights is None else (row_weights.data_ptr(), *row_weights.stride())
    return base_logits.shape[0], inputs, weights, rows


def _input(name: str, logits: Tensor) -> tuple[int, int, int, int]:
    storage_covers(name, logits)
    return logits.data_ptr(), logits.stride(0), logits.shape[1], native.DTYPE_CODE[logits.dtype]
