"""Launcher of the C++ kernel csrc/cpu/logit_mix.inl. Nothing here copies or converts the logits."""

import torch
from torch import Tensor

from .. import native
from .arguments import inputs_of, mixture_width, raise_row_fault

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = True
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
    inputs = inputs_of(base_logits, memory_logits, MOST_MEMORIES, "cpu")
    rows = (0, 0, 0) if row_weights is None else (row_weights.data_ptr(), *row_weights.stride())
    return base_logits.shape[0], inputs, weights, rows
