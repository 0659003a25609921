"""Triton kernels of mix_sample, and their launchers. Derivation: README.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logit_mix.triton_common import (
    DTYPES,
    LAUNCH,
    LOG2E,
    LOWEST,
    last_of_row,
    log_near_one,
    mix_logprobs,
    mixture_kernel,
    model_weight,
    offsets_of,
    plan,
    row_terms,
    split,
    weights_valid,
)
from ..triton_rows import launching
from .triton_filter import cut, kept_scores

__all__ = ["DTYPES", "choose", "forward", "logprobs"]


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
    with launching("mix_sample", base_logits):
        made = plan(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=False,
        )
        if made.rows:
            shape = (2, made.rows, made.parts)
            keys, tops = base_logits.new_empty(shape, dtype=torch.float32)
            winners = base_logits.new_empty(shape[1:], dtype=torch.int32)
            slope = min(1.0 / temperature, 1e30)
            draw_kernel[made.grid](
                *made.models,
                made.maxima,
                made.sums,
                made.tickets,
                keys,
                tops,
                winners,
                tokens,
                seeds,
                offsets,
                slope,
                cut(made, temperature, slope, top_k, top_p, min_p),
                **made.combined,
            )
    return tokens


def choose(
    base_logits, memory_logits, row_weights, weights, memory_temperature, seeds, offsets
) -> Tensor:
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    rows, memories = len(seeds), len(memory_logits)
    out = base_logits.new_empty((rows, memories), dtype=torch.float32)
    with launching("mix_sample", base_logits):
        if rows:
            choose_kernel[(rows,)](
                tuple(weights or (0.0,) * (1 + memories)),
                row_weights,
                *((0, 0) if row_weights is None else row_weights.stride()),
                seeds,
                offsets,
                out,
                SLOTS=max(4, triton.next_power_of_2(1 + memories)),
                num_warps=1,
                enable_fp_fusion=True,
            )
    return out


def logprobs(
    base_logits, memory_logits, row_weights, weights, memory_temperature, tokens
) -> Tensor:
    tokens = tokens.contiguous()
    with launching("mix_sample", base_logits):
        made = plan(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=True,
        )
        shape = (made.rows, 2 + len(memory_logits))
        out = base_logits.new_empty(shape, dtype=torch.float32)
        if made.rows:
            logprobs_kernel[(made.rows,)](
                *made.models,
                made.maxima,
                made.sums,
                tokens,
                out,
                made.width,
                made.parts,
                PARTS=triton.next_power_of_2(made.parts),
                **LAUNCH,
            )
    return out


@triton.jit
def philox(seed, offset, block, stream):
    """The four words of Philox4x32-10 at counter (block, stream, offset), key seed."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = tl.full(block.shape, stream, tl.uint32)
    c2 = tl.zeros(block.shape, tl.uint32) + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros(block.shape, tl.uint32) + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, 0xD2511F53)
        h2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0 = h2 ^ c1 ^ k0
        c1 = low2
        c2 = h0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, offset, first, BLOCK: tl.constexpr, stream):
    """The word of each of the tokens [first, first + BLOCK), `first` a multiple of 4."""
    block = first // 4 + tl.arange(0, BLOCK // 4)
    c0, c1, c2, c3 = philox(seed, offset, block, stream)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BLOCK,))


@triton.jit
def exponentials(seed, offset, first, BLOCK: tl.constexpr, stream):
    """E = -log(1 - v) of each token, v = (high + (low + 1/2) / 2^32) / 2^32, to fp32 precision."""
    high = words(seed, offset, first, BLOCK, stream)
    low = tl.full((BLOCK,), 0x80000000, tl.uint32)
    # 1/2 stands in for the low word where that changes v (or 1 - v near 1) by less than 1e-6.
    short = (high < 0x100000) | (high >= 0xFFFF0000)
    if tl.max(short.to(tl.int32), 0) > 0:
        low = words(seed, offset, first, BLOCK, stream + 1)
    v = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.0**-32) * 2.0**-32
    # Not ~: the interpreter of Triton 3.6 has none of unsigned numbers.
    other_high, other_low = high ^ 0xFFFFFFFF, low ^ 0xFFFFFFFF
    rest = (other_high.to(tl.float32) + (other_low.to(tl.float32) + 0.5) * 2.0**-32) * 2.0**-32
    r, e = split(tl.maximum(rest, 2.0**-53))
    # Close to 1, `rest` has lost the digits that v has.
    return -log_near_one(tl.where(e == 0, -v, r), e.to(tl.float32))


