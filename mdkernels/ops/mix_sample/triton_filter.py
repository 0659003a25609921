"""Top-k, top-p and min-p in Triton, as one cutoff per row. Derivation: README.md.

`scores_kernel` writes the log-probabilities of the mixture, what they amount to per part, and the
highest of each group of `GROUP`; `cutoff_kernel` looks for the last token that is kept, without
sorting, by counting at `BOUNDS` thresholds a pass. Shared with mix_verify.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..logit_mix.triton_common import (
    COUNTS,
    LOG2E,
    LOWEST,
    PLACED,
    log,
    mix_logprobs,
    mixture_kernel,
    offsets_of,
    row_terms,
)
from ..triton_rows import INTERPRETED
from .arguments import filtered

GROUP = tl.constexpr(32)  # tokens whose maximum decides whether they are looked at again
# Thresholds that are measured at a time; the interpreter pays for passes, whatever their width.
BOUNDS = tl.constexpr(256 if INTERPRETED else 8)
# `maxnreg`: left alone, the assembler spills to get two programs onto a multiprocessor.
LAUNCH = {"TILE": 2048, "num_warps": 16, "maxnreg": 128, "enable_fp_fusion": True}

COUNT, MASS, TIES = (tl.constexpr(kind) for kind in range(3))
LEAST_KEY = tl.constexpr(-2139095041)  # of -inf: see `ordered`
UNIT = tl.constexpr(2.0**40)  # masses are in units of 2^-40 of the best token's


class Cut(NamedTuple):
    """What is kept of each row: scores above `least`, and of equal ones the ids to `last_ties`."""

    scores: Tensor  # (rows, groups * GROUP) fp32, -inf behind the width
    groups: int
    best: Tensor  # (rows,) fp32, the highest score; NaN: the row has no distribution
    least: Tensor  # (rows,) fp32
    last_ties: Tensor  # (rows,) int32


def cut(made, temperature, slope, top_k, top_p, min_p, *, also=-1, log_masses=None) -> Cut | None:
    """The filters' `Cut` of the rows of a `Plan`, on its way; None if they keep everything.
    `also` is that of the plan; `log_masses`, (rows,) fp32, gets the mass of what is kept:
    log sum exp((score - best) slope)."""
    top_k = top_k if top_k < made.width else 0
    if not filtered(top_k, top_p, min_p):
        return None

    def new(*shape, dtype=torch.float32):
        return made.tickets.new_empty(shape, dtype=dtype)

    rows, groups = made.rows, triton.cdiv(made.width, GROUP.value)
    scores, maxima = new(rows, groups * GROUP.value), new(rows, groups)
    tops, parts_masses = new(rows, made.parts), new(rows, made.parts, dtype=torch.int64)
    scores_kernel[made.grid](
        *made.models,
        made.maxima,
        made.sums,
        scores,
        maxima,
        tops,
        parts_masses,
        slope,
        groups,
        ALSO=also,
        **made.combined,
    )
    found = Cut(scores, groups, new(rows), new(rows), new(rows, dtype=torch.int32))
    cutoff_kernel[(rows,)](
        found,
        log_masses,
        maxima,
        tops,
        parts_masses,
        new(rows, groups, dtype=torch.int32),
        slope,
        top_k,
        top_p,
        math.log(min_p) * temperature if min_p > 0.0 else -math.inf,
        made.width,
        made.parts,
        PARTS=triton.next_power_of_2(made.parts),
        **LAUNCH,
    )
    return found


@triton.jit
def ordered(x):
    """Floats in the order of signed integers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass(score, best, slope):
    """A token's probability in integers: sums of them depend on no order."""
    return (tl.exp2((score - best) * (slope * LOG2E)) * UNIT).to(tl.int64)


