"""Triton kernel of mix_argmax, and its launcher. Derivation: README.md."""

import torch
import triton.language as tl
from torch import Tensor

from ..logit_mix.triton_common import DTYPES, LOG2E, last_of_row, mixture_kernel, plan, row_terms
from ..triton_rows import launching

__all__ = ["DTYPES", "forward"]


def forward(base_logits, memory_logits, row_weights, weights, memory_temperature) -> Tensor:
    ids = base_logits.new_empty(base_logits.shape[0], dtype=torch.int64)
    with launching("mix_argmax", base_logits):
        made = plan(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=False,
        )
        if made.rows:
            best = base_logits.new_empty((made.rows, made.parts), dtype=torch.float32)
            best_ids = base_logits.new_empty((made.rows, made.parts), dtype=torch.int32)
            best_kernel[made.grid](
                *made.models,
                made.maxima,
                made.sums,
                made.tickets,
                best,
                best_ids,
                ids,
                made.width,
                **made.combined,
            )
    return ids


@mixture_kernel
def best_kernel(
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
    tickets,
    best,
    best_ids,
    ids,
    width,
    parts,
    share,
    splits,
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
        -1,
        PARTS,
    )
    # Probabilities are compared, but the logits themselves where one model is alone: that is exact.
    alive = 0
    for k in tl.static_range(len(xs)):
        alive += tl.where(log_weights[k] > -float("inf"), 1, 0)
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        total = tl.full((BLOCK,), 0.0, tl.float32)
        single = tl.full((BLOCK,), -float("inf"), tl.float32)
        for k in tl.static_range(len(xs)):
            live = tl.where(log_weights[k] > -float("inf"), widths[k], 0)
            x = tl.load(xs[k] + row * strides[k] + cols, mask=cols < live, other=-float("inf"))
            x = x.to(tl.float32)
            share_of_1 = tl.exp2((log_weights[k] - log_sums[k]) * LOG2E)
            term = share_of_1 * tl.exp2((x - origins[k]) * (scales[k] * LOG2E))
            total += tl.where(cols < live, term, 0.0)
            single = tl.maximum(single, x)
        score = tl.where(alive > 1, tl.where(cols < width, total, -1.0), single)
        score = tl.where(score == score, score, -1.0)  # NaN: the row is not valid
        top, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(best + row * parts + part, top)
        tl.store(best_ids + row * parts + part, part * BLOCK + at)
    if last_of_row(tickets, row, splits):
        every = tl.arange(0, PARTS)
        tops = tl.load(
            best + row * parts + every,
            mask=every < parts,
            other=-float("inf"),
            cache_modifier=".cg",
        )
        _, winner = tl.max(tops, 0, return_indices=True, return_indices_tie_break_left=True)
        found = tl.load(best_ids + row * parts + winner, cache_modifier=".cg").to(tl.int64)
        tl.store(ids + row, tl.where(valid, found, -1))
