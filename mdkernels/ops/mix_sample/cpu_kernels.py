"""Launcher of the C++ kernels csrc/cpu/mix_sample.inl."""

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import raise_row_fault
from ..logit_mix.cpu_kernels import DTYPES, PLAIN, mixture

__all__ = ["DTYPES", "PLAIN", "choose", "forward", "logprobs"]


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> Tensor:
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    tokens = torch.empty_like(seeds)
    fault = native.load("_cpu").module.mix_sample(
        *mixture(base_logits, memory_logits, row_weights, weights),
        memory_temperature,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds.data_ptr(),
        offsets.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    raise_row_fault(fault, row_weights)
    return tokens


def choose(
    base_logits, memory_logits, row_weights, weights, memory_temperature, seeds, offsets
) -> Tensor:
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    out = base_logits.new_empty((base_logits.shape[0], len(memory_logits)), dtype=torch.float32)
    fault = native.load("_cpu").module.mix_choose(
        *mixture(base_logits, memory_logits, row_weights, weights),
        memory_temperature,
        seeds.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
    )
    raise_row_fault(fault, row_weights)
    return out


def logprobs(
    base_logits, memory_logits, row_weights, weights, memory_temperature, tokens
) -> Tensor:
    tokens = tokens.contiguous()
    shape = (base_logits.shape[0], 2 + len(memory_logits))
    out = base_logits.new_empty(shape, dtype=torch.float32)
    native.load("_cpu").module.mix_logprobs(
        *mixture(base_logits, memory_logits, row_weights, weights),
        memory_temperature,
        tokens.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
