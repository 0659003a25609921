"""Triton kernel of logit_mix, and its launcher. Derivation: README.md."""

import torch
import triton.language as tl
from torch import Tensor

from ..triton_rows import launching
from .triton_common import DTYPES, mix_logprobs, mixture_kernel, offsets_of, plan, row_terms

__all__ = ["DTYPES", "forward"]


def forward(
    base_logits, memory_logits, row_weights, weights, memory_temperature, base_scale
) -> Tensor:
    with launching("logit_mix", base_logits):
        made = plan(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=False,
            also=0 if base_scale else -1,
        )
        out = base_logits.new_empty((made.rows, made.width), dtype=torch.float32)
        if made.rows:
            write_kernel[made.grid](
                *made.models,
                made.maxima,
                made.sums,
                out,
                made.width,
                BASE=base_scale,
                **made.combined,
            )
    return out


@mixture_kernel
def write_kernel(
    xs,
    strides,
    widths,
    scales,
    weights,
    row_weights,
    weight_stride,
    weight_step,
    maxima,
    sums,
    out,
    width,
    parts,
    share,
    splits,
    BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    first = (pid % splits) * share
    origins, log_sums, log_weights, valid = row_terms(
        scales,
        weights,
        row_weights,
        weight_stride,
        weight_step,
        maxima,
        sums,
        row,
        parts,
        False,
        0 if BASE else -1,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    shift = tl.where(valid, 0.0, float("nan"))
    if BASE:
        shift += origins[0] + log_sums[0]
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        mixed = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols)
        tl.store(out + row * width + cols, mixed + shift, mask=cols < width)
