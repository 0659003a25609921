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
    """Partial sums (wrapping) of an int32 vector; nothing else is written."""
    programs = triton.cdiv(words.numel(), BLOCK * STEPS)
    result = torch.empty(programs, dtype=torch.int32, device=words.device)
    _read[(programs,)](words, result, words.numel(), BLOCK, STEPS, num_warps=8)
    return result
