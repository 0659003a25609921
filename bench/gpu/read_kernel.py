"""A Triton kernel that only reads: torch's own reductions may not reach the memory's speed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 8192, 4


@triton.jit
def _read(source, result, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for step in tl.static_range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < count, other=0)
    tl.store(result + tl.program_id(0), tl.sum(total, 0))


def read(words: Tensor) -> Tensor:
    """Partial sums (wrapping) of an int32 vector, but for the last 15 elements: only a multiple of
    16 lets the compiler load 16 bytes at a time under the mask."""
    count = words.numel() // 16 * 16
    programs = max(1, triton.cdiv(count, BLOCK * STEPS))
    result = torch.empty(programs, dtype=torch.int32, device=words.device)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    _read[(programs,)](words, result, count, BLOCK, STEPS, **options)
    return result
