"""How a token is drawn, checked: the arguments that mix_sample and mix_verify have in common."""

import math

import torch
from torch import Tensor

from .. import checks
from .philox import row_seeds


def sampling(temperature, top_k, top_p, min_p) -> tuple[float, int, float, float]:
    """(temperature, top_k, top_p, min_p), or ValueError or TypeError naming the one at fault."""
    temperature = checks.number("temperature", temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected an int of at least 0 (0: no limit), got {top_k!r}")
    checks.integer("top_k", top_k)
    return (
        temperature,
        top_k,
        checks.probability("top_p", top_p),
        checks.probability("min_p", min_p),
    )


def filtered(top_k: int, top_p: float, min_p: float) -> bool:
    return top_k > 0 or top_p < 1.0 or min_p > 0.0


def plain_streams(seeds, offsets) -> bool:
    """Whether nothing stands between these and their memory: see `logit_mix.arguments.plain`."""
    return not torch.compiler.is_compiling() and all(
        value is None
        or type(value) is int
        or (type(value) is Tensor and not value.is_neg() and not value._is_zerotensor())
        for value in (seeds, offsets)
    )


def streams(seeds, offsets, rows: int, device, drawn: bool = True) -> tuple[Tensor, Tensor]:
    """(rows,) int64 seeds and offsets; an int of the former is expanded to one stream per row,
    some fifteen small operations. Greedy decoding (not `drawn`) has them checked only."""
    if isinstance(seeds, int):
        seeds = (row_seeds if drawn else _no_seeds)(seeds, rows, device)
    else:
        checks.integer_vector("seeds", seeds, rows, device, of="base_logits")
    if offsets is None or isinstance(offsets, int):
        checks.integer("offsets", offsets or 0)
        offsets = torch.full_like(seeds, offsets or 0)
    else:
        checks.integer_vector("offsets", offsets, rows, device, of="base_logits")
    return seeds, offsets


def _no_seeds(seed: int, rows: int, device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device=device)
