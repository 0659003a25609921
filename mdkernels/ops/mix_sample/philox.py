"""The random numbers of mix_sample and mix_verify in eager torch: Philox4x32-10, keyed by request.

The same bits come out of csrc/cpu/philox.inl; README.md fixes the layout.
"""

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1


# The streams of the high words; the low ones are next to them. The last two are mix_verify's.
TOKENS, COMPONENTS, ACCEPT, RESIDUAL = 0, 2, 4, 6


def exponentials(seeds: Tensor, offsets: Tensor, width: int, stream: int = TOKENS) -> Tensor:
    """(N, width) fp64 Exp(1) variates: E = -log(1 - v), v from 64 bits per token."""
    high = _words(seeds, offsets, stream, width).double()
    low = _words(seeds, offsets, stream + 1, width).double()
    v = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    return -torch.log1p(-v.clamp(max=1.0 - 2.0**-53))


def row_seeds(seed: int, rows: int, device) -> Tensor:
    """(rows,) int64 seeds derived from one number: splitmix64 of its state number `row`."""
    state = _splitmix(seed & _MASK64)
    gamma = 0x9E3779B97F4A7C15
    steps = torch.arange(1, rows + 1, device=device)
    x = steps * _signed(gamma) + _signed(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _words(seeds: Tensor, offsets: Tensor, stream: int, width: int) -> Tensor:
    """(N, width) int64 holding the 32-bit words: token j is word j % 4 of block j // 4."""
    rows, blocks = len(seeds), math.ceil(width / 4)
    k0, k1 = (seeds & _MASK)[:, None], (_shift_right(seeds, 32))[:, None]
    c0 = torch.arange(blocks, device=seeds.device).expand(rows, -1)
    c1 = torch.full_like(c0, stream)
    c2 = (offsets & _MASK)[:, None].expand(-1, blocks)
    c3 = _shift_right(offsets, 32)[:, None].expand(-1, blocks)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1  # int64 wraps around; the 64 bits are those of the product
        c0, c1 = _shift_right(p1, 32) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = _shift_right(p0, 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), 2).reshape(rows, 4 * blocks)[:, :width]


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical, unlike >> on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)
