"""The two models' logits, and the float64 mixture, for the three mixing ops."""

import math

import torch
from cases import random_logits
from torch import Tensor

MIX_WEIGHT = 0.25
MEMORY_TEMPERATURE = 1.3
BATCHES = {"full": (1, 8, 32), "smoke": (1, 3)}
VOCABS = {"full": (50257, 151936), "smoke": (1001,)}


class Pair:
    """Base and memory logits of B sequences. `refresh` rewrites both before every sample, as two
    models would have done a moment ago; a sample of several calls then finds them in cache, which
    is where one decoding step leaves them too (B=32 V=151936 fp32 is 19 MB each and is not)."""

    def __init__(self, batch: int, vocab: int, dtype: str):
        self.pristine = [random_logits(batch, vocab, dtype, seed) for seed in (6, 7)]
        self.base, self.memory = (tensor.clone() for tensor in self.pristine)

    def refresh(self) -> None:
        self.base.copy_(self.pristine[0])
        self.memory.copy_(self.pristine[1])

    def expected(self) -> Tensor:
        """Mixed log-probabilities in float64."""
        base, memory = (tensor.double() for tensor in self.pristine)
        memory = memory / MEMORY_TEMPERATURE
        parts = (
            base - base.logsumexp(1, keepdim=True) + math.log(1 - MIX_WEIGHT),
            memory - memory.logsumexp(1, keepdim=True) + math.log(MIX_WEIGHT),
        )
        return torch.logaddexp(*parts)

    def bind(self, function, *rest, **options):
        """function(base, memory, ...) as a callable without arguments, as decoding calls it."""

        def call():
            with torch.no_grad():
                return function(self.base, self.memory, *rest, **options)

        return call


def shapes(suite: str):
    """(batch, vocab, dtype) of every case."""
    for vocab in VOCABS[suite]:
        for batch in BATCHES[suite]:
            for dtype in ("fp32", "bf16"):
                yield batch, vocab, dtype
