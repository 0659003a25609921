"""What the Triton kernels of the mixture operators share. Derivation: README.md.

A row is cut into parts of `BLOCK` logits, whatever the batch, so that no result depends on how
many rows or programs there are. `sums_kernel` leaves one (maximum, sum) per part and model; every
program of the kernel that follows combines those of its row (`row_terms`) and then looks at the
logits a second time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import storage_covers
from .arguments import WEIGHT_SLACK, live_models, mixture_width

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_MEMORIES = 15
BLOCK = 1024  # logits per part: at V = 151936 one row makes 149 programs
PROGRAMS = 8192  # beyond this many, programs take several parts of a row
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
WEIGHT_LIMIT = tl.constexpr(1.0 + WEIGHT_SLACK)


# One compilation for every batch size: a serving process must not stop to compile because a count
# became 1 or a multiple of 16, or because the second half of a scratch buffer, or a view of the
# caller's, begins at such an address. `width` stays special: it decides about 16-byte stores.
COUNTS = ("weight_stride", "weight_step", "parts", "share", "splits")
PLACED = ("sums", "tops", "masses", "row_weights", "tokens", "seeds", "positions")
mixture_kernel = triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=PLACED)


class Models(NamedTuple):
    """The leading arguments of every kernel: one entry per model that takes part."""

    xs: tuple  # of tensors
    strides: tuple
    widths: tuple
    scales: tuple
    weights: tuple  # not looked at if there are row weights
    row_weights: Tensor | None
    weight_stride: int
    weight_step: int


class Plan(NamedTuple):
    """How a mixture is laid over programs, and the partial sums in global memory."""

    models: Models
    maxima: Tensor  # (rows, models, parts) fp32
    sums: Tensor
    tickets: Tensor  # (rows,) int32, zeroed by sums_kernel
    rows: int
    width: int
    parts: int
    share: int  # parts per program
    splits: int  # programs per row

    @property
    def grid(self) -> tuple[int]:
        return (self.rows * self.splits,)

    @property
    def layout(self) -> dict:
        return {
            "parts": self.parts,
            "share": self.share,
            "splits": self.splits,
            "BLOCK": BLOCK,
            **LAUNCH,
        }

    @property
    def combined(self) -> dict:
        """`layout` for the kernels that combine the partial sums."""
        return {**self.layout, "PARTS": triton.next_power_of_2(self.parts)}


def plan(base, memories, row_weights, weights, memory_temperature, *, all_models, also=-1):
    """The `Plan` of a call, its partial sums on their way. `all_models`, or the one with the number
    `also`, 0 being the base: look at models of weight 0 as well."""
    if len(memories) > MOST_MEMORIES:
        raise ValueError(
            f"memory_logits: the triton backend mixes at most {MOST_MEMORIES} memories, got "
            f"{len(memories)}; use backend='reference'"
        )
    for k, logits in enumerate((base, *memories)):
        storage_covers("memory_logits" if k else "base_logits", logits)
    xs, scales, model_weights = zip(
        *live_models(
            (base, *memories),
            row_weights,
            weights,
            memory_temperature,
            all_models=all_models or also > 0,  # their numbers stay
            base_needed=also == 0,
        ),
        strict=True,
    )
    models = Models(
        xs,
        tuple(x.stride(0) for x in xs),
        tuple(x.shape[1] for x in xs),
        scales,
        model_weights,
        row_weights,
        *((0, 0) if row_weights is None else row_weights.stride()),
    )
    rows, width = base.shape[0], mixture_width(base, memories)
    parts = triton.cdiv(width, BLOCK)
    share = max(1, min(parts, rows * parts // PROGRAMS))
    splits = triton.cdiv(parts, share)
    partials = base.new_empty((2, rows, len(xs), parts), dtype=torch.float32)
    tickets = base.new_empty(rows, dtype=torch.int32)
    made = Plan(models, partials[0], partials[1], tickets, rows, width, parts, share, splits)
    if rows:
        sums_kernel[made.grid](
            *models,
            made.maxima,
            made.sums,
            tickets,
            ALL=all_models,
            ALSO=also,
            # A warp adds up its parts without a barrier.
            **{**made.layout, "num_warps": 1},
        )
    return made


# ---- weights


@triton.jit
def model_weight(weights, row_weights, stride, step, row, k: tl.constexpr, MODELS: tl.constexpr):
    """The weight of model k in this row; NaN or nonsense in `row_weights` is `weights_valid`'s."""
    if row_weights is None:
        weight = weights[k]
    elif k > 0:
        weight = tl.load(row_weights + row * stride + (k - 1) * step)
    else:
        # Rounded to fp32 before it is taken from 1, so that 0.7 + 0.2 + 0.1 is 1.
        total = memory_weight(row_weights, stride, step, row, MODELS).to(tl.float32)
        weight = tl.maximum(1.0 - total, 0.0)
    return weight


