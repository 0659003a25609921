"""Logits of two models on a device, and the float64 mixture, for the three mixing ops."""

import math
from collections.abc import Callable

import torch
from cases import nbytes
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT
from torch import Tensor

from .case import blocks, random_logits

SET_BYTES, MOST_SETS = 128 << 20, 16


class Sets:
    """Several input sets of one shape: a small call is repeated over all of them, so that each
    reads its logits from memory, as a decoding step does after two models ran."""

    def __init__(self, rows: int, vocab: int, dtype: str, device: str, several: bool):
        first = self._pair(rows, vocab, dtype, device, 0)
        count = min(MOST_SETS, max(1, SET_BYTES // nbytes(*first))) if several else 1
        more = [self._pair(rows, vocab, dtype, device, 2 * i) for i in range(1, count)]
        self.pairs: list[tuple[Tensor, Tensor]] = [first, *more]

    @staticmethod
    def _pair(rows, vocab, dtype, device, seed) -> tuple[Tensor, Tensor]:
        return tuple(random_logits(rows, vocab, dtype, seed + i, device) for i in (6, 7))

    @property
    def bytes_per_call(self) -> int:
        return nbytes(*self.pairs[0])

    def bind(self, function: Callable, *rest, **options) -> Callable:
        """function(base, memory, ...) over every set, as decoding calls it; returns all results."""

        def call():
            with torch.no_grad():
                return [function(base, memory, *rest, **options) for base, memory in self.pairs]

        return call


def expected(base: Tensor, memory: Tensor, part: slice) -> Tensor:
    """Mixed log-probabilities of some rows in float64."""
    base, memory = base[part].double(), memory[part].double() / MEMORY_TEMPERATURE
    first = base.log_softmax(1) + math.log(1 - MIX_WEIGHT)
    return torch.logaddexp(first, memory.log_softmax(1) + math.log(MIX_WEIGHT))


def parts(base: Tensor) -> list[slice]:
    return blocks(*base.shape)
