"""Device functions of the Triton kernels: the sparse side of a row, and the dense gradient."""

import triton
import triton.language as tl

from ..triton_rows import LOG2E, TINY, tile_columns

# Flags of a row are int32 (0 or 1): the interpreter does not combine scalar booleans.


@triton.jit
def label_of(labels, row, stride, ignore_index, vocab):
    """(label, live, bad); label -1 where there is none."""
    label = row * 0 - 1
    live = 1
    bad = 0
    if labels is not None:
        label = tl.load(labels + row * stride)
        live = (label != ignore_index).to(tl.int32)
        outside = (label < 0).to(tl.int32) + (label >= vocab).to(tl.int32)
        bad = live * outside
        label = tl.where(live > outside, label, -1)
    return label, live, bad


@triton.jit
def range_of(row_offsets, row, nnz, live):
    """(begin, end, bad) of the entries of a row, inside the arrays whatever the offsets say."""
    begin = row * 0
    end = row * 0
    bad = 0
    if row_offsets is not None:
        begin = tl.load(row_offsets + row)
        end = tl.load(row_offsets + row + 1)
        wrong = tl.where(begin < 0, 1, tl.where(end < begin, 1, tl.where(end > nnz, 1, 0)))
        begin = tl.where(live > wrong, begin, 0)
        end = tl.where(live > wrong, end, 0)
        bad = live * wrong
    return begin, end, bad


@triton.jit
def entries(ids, probs, first, end, vocab, K: tl.constexpr):
    """(id, prob, usable, bad) of K entries from `first`; -1 and 0 where there are none."""
    at = first + tl.arange(0, K)
    there = at < end
    token = tl.load(ids + at, mask=there, other=-1)
    prob = tl.load(probs + at, mask=there, other=0.0).to(tl.float32)
    inside = (token >= 0) & (token < vocab)
    return token, prob, there & inside, there & ~inside


@triton.jit
def descends(ids, begin, end, K: tl.constexpr):
    """1 unless the ids of a row ascend strictly, which rules repeats out."""
    lane = tl.arange(0, K)
    descents = tl.zeros([K], tl.int32)
    for first in range(begin + 1, end, K):
        there = first + lane < end
        here = tl.load(ids + first + lane, mask=there, other=0)
        before = tl.load(ids + first + lane - 1, mask=there, other=-1)
        descents += (there & (here <= before)).to(tl.int32)
    return tl.max(descents, 0)


@triton.jit
def pairs_repeat(ids, begin, end, FEW: tl.constexpr):
    """1 if an id occurs twice among at most FEW entries: each is compared with each."""
    few = tl.arange(0, FEW)
    there = begin + few < end
    one = tl.load(ids + begin + few, mask=there, other=-1)
    # -1 pads one side and -2 the other: padding equals nothing.
    other = tl.where(there, one, -2)
    same = (one[:, None] == other[None, :]) & (few[:, None] != few[None, :])
    return tl.max(tl.max(same.to(tl.int32), 1), 0)


@triton.jit
def sort_repeats(token, usable, K: tl.constexpr):
    """1 if an id occurs twice among K entries, by sorting them."""
    lane = tl.arange(0, K)
    keys = tl.sort(tl.where(usable, token, -1 - lane))
    following = tl.gather(keys, tl.minimum(lane + 1, K - 1), 0)
    return tl.max(((keys == following) & (lane < K - 1)).to(tl.int32), 0)


@triton.jit
def marks_repeat(g, token, usable, K: tl.constexpr):
    """1 if an id occurs twice among K entries, by leaving each entry's number at its place in the
    gradient row, which the corrections will overwrite: where two meet, one finds the other's."""
    lane = tl.arange(0, K)
    if g.dtype.element_ty == tl.float32:
        place = g.to(tl.pointer_type(tl.int32), bitcast=True) + token
    else:
        place = g.to(tl.pointer_type(tl.int16), bitcast=True) + token
    tl.store(place, lane.to(place.dtype.element_ty), mask=usable)
    tl.debug_barrier()
    found = tl.load(place, mask=usable, other=0).to(tl.int32)
    repeats = tl.max((usable & (found != lane)).to(tl.int32), 0)
    tl.debug_barrier()  # no correction before every mark has been read
    return repeats


@triton.jit
def id_mass(token, prob, ids, probs, begin, end, repeats, K: tl.constexpr, STEP: tl.constexpr):
    """For each of K entries the probability of its id in the whole row, added up in the same order
    for every entry of that id, so that equal ids get equal bits."""
    mass = prob
    if repeats > 0:
        mass = tl.zeros([K], tl.float32)
        for first in range(begin, end, STEP):
            at = first + tl.arange(0, STEP)
            there = at < end
            other = tl.load(ids + at, mask=there, other=-1)
            p = tl.load(probs + at, mask=there, other=0.0).to(tl.float32)
            mass += tl.sum(tl.where(token[:, None] == other[None, :], p[None, :], 0.0), 1)
    return mass


@triton.jit
def kl_terms(prob, mass, z, usable, highest, log_s):
    """Shares of the entries in sum_j p_j (log p_j - log q_j); an entry that repeats an id has the
    share of its own probability."""
    # log of a subnormal may be taken of 0 instead; its product with p is nothing either way.
    entropy = tl.log(tl.maximum(mass, TINY))
    share = prob * ((entropy - (z - highest)) + log_s)
    share = tl.where(prob == 0, 0.0, share)
    share = tl.where(mass > 0, share, tl.where(mass == 0, 0.0, float("nan")))
    return tl.sum(tl.where(usable, share, 0.0), 0)


@triton.jit
def write_softmax(xb, gb, readable, body, highest, scale, LANES: tl.constexpr, VEC: tl.constexpr):
    """gb[:body] = scale * exp(xb - highest); 0 where nothing is readable (an ignored row)."""
    columns = tile_columns(LANES, VEC)
    for start in range(0, body, LANES * VEC):
        at = start + columns
        z = tl.load(
            xb + at, mask=at < readable, other=-float("inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        g = scale * tl.exp2((z - highest) * LOG2E)
        tl.store(gb + at, g.to(gb.dtype.element_ty), mask=at < body, eviction_policy="evict_first")


@triton.jit
def correct(g, token, mass, z, usable, label, highest, scale, kl_coef):
    """The gradient at the targets, in fp32 from the logits, rounded once. Entries of one id write
    the same bits; the label's entry is written by `correct_label` alone."""
    value = scale * tl.exp2((z - highest) * LOG2E) - kl_coef * mass
    tl.store(g + token, value.to(g.dtype.element_ty), mask=usable & (token != label))


@triton.jit
def correct_label(g, label, mass, z, highest, scale, kl_coef, ce_coef):
    value = scale * tl.exp2((z - highest) * LOG2E) - kl_coef * mass - ce_coef
    tl.store(g + label, value.to(g.dtype.element_ty), mask=label >= 0)