@triton.jit
def memory_weight(row_weights, stride, step, row, MODELS: tl.constexpr):
    total = tl.load(row_weights + row * stride).to(tl.float64)
    for k in tl.static_range(2, MODELS):
        total += tl.load(row_weights + row * stride + (k - 1) * step).to(tl.float64)
    return total


@triton.jit
def weights_valid(row_weights, stride, step, row, MODELS: tl.constexpr):
    if row_weights is None:
        valid = True
    else:
        valid = memory_weight(row_weights, stride, step, row, MODELS) <= WEIGHT_LIMIT
        for k in tl.static_range(1, MODELS):
            weight = tl.load(row_weights + row * stride + (k - 1) * step)
            valid = valid & (weight >= 0.0) & (weight <= 1.0)
    return valid


# ---- logarithms; those of the hardware lose digits around 1


@triton.jit
def log_near_one(r, e):
    """log(1 + r) + e ln 2 for 1 + r in [sqrt(1/2), sqrt(2)), about 1 ulp."""
    p = 0.0691542989053 * r - 0.117898393496
    p = p * r + 0.118729652394
    p = p * r - 0.123843424303
    p = p * r + 0.142186588665
    p = p * r - 0.166692511856
    p = p * r + 0.200022265836
    p = p * r - 0.249999865928
    p = p * r + 0.333333104404
    r2 = r * r
    # ln 2 in two parts, so that e * high is exact and the sum keeps its last bits.
    y = p * (r * r2) - e * 2.12194440e-4
    y = y - 0.5 * r2
    return e * 0.693359375 + (r + y)


@triton.jit
def split(x):
    """(m - 1, e) with x = m 2^e and m in [sqrt(1/2), sqrt(2)), for a normal positive x."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    return (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0, e


@triton.jit
def log(x):
    r, e = split(x)
    return log_near_one(r, e.to(tl.float32))


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1], absolute error 3e-8 plus rounding; exactly 0 at 0."""
    p = 0.00538406206362 * x - 0.0301109685962
    p = p * x + 0.079210751614
    p = p * x - 0.137466237322
    p = p * x + 0.191451175029
    p = p * x - 0.248529461627
    p = p * x + 0.333203436281
    p = p * x - 0.499995525949
    p = p * x + 0.999999974534
    return p * x


# ---- the passes


