"""Launcher of the C++ kernels csrc/cpu/mix_verify.inl."""

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import mixture_width
from ..logit_mix.cpu_kernels import DTYPES, mixture
from .arguments import raise_fault, with_draft

__all__ = ["DTYPES", "forward"]


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    draft_ids,
    draft_lengths,
    draft_memory,
    draft_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> tuple[Tensor, Tensor]:
    places = draft_ids.shape[1] + 1
    draft_ids, draft_lengths, seeds, offsets = (
        x.contiguous() for x in (draft_ids, draft_lengths, seeds, offsets)
    )
    num_accepted = torch.empty_like(draft_lengths)
    tokens = draft_ids.new_empty((len(draft_lengths), places))
    memories, row_weights, weights, _, draft = with_draft(
        memory_logits, row_weights, weights, memory_temperature, draft_memory, draft_temperature
    )
    fault = native.load("_cpu").module.mix_verify(
        *mixture(base_logits, memories, row_weights, weights),
        memory_temperature,
        places,
        draft,
        draft_temperature,
        draft_ids.data_ptr(),
        draft_lengths.data_ptr(),
        temperature,
        top_k,
        top_p,
        min_p,
        seeds.data_ptr(),
        offsets.data_ptr(),
        num_accepted.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    raise_fault(fault, row_weights, draft_ids, mixture_width(base_logits, memory_logits))
    return num_accepted, tokens
