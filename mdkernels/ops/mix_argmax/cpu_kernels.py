"""Launcher of the C++ kernel csrc/cpu/mix_argmax.inl."""

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import raise_row_fault
from ..logit_mix.cpu_kernels import DTYPES, PLAIN, mixture

__all__ = ["DTYPES", "PLAIN", "forward"]


def forward(base_logits, memory_logits, row_weights, weights, memory_temperature) -> Tensor:
    ids = base_logits.new_empty(base_logits.shape[0], dtype=torch.int64)
    fault = native.load("_cpu").module.mix_argmax(
        *mixture(base_logits, memory_logits, row_weights, weights),
        memory_temperature,
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    raise_row_fault(fault, row_weights)
    return ids