@mixture_kernel
def sums_kernel(
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
    parts,
    share,
    splits,
    ALL: tl.constexpr,
    ALSO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per part and model: the maximum m (at least LOWEST) and the sum of exp((x - m) scale)."""
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    first = (pid % splits) * share
    if first == 0:
        tl.store(tickets + row, 0)
    for k in tl.static_range(len(xs)):
        weight = model_weight(weights, row_weights, weight_stride, weight_step, row, k, len(xs))
        if ALL or k == ALSO or weight > 0.0:
            at = (row * len(xs) + k) * parts
            model_sums(
                xs[k] + row * strides[k],
                widths[k],
                scales[k],
                maxima + at,
                sums + at,
                first,
                tl.minimum(first + share, parts),
                BLOCK,
            )


@triton.jit
def model_sums(x_row, width, scale, maxima, sums, first, end, BLOCK: tl.constexpr):
    for part in range(first, end):
        cols = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_row + cols, mask=cols < width, other=-float("inf")).to(tl.float32)
        # A finite floor: a part of nothing but -inf has the sum 0, not NaN.
        m = tl.maximum(tl.max(x, 0), LOWEST)
        tl.store(maxima + part, m)
        tl.store(sums + part, tl.sum(tl.exp2((x - m) * (scale * LOG2E)), 0))


@triton.jit
def row_terms(
    scales,
    weights,
    row_weights,
    weight_stride,
    weight_step,
    maxima,
    sums,
    row,
    parts,
    ALL: tl.constexpr,
    ALSO: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Per model: its maximum, log sum exp((x - maximum) scale) and log weight (-inf: not in the
    mixture); and whether the row has a distribution."""
    MODELS: tl.constexpr = len(scales)
    valid = weights_valid(row_weights, weight_stride, weight_step, row, MODELS)
    part = tl.arange(0, PARTS)
    origins = ()
    log_sums = ()
    log_weights = ()
    for k in tl.static_range(MODELS):
        weight = model_weight(weights, row_weights, weight_stride, weight_step, row, k, MODELS)
        live = weight > 0.0
        count = parts
        if not (ALL or k == ALSO):
            count = tl.where(live, parts, 0)
        at = (row * MODELS + k) * parts
        m = tl.load(maxima + at + part, mask=part < count, other=LOWEST)
        s = tl.load(sums + at + part, mask=part < count, other=0.0)
        origin = tl.max(m, 0)
        total = tl.sum(s * tl.exp2((m - origin) * (scales[k] * LOG2E)), 0)
        good = (total > 0.0) & (total < float("inf"))
        valid = valid & (good | (live == 0))
        origins = origins + (origin,)
        log_sums = log_sums + (tl.where(good, log(total), float("nan")),)
        log_weights = log_weights + (tl.where(live, log(weight), -float("inf")),)
    return origins, log_sums, log_weights, valid


@triton.jit
def offsets_of(log_sums, log_weights):
    """log weight - log sum per model; -inf drops a model."""
    offsets = ()
    for k in tl.static_range(len(log_sums)):
        dead = log_weights[k] == -float("inf")
        offsets = offsets + (tl.where(dead, -float("inf"), log_weights[k] - log_sums[k]),)
    return offsets


@triton.jit
def logaddexp(a, b):
    high = tl.maximum(a, b)
    # Two -inf give -inf: the finite floor keeps their difference from being NaN.
    low = tl.minimum(a, b) - tl.maximum(high, LOWEST)
    return high + log1p_unit(tl.exp2(low * LOG2E))


@triton.jit
def mix_logprobs(xs, strides, widths, scales, origins, offsets, row, cols):
    """log of the mixture at `cols` of a valid row; -inf where no model reaches."""
    mixed = tl.full(cols.shape, -float("inf"), tl.float32)
    for k in tl.static_range(len(xs)):
        # x - origin comes first because it is nearly exact, also for logits around 1e4.
        width = tl.where(offsets[k] > -float("inf"), widths[k], 0)
        x = tl.load(xs[k] + row * strides[k] + cols, mask=cols < width, other=-float("inf"))
        term = (x.to(tl.float32) - origins[k]) * scales[k] + offsets[k]
        mixed = term if k == 0 else logaddexp(mixed, term)
    return mixed


@triton.jit
def last_of_row(tickets, row, splits):
    """Whether all other programs of the row have come this far: their stores are then visible."""
    tl.debug_barrier()
    return tl.atomic_add(tickets + row, 1, sem="acq_rel") == splits - 1