@mixture_kernel
def choose_kernel(
    weights, row_weights, weight_stride, weight_step, seeds, positions, out, SLOTS: tl.constexpr
):
    """The drawn model of each row: 1 in the column of a memory, nothing but 0 for the base."""
    row = tl.program_id(0).to(tl.int64)
    MODELS: tl.constexpr = len(weights)
    slot = tl.arange(0, SLOTS)
    share = tl.zeros((SLOTS,), tl.float32)
    for k in tl.static_range(MODELS):
        weight = model_weight(weights, row_weights, weight_stride, weight_step, row, k, MODELS)
        share = tl.where(slot == k, weight, share)
    clocks = exponentials(tl.load(seeds + row), tl.load(positions + row), 0, SLOTS, 2) / share
    clocks = tl.where(clocks == clocks, clocks, float("inf"))
    _, chosen = tl.min(clocks, 0, return_indices=True, return_indices_tie_break_left=True)
    valid = weights_valid(row_weights, weight_stride, weight_step, row, MODELS)
    here = tl.where(slot == chosen, 1.0, 0.0) + tl.where(valid, 0.0, float("nan"))
    to = out + row * (MODELS - 1) + slot - 1
    tl.store(to, here, mask=(slot > 0) & (slot < MODELS))


@mixture_kernel
def draw_kernel(
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
    keys,
    tops,
    winners,
    tokens,
    seeds,
    positions,
    inverse_temperature,
    cut,
    parts,
    share,
    splits,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    first = (pid % splits) * share
    if cut is None:
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
        offsets = offsets_of(log_sums, log_weights)
    else:
        highest = tl.load(cut.best + row)
        valid = highest == highest  # NaN: no distribution
    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    slope = inverse_temperature * LOG2E
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        some = True
        if cut is None:
            score = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols)
        else:
            score = kept_scores(cut, row, cols)
            some = tl.max(score, 0) > -float("inf")
        # The row's maximum is not known yet, so each part races against its own.
        top = tl.maximum(tl.max(score, 0), LOWEST)
        fastest = tl.full((), float("inf"), tl.float32)
        at = tl.full((), 0, tl.int32)
        if some:
            q = tl.exp2((score - top) * slope)
            key = exponentials(seed, position, part * BLOCK, BLOCK, 0) / q
            key = tl.where(key == key, key, float("inf"))  # NaN: the row is not valid
            fastest, at = tl.min(key, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(keys + row * parts + part, fastest)
        tl.store(tops + row * parts + part, top)
        tl.store(winners + row * parts + part, part * BLOCK + at)
    if last_of_row(tickets, row, splits):
        every = tl.arange(0, PARTS)
        here = row * parts + every
        best = tl.load(tops + here, mask=every < parts, other=LOWEST, cache_modifier=".cg")
        clocks = tl.load(keys + here, mask=every < parts, other=float("inf"), cache_modifier=".cg")
        clocks = clocks * tl.exp2((tl.max(best, 0) - best) * slope)
        _, winner = tl.min(clocks, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(winners + row * parts + winner, cache_modifier=".cg").to(tl.int64)
        tl.store(tokens + row, tl.where(valid, token, -1))


@mixture_kernel
def logprobs_kernel(
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
    tokens,
    out,
    width,
    parts,
    PARTS: tl.constexpr,
):
    """Per row: the log-probability of its token under the mixture and under each model."""
    row = tl.program_id(0).to(tl.int64)
    MODELS: tl.constexpr = len(xs)
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
        True,
        -1,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < width)
    token = tl.where(known, token, 0)
    shift = tl.where(known & valid, 0.0, float("nan"))
    mixed = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, token)
    to = out + row * (MODELS + 1)
    tl.store(to, mixed + shift)
    for k in tl.static_range(MODELS):
        x = tl.load(xs[k] + row * strides[k] + token, mask=token < widths[k], other=-float("inf"))
        alone = (x.to(tl.float32) - origins[k]) * scales[k] - log_sums[k]
        tl.store(to + 1 + k, tl.where(known, alone, float("nan")))