@triton.jit
def kept_scores(cut, row, cols):
    """The scores at `cols` of a row; -inf for what is not kept."""
    end = cut.groups * GROUP
    score = tl.load(cut.scores + row * end + cols, mask=cols < end, other=-float("inf"))
    least = tl.load(cut.least + row)
    stays = (score > least) | ((score == least) & (cols <= tl.load(cut.last_ties + row)))
    return tl.where(stays, score, -float("inf"))


@mixture_kernel
def scores_kernel(
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
    scores,
    group_maxima,
    tops,
    masses,
    slope,
    groups,
    parts,
    share,
    splits,
    ALSO: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The scores of a row; per part the highest and the mass relative to it."""
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
        ALSO,
        PARTS,
    )
    offsets = offsets_of(log_sums, log_weights)
    for part in range(first, tl.minimum(first + share, parts)):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        score = mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols)
        tl.store(scores + row * (groups * GROUP) + cols, score, mask=cols < groups * GROUP)
        group = part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        highest = tl.max(tl.reshape(score, (BLOCK // GROUP, GROUP)), 1)
        tl.store(group_maxima + row * groups + group, highest, mask=group < groups)
        top = tl.maximum(tl.max(score, 0), LOWEST)
        tl.store(tops + row * parts + part, tl.where(valid, top, float("nan")))
        tl.store(masses + row * parts + part, tl.sum(mass(score, top, slope), 0))


@triton.jit
def measure(scores, live, count, bounds, best, slope, tie, width, KIND: tl.constexpr, TILE):
    """The weight of the tokens with key >= bound, per bound. `scores`: of `count` tokens, or of
    those in the groups that `live` lists. COUNT: tokens by score; MASS: their mass by score; TIES:
    tokens of the score `tie` by id, the key of id 0 being the highest."""
    sums = tl.zeros(bounds.shape, tl.int64)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < count
        if live is not None:
            at = tl.load(live + at // GROUP, mask=inside, other=0) * GROUP + at % GROUP
        score = tl.load(scores + at, mask=inside, other=-float("inf"))
        if KIND == TIES:
            key = tl.where(inside & (score == tie), width - at, 0)
        else:
            key = ordered(score)
        above = key[:, None] >= bounds.to(tl.int32)[None, :]
        if KIND == MASS:
            sums += tl.sum(tl.where(above, mass(score, best, slope)[:, None], 0), 0)
        else:
            sums += tl.sum((above & inside[:, None]).to(tl.int32), 0)
    return sums


@triton.jit
def search(
    scores, live, count, low, high, target, best, slope, tie, width, KIND: tl.constexpr, TILE
):
    """The largest key in [low, high) with weight(keys >= key) >= target, or `low` if there is none;
    the weight from that key on, and above it. Nothing has a key of `high` or more."""
    reached = tl.full((), 0, tl.int64)
    above = tl.full((), 0, tl.int64)
    number = tl.arange(0, BOUNDS)
    going = high > low
    while going:
        step = (high - low + BOUNDS - 1) // BOUNDS
        bounds = tl.minimum(low + step * number, high)
        sums = measure(scores, live, count, bounds, best, slope, tie, width, KIND, TILE)
        enough = tl.maximum(tl.sum((sums >= target).to(tl.int32), 0), 1)
        reached = tl.sum(tl.where(number == enough - 1, sums, 0), 0)
        above = tl.where(enough < BOUNDS, tl.sum(tl.where(number == enough, sums, 0), 0), above)
        high = tl.minimum(high, low + step * enough)
        low += step * (enough - 1)
        going = high - low > 1
    return low, reached, above


@triton.jit
def share_of(total, top_p):
    """The mass that top-p asks for, of a total in fp64: at least the best token."""
    return tl.maximum(tl.ceil(total * top_p), 1.0).to(tl.int64)


@triton.jit(do_not_specialize=(*COUNTS, "top_k", "width"), do_not_specialize_on_alignment=PLACED)
def cutoff_kernel(
    cut,
    log_masses,
    group_maxima,
    tops,
    masses,
    live,
    slope,
    top_k,
    top_p: tl.float64,
    reach,
    width,
    parts,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Per row, the chain of filters as a `Cut`. `reach`: how far below the best score min-p goes,
    as a negative number."""
    row = tl.program_id(0).to(tl.int64)
    groups = cut.groups
    scores = cut.scores + row * (groups * GROUP)
    group_maxima += row * groups
    live += row * groups
    part = tl.arange(0, PARTS)
    top = tl.load(tops + row * parts + part, mask=part < parts, other=LOWEST)
    broken = tl.max((top != top).to(tl.int32), 0) > 0
    top = tl.where(top == top, top, LOWEST)
    best = tl.max(top, 0)
    limit = best + reach
    low = tl.full((), LEAST_KEY, tl.int64)
    high = ordered(best).to(tl.int64) + 1
    wanted = tl.full((), 0, tl.int64) + top_k
    target = wanted

    # The highest of each group alone reach the target at a threshold that bounds the cutoff from
    # below; what lies under it is not looked at again.
    if top_k > 0:
        low, _, _ = search(
            group_maxima, None, groups, low, high, wanted, best, slope, best, width, COUNT, TILE
        )
    elif top_p < 1.0:
        each = tl.load(masses + row * parts + part, mask=part < parts, other=0)
        factor = tl.exp2((top - best) * (slope * LOG2E))
        target = share_of(tl.sum(each.to(tl.float64) * factor.to(tl.float64), 0), top_p)
        low, _, _ = search(
            group_maxima, None, groups, low, high, target, best, slope, best, width, MASS, TILE
        )
    else:
        low = ordered(limit).to(tl.int64)
    count = tl.full((), 0, tl.int32)
    for first in range(0, groups, TILE):
        group = first + tl.arange(0, TILE)
        highest = tl.load(group_maxima + group, mask=group < groups, other=-float("inf"))
        mine = (group < groups) & (ordered(highest) >= low)
        place = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(live + count + place, group, mask=mine)
        count += tl.sum(mine.to(tl.int32), 0)
    count *= GROUP
    tl.debug_barrier()

    last_tie = width
    spared = tl.full((), 0, tl.int64)  # mass of the ties with the cutoff that do not stay
    if top_k > 0:
        low, _, _ = search(
            scores, live, count, low, high, wanted, best, slope, best, width, COUNT, TILE
        )
    if top_p < 1.0:
        if top_k > 0:
            bound = low + tl.arange(0, 1)
            total = measure(scores, live, count, bound, best, slope, best, width, MASS, TILE)
            target = share_of(tl.max(total, 0).to(tl.float64), top_p)
        low, reached, above = search(
            scores, live, count, low, high, target, best, slope, best, width, MASS, TILE
        )
        # Equal tokens are ranked by id: the first `keep` of them stay.
        tie = from_ordered(low)
        each_tie = tl.maximum(mass(tie, best, slope), 1)
        ties = (reached - above) // each_tie
        keep = (target - above + each_tie - 1) // each_tie
        if keep < ties:
            key, _, _ = search(
                scores,
                live,
                count,
                tl.full((), 0, tl.int64),
                tl.full((), 1, tl.int64) + width,
                keep,
                best,
                slope,
                tie,
                width,
                TIES,
                TILE,
            )
            last_tie = width - key.to(tl.int32)
            spared = (ties - keep) * each_tie
    least = from_ordered(low)
    if limit > least:
        least = limit
        last_tie = width
        spared = tl.full((), 0, tl.int64)
    tl.store(cut.best + row, tl.where(broken, float("nan"), best))
    tl.store(cut.least + row, least)
    tl.store(cut.last_ties + row, last_tie)
    if log_masses is not None:
        bound = ordered(least).to(tl.int64) + tl.arange(0, 1)
        total = measure(scores, live, count, bound, best, slope, best, width, MASS, TILE)
        total = (tl.max(total, 0) - spared).to(tl.float32)
        tl.store(log_masses + row, log(total * (1.0 / UNIT)))
