"""Launcher of the CUDA kernels csrc/cuda/mix_verify.cu."""

import math

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import mixture_width
from ..logit_mix.cuda_kernels import DTYPES, launch_shape, mixture
from ..mix_argmax import cuda_kernels as mix_argmax
from ..mix_sample.cuda_kernels import score_scratch
from .arguments import with_draft
from .reference import accept_greedy

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
    if temperature == 0.0:
        mix = (base_logits, memory_logits, row_weights, weights, memory_temperature)
        best = mix_argmax.forward(*mix).view(len(draft_ids), -1)
        return accept_greedy(best, draft_ids, draft_lengths)
    draft_ids, draft_lengths, seeds, offsets = (
        x.contiguous() for x in (draft_ids, draft_lengths, seeds, offsets)
    )
    batch, places = len(draft_ids), draft_ids.shape[1] + 1
    num_accepted = torch.empty_like(draft_lengths)
    tokens = draft_ids.new_empty((batch, places))
    accepted = torch.empty_like(draft_ids, dtype=torch.int32)
    memories, row_weights, weights, temperatures, draft = with_draft(
        memory_logits, row_weights, weights, memory_temperature, draft_memory, draft_temperature
    )
    width = mixture_width(base_logits, memory_logits)
    shape = launch_shape(base_logits, width)
    # One row of scores per test, and then one per request.
    scratch, stride = score_scratch(base_logits, batch * max(1, places - 1), width, shape[1])
    native.load("_cuda").module.mix_verify(
        *mixture(base_logits, memories, row_weights, weights, temperatures, all_models=True),
        batch,
        places,
        draft,
        min(1.0 / temperature, 1e30),
        top_k,
        top_p,
        math.log(min_p) if min_p > 0.0 else -math.inf,
        draft_ids.data_ptr(),
        draft_lengths.data_ptr(),
        seeds.data_ptr(),
        offsets.data_ptr(),
        accepted.data_ptr(),
        num_accepted.data_ptr(),
        tokens.data_ptr(),
        native.address(scratch),
        stride,
        *shape,
    )
    return num_accepted, tokens
