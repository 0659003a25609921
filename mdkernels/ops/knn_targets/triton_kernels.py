"""Triton kernels of knn_targets, two per call: merge the tokens of a row, then sort them and write.
Algorithm, bytes and numerics: README.md, section GPU."""

import torch
import triton
import triton.language as tl

from ..triton_rows import TINY, launching
from . import packing

DTYPES = (torch.float32,)
# Longer rows have not been compiled for every supported GPU, as the compile gate does with these.
LACKS = dict.fromkeys(("over_1024", "over_4096"), "it takes at most 1024 neighbours a row")

FEW = 128  # a row with at most so many distinct tokens takes the small final sort

LAST = tl.constexpr((1 << 63) - 1)  # sorts behind every key
TOP = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _add_equal(token, total, next_token, next_total):
    # Tokens ascend: equal ends mean that the whole right part is that token.
    return next_token, tl.where(token == next_token, total + next_total, next_total)


@triton.jit
def _merge(
    distances, distance_stride, neighbor_ids, id_stride, values, num_values, exclude_ids, scale,
    keys, counts, neighbors,
    P: tl.constexpr,
):  # fmt: skip
    """keys[row, :counts[row]] = one key per token that sorts by descending probability, then by
    ascending token; counts[row] = -1 for a row with a fault."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, P)
    there = lane < neighbors
    ids = tl.load(neighbor_ids + row * id_stride + lane, mask=there, other=-1).to(tl.int64)
    d = tl.load(distances + row * distance_stride + lane, mask=there, other=float("inf"))
    inside = (ids >= 0) & (ids < num_values)
    token = tl.load(values + ids, mask=inside, other=0).to(tl.int64)
    fault = (ids < -1) | (ids >= num_values) | (token < 0) | (token > TOP)
    usable = inside
    if exclude_ids is not None:
        usable = usable & (ids != tl.load(exclude_ids + row))
    fault = fault | (usable & ~(d > -float("inf")))
    faults = tl.max(fault.to(tl.int32), 0)

    d = tl.where(usable, d, float("inf"))
    nearest = tl.min(d, 0)
    nearest = tl.where(nearest < float("inf"), nearest, 0.0)
    weight = tl.exp2((nearest - d) * scale)
    bits = weight.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.sort(tl.where(weight >= TINY, (token << 32) | bits, LAST))

    following = tl.gather(key, tl.minimum(lane + 1, P - 1), 0)
    token = key >> 32
    weight = (key & TOP).to(tl.int32).to(tl.float32, bitcast=True)
    weight = tl.where(key != LAST, weight, 0.0).to(tl.float64)
    _, mass = tl.associative_scan((token, weight), 0, _add_equal)
    total = tl.sum(weight, 0)
    p = (mass * (1.0 / tl.where(total > 0, total, 1.0))).to(tl.float32)
    # LAST has the high half of the largest token, so the comparison of tokens is not enough.
    end = (following >> 32 != token) | (following == LAST) | (lane == P - 1)
    kept = ((key != LAST) & end & (p >= TINY)).to(tl.int32)
    place = tl.cumsum(kept, 0) - 1
    ranked = ((p.to(tl.int32, bitcast=True) ^ TOP).to(tl.int64) << 32) | token
    tl.store(keys + row * neighbors + place, ranked, mask=kept > faults)
    tl.store(counts + row, tl.where(faults > 0, -1, tl.sum(kept, 0)))


@triton.jit
def _write(keys, neighbors, row_offsets, token_ids, probs, above, P: tl.constexpr):
    """Sort and unpack the rows with more than `above` and at most P tokens."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_offsets + row)
    count = tl.load(row_offsets + row + 1) - begin
    if count > above and count <= P:
        lane = tl.arange(0, P)
        there = lane < count
        key = tl.sort(tl.load(keys + row * neighbors + lane, mask=there, other=LAST))
        tl.store(token_ids + begin + lane, (key & TOP).to(tl.int32), mask=there)
        bits = ((key >> 32) ^ TOP).to(tl.int32)
        tl.store(probs + begin + lane, bits.to(tl.float32, bitcast=True), mask=there)


def forward(distances, neighbor_ids, values, temperature, exclude_ids):
    return packing.forward(merge, write, distances, neighbor_ids, values, temperature, exclude_ids)


def merge(distances, neighbor_ids, values, scale, exclude_ids, keys, counts) -> None:
    rows, neighbors = distances.shape
    tile = max(16, triton.next_power_of_2(neighbors))
    with launching("knn_targets", distances):
        _merge[(rows,)](
            distances,
            distances.stride(0),
            neighbor_ids,
            neighbor_ids.stride(0),
            values,
            len(values),
            exclude_ids,
            scale,
            keys,
            counts,
            neighbors,
            P=tile,
            num_warps=_warps(tile),
            enable_fp_fusion=True,
        )


def write(keys, row_offsets, token_ids, probs, most: int) -> None:
    above = 0
    for tile in (FEW, max(FEW, triton.next_power_of_2(max(most, 1)))):
        if above < min(most, tile):
            with launching("knn_targets", keys):
                _write[(len(keys),)](
                    keys,
                    keys.shape[1],
                    row_offsets,
                    token_ids,
                    probs,
                    above,
                    P=tile,
                    num_warps=_warps(tile),
                    enable_fp_fusion=True,
                )
        above = tile


def _warps(tile: int) -> int:
    """Eight keys a thread: more of a sort then happens inside threads and warps."""
    return max(1, min(32, tile // 256))
