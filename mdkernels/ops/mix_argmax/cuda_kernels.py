"""Launcher of csrc/cuda/mix_argmax.cu."""

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import mixture_width
from ..logit_mix.cuda_kernels import DTYPES, PLAIN, launch_shape, mixture

__all__ = ["DTYPES", "PLAIN", "forward"]


def forward(base_logits, memory_logits, row_weights, weights, memory_temperature) -> Tensor:
    ids = base_logits.new_empty(base_logits.shape[0], dtype=torch.int64)
    native.load("_cuda").module.mix_argmax(
        *mixture(base_logits, memory_logits, row_weights, weights, memory_temperature),
        ids.data_ptr(),
        *launch_shape(base_logits, mixture_width(base_logits, memory_logits)),
    )
    return ids
