"""Device functions and launch glue shared by the Triton kernels that read whole rows of logits.

A row is a head that ends at the first 16-byte boundary, a body of whole 16-byte vectors and a tail.
Head and tail are together fewer than two vectors, the "edge", and sit in registers from the start;
the body is read in (LANES, VEC) tiles, VEC elements of one thread being one 16-byte access. Without
the split no row of an odd vocabulary (50257) could be read by more than one element at a time.
"""

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # as first maximum: -inf - LOWEST is no NaN
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32


def vector(dtype: torch.dtype) -> int:
    """Elements of one 16-byte access."""
    return 16 // dtype.itemsize


@contextlib.contextmanager
def launching(op: str, tensor: Tensor):
    """Launch on the device of `tensor`, whichever is current; a failure names the operator. What an
    argument check raises passes through."""
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    try:
        with device:
            yield
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"{op} (backend 'triton'): the kernel did not compile or launch: {error}"
        ) from error


@triton.jit
def split_row(x, vocab, VEC: tl.constexpr):
    """(head, body) of the row at `x`: elements before the first 16-byte boundary, and in whole
    vectors after it."""
    SIZE: tl.constexpr = 16 // VEC
    misaligned = (x.to(tl.int64) // SIZE) % VEC
    head = tl.minimum((VEC - misaligned) % VEC, vocab).to(tl.int32)
    body = (vocab - head) // VEC * VEC
    return head, tl.multiple_of(body, VEC)


@triton.jit
def edge_columns(head, body, vocab, VEC: tl.constexpr):
    """(columns, mask) of the head and the tail."""
    lane = tl.arange(0, 2 * VEC)
    column = tl.where(lane < VEC, lane, head + body + lane - VEC)
    return column, tl.where(lane < VEC, lane < head, column < vocab)


@triton.jit
def tile_columns(LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def max_and_sum(xb, limit, edge, LANES: tl.constexpr, VEC: tl.constexpr):
    """(m, s) with sum_j exp z_j = s exp m over the body `xb[:limit]` and the edge.

    One pass. Every lane has a maximum and a sum of its own, so that lanes meet once, at the end;
    a lane rescales once per VEC exponentials. NaN anywhere makes s NaN, +inf too.
    """
    columns = tile_columns(LANES, VEC)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    for start in range(0, limit, LANES * VEC):
        at = start + columns
        # The second pass should find the row in the second-level cache.
        z = tl.load(xb + at, mask=at < limit, other=-float("inf"), eviction_policy="evict_last")
        z = z.to(tl.float32)
        top = tl.maximum(m, tl.max(z, 1))
        part = tl.sum(tl.exp2((z - top[:, None]) * LOG2E), 1)
        s = s * tl.exp2((m - top) * LOG2E) + part
        m = top
    highest = tl.maximum(tl.max(m, 0), tl.max(edge, 0))
    total = tl.sum(s * tl.exp2((m - highest) * LOG2E), 0)
    return highest, total + tl.sum(tl.exp2((edge - highest) * LOG2E), 0)


@triton.jit
def log_of_sum(s):
    """log s in fp64 to 2^-25 absolute: the exponent is exact, so only the logarithm of the mantissa
    (at most 0.35) is an fp32 one. fp64 logarithms would cost every thread of the row."""
    bits = s.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    above = mantissa > 1.4142135
    mantissa = tl.where(above, mantissa * 0.5, mantissa)
    exponent = tl.where(above, exponent + 1, exponent)
    split = exponent.to(tl.float64) * tl.full((), LN2, tl.float64) + tl.log(mantissa).to(tl.float64)
    return tl.where((s > 0) & (s < float("inf")), split, tl.log(s).to(tl.float64))
