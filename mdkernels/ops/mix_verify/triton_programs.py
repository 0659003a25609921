"""Triton kernels of mix_verify; triton_kernels.py launches them. Derivation: README.md."""

import triton
import triton.language as tl

from ..logit_mix.triton_common import (
    COUNTS,
    LOG2E,
    LOWEST,
    PLACED,
    last_of_row,
    log,
    mix_logprobs,
    mixture_kernel,
    offsets_of,
    row_terms,
)
from ..mix_sample.triton_filter import kept_scores
from ..mix_sample.triton_kernels import exponentials

# One compilation for every number of places, as for every batch size.
verify_kernel = triton.jit(
    do_not_specialize=(*COUNTS, "places"),
    do_not_specialize_on_alignment=(*PLACED, "draft_ids", "draft_lengths"),
)


@mixture_kernel
def mass_kernel(
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
    tops,
    masses,
    slope,
    parts,
    share,
    splits,
    ALSO: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Per part: the highest score m (at least LOWEST) and the sum of exp((score - m) slope)."""
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    first = (pid % splits) * share
    origins, log_sums, log_weights, _ = row_terms(
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
        ALSO,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        score = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols)
        top = tl.maximum(tl.max(score, 0), LOWEST)
        tl.store(tops + row * parts + part, top)
        tl.store(masses + row * parts + part, tl.sum(tl.exp2((score - top) * (slope * LOG2E)), 0))


@triton.jit
def target_terms(tops, masses, cut, row, slope, parts, TEMPERED: tl.constexpr, PARTS: tl.constexpr):
    """(top, log mass) with log v = (score - top) slope - log mass."""
    top = 0.0
    log_mass = 0.0
    if cut is not None:
        top = tl.load(tops + row)
        log_mass = tl.load(masses + row)
    elif TEMPERED:
        part = tl.arange(0, PARTS)
        m = tl.load(tops + row * parts + part, mask=part < parts, other=LOWEST)
        s = tl.load(masses + row * parts + part, mask=part < parts, other=0.0)
        top = tl.max(m, 0)
        log_mass = log(tl.sum(s * tl.exp2((m - top) * (slope * LOG2E)), 0))
    return top, log_mass


@triton.jit
def draft_logprobs(x, stride, width, scale, origin, log_sum, row, cols):
    """log q' at `cols`: what mix_logprobs makes of a single model of weight 1."""
    logits = tl.load(x + row * stride + cols, mask=cols < width, other=-float("inf"))
    return (logits.to(tl.float32) - origin) * scale + (0.0 - log_sum)


@verify_kernel
def accept_kernel(
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
    tops,
    masses,
    draft_ids,
    draft_lengths,
    accepted,
    seeds,
    positions,
    slope,
    cut,
    places,
    width,
    parts,
    DRAFT: tl.constexpr,
    TEMPERED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """accepted[request, place] of every drafted token, as if those before it had been."""
    pid = tl.program_id(0)
    request = (pid // (places - 1)).to(tl.int64)
    place = pid % (places - 1)
    if place >= tl.load(draft_lengths + request):
        return
    row = request * places + place
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
        DRAFT,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    token = tl.load(draft_ids + request * (places - 1) + place)
    known = (token >= 0) & (token < width)
    token = tl.where(known, token, 0)
    top, log_mass = target_terms(tops, masses, cut, row, slope, parts, TEMPERED, PARTS)
    if cut is None:
        target = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, token)
    else:
        target = kept_scores(cut, row, token)
    target = (target - top) * slope - log_mass
    draft = draft_logprobs(
        xs[DRAFT],
        strides[DRAFT],
        widths[DRAFT],
        scales[DRAFT],
        origins[DRAFT],
        log_sums[DRAFT],
        row,
        token,
    )
    four = exponentials(tl.load(seeds + request), tl.load(positions + request) + place, 0, 4, 4)
    e = tl.sum(tl.where(tl.arange(0, 4) == 0, four, 0.0), 0)
    # E >= log q' - log v with E ~ Exp(1) has the probability min(1, v / q'); NaN is a rejection.
    stays = known & valid & (e >= draft - target)
    tl.store(accepted + request * places + place, stays.to(tl.int32))


@verify_kernel
def emit_kernel(
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
    tops,
    masses,
    draft_ids,
    draft_lengths,
    accepted,
    seeds,
    positions,
    slope,
    cut,
    places,
    tickets,
    keys,
    winners,
    num_accepted,
    tokens,
    parts,
    share,
    splits,
    DRAFT: tl.constexpr,
    TEMPERED: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Per request: how many tokens stay, and the draw at the place behind them. Two races are run,
    over the residual (or the target, if all stay) and over the target."""
    pid = tl.program_id(0)
    request = (pid // splits).to(tl.int64)
    first = (pid % splits) * share
    place = tl.arange(0, PLACES)
    length = tl.minimum(tl.load(draft_lengths + request), places - 1)
    drafted = place < length
    stays = tl.load(accepted + request * places + place, mask=drafted, other=0) > 0
    end = tl.min(tl.where(stays, PLACES, place), 0)
    rejected = end < length
    row = request * places + end
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
        DRAFT,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    valid = valid & ((log_sums[DRAFT] == log_sums[DRAFT]) | (rejected == 0))
    top, log_mass = target_terms(tops, masses, cut, row, slope, parts, TEMPERED, PARTS)
    seed = tl.load(seeds + request)
    position = tl.load(positions + request) + end
    stream = tl.where(rejected, 6, 0)
    at = request * 2 * parts
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        some = True
        if cut is None:
            score = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols)
        else:
            score = kept_scores(cut, row, cols)
            some = tl.max(score, 0) > -float("inf")
        left = tl.full((), float("inf"), tl.float32)
        whole = tl.full((), float("inf"), tl.float32)
        left_at = tl.full((), 0, tl.int32)
        whole_at = tl.full((), 0, tl.int32)
        if some:
            target = tl.exp2(((score - top) * slope - log_mass) * LOG2E)
            draft = draft_logprobs(
                xs[DRAFT],
                strides[DRAFT],
                widths[DRAFT],
                scales[DRAFT],
                origins[DRAFT],
                log_sums[DRAFT],
                row,
                cols,
            )
            rest = target - tl.where(rejected, tl.exp2(draft * LOG2E), 0.0)
            e = exponentials(seed, position, part * BLOCK, BLOCK, stream)
            # Below the smallest normal number nothing is left; NaN: the row is not valid.
            key = tl.where(rest >= 1.1754943508222875e-38, e / rest, float("inf"))
            left, left_at = tl.min(key, 0, return_indices=True, return_indices_tie_break_left=True)
            key = tl.where(target > 0.0, e / target, float("inf"))
            whole, whole_at = tl.min(
                key, 0, return_indices=True, return_indices_tie_break_left=True
            )
        tl.store(keys + at + part, left)
        tl.store(winners + at + part, part * BLOCK + left_at)
        tl.store(keys + at + parts + part, whole)
        tl.store(winners + at + parts + part, part * BLOCK + whole_at)
    if last_of_row(tickets, request * places, splits):
        every = tl.arange(0, PARTS)
        here = at + every
        clocks = tl.load(keys + here, mask=every < parts, other=float("inf"), cache_modifier=".cg")
        if tl.min(clocks, 0) == float("inf"):  # nothing left of the residual
            here += parts
            clocks = tl.load(
                keys + here, mask=every < parts, other=float("inf"), cache_modifier=".cg"
            )
        _, best = tl.min(clocks, 0, return_indices=True, return_indices_tie_break_left=True)
        ids = tl.load(winners + here, mask=every < parts, other=0, cache_modifier=".cg")
        token = tl.sum(tl.where(every == best, ids, 0), 0).to(tl.int64)
        token = tl.where(valid, token, -1)
        before = tl.load(draft_ids + request * (places - 1) + place, mask=place < end, other=-1)
        out = tl.where(place == end, token, before)
        tl.store(tokens + request * places + place, out, mask=place < places)
        tl.store(num_accepted + request, end.to(tl.int64))
