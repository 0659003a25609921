"""The mixture seen from its gold log-probabilities: score, best weights, uncertainty.

Everything a mixture scores on a text follows from one number per token and model, so a weight is
fitted, a whole curve drawn and an interval bootstrapped without running a model again. Arithmetic
is fp64 throughout; log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MixFit:
    """Weights that minimise the mean negative log-likelihood of a mixture."""

    weights: tuple[float, ...]
    """One per memory; the base has the rest of 1."""
    nats: float
    """Mean negative log-likelihood at `weights`, per token."""
    iterations: int
    gap: float
    """Upper bound on how far `nats` is above the optimum."""


def check_weights(mix_weight: float | Sequence[float], memories: int) -> tuple[float, ...]:
    """`mix_weight` as one float per memory. Raises ValueError outside the simplex."""
    weights = (mix_weight,) if isinstance(mix_weight, (int, float)) else tuple(mix_weight)
    if len(weights) != memories:
        raise ValueError(
            f"mix_weight: got {len(weights)} weight(s) for {memories} memories; give one each"
        )
    for weight in weights:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"mix_weight must be in [0, 1], got {weight}")
    if sum(weights) > 1.0 + 1e-12:
        raise ValueError(
            f"mix_weight: {list(weights)} sum to {sum(weights):g}; the memories can share at "
            "most 1, the base has the rest"
        )
    return tuple(float(weight) for weight in weights)


def mixture_logprobs(base: Tensor, memories: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log((1 - sum w) p_base + sum_i w_i p_i) per token: (R,) each, fp64 out (paper eq. 7)."""
    rest = max(0.0, 1.0 - math.fsum(weights))
    total = base.double() + _log(rest)
    for memory, weight in zip(memories, weights, strict=True):
        total = torch.logaddexp(total, memory.double() + _log(weight))
    return total


def fit_mix_weight(base: Tensor, memories: Sequence[Tensor]) -> MixFit:
    """The weights in the simplex with the least mean NLL; the problem is convex.

    One memory: safeguarded Newton, a handful of passes. Several: expectation maximisation until its
    optimality gap is below 1e-7 nats (at most 1000 passes; the gap reached is reported). A token
    that every model gives probability 0 has an infinite NLL at any weight and does not vote.
    """
    _check_shapes(base, memories)
    stacked = torch.stack([base.double(), *[memory.double() for memory in memories]])
    peak = stacked.amax(0)
    votes = peak > -math.inf
    # Likelihoods relative to the best model of each token: no underflow, and the scale cancels.
    likelihoods = (stacked[:, votes] - peak[votes]).exp()
    if likelihoods.shape[1] == 0:
        raise ValueError("base: no token has a finite log-probability, there is nothing to fit")
    fit = _newton if len(memories) == 1 else _expectation_maximisation
    weights, iterations, gap = fit(likelihoods)
    nats = -float(mixture_logprobs(base, memories, weights).mean())
    return MixFit(weights, nats, iterations, gap)


def _newton(likelihoods: Tensor) -> tuple[tuple[float], int, float]:
    base, memory = likelihoods
    slope = memory - base

    def derivatives(weight: float) -> tuple[float, float]:
        ratio = slope / torch.lerp(base, memory, weight)
        return -float(ratio.mean()), float(ratio.square().mean())

    low, high, weight, iterations = 0.0, 1.0, 0.5, 0
    for end, outward in ((0.0, -1.0), (1.0, 1.0)):
        gradient, _ = derivatives(end)
        if gradient * outward <= 0.0:
            return (end,), 1, 0.0
    gap = math.inf
    while iterations < 100:
        iterations += 1
        gradient, curvature = derivatives(weight)
        # Convexity: the optimum lies within [low, high], so this bounds what is left to gain.
        gap = abs(gradient) * (high - low)
        if gap < 1e-13:
            break
        if gradient > 0.0:
            high = weight
        else:
            low = weight
        step = weight - gradient / curvature
        weight = step if low < step < high else (low + high) / 2
    return (weight,), iterations, gap


def _expectation_maximisation(likelihoods: Tensor) -> tuple[tuple[float, ...], int, float]:
    models = len(likelihoods)
    weights = torch.full((models,), 1.0 / models, dtype=torch.float64)
    gap, iterations = math.inf, 0
    while gap > 1e-7 and iterations < 1000:
        iterations += 1
        gains = (likelihoods / (weights @ likelihoods)).mean(1)
        # log(max gain) bounds the excess of the current NLL: Cover's bound for log-optimal
        # portfolios.
        gap = math.log(float(gains.max()))
        if gap > 1e-7:
            weights = weights * gains
            weights /= weights.sum()
    return tuple(weights[1:].tolist()), iterations, max(gap, 0.0)


def weight_curve(base: Tensor, memories: Sequence[Tensor], points: int = 21) -> list[list[float]]:
    """[[w, mean NLL in nats]] for w from 0 to 1, the memories sharing w equally."""
    shared = [i / (points - 1) for i in range(points)]
    count = len(memories)
    return [
        [w, -float(mixture_logprobs(base, memories, [w / count] * count).mean())] for w in shared
    ]


def paired_interval(
    difference: Tensor,
    *,
    block: int = 4096,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of a per-token difference of two runs: percentile block bootstrap.

    Neighbouring tokens share context, so blocks of `block` tokens are resampled; texts with fewer
    than 20 blocks use R / 20 tokens each. It covers the choice of test text, not the training seed.
    """
    values = difference.double().numpy()
    if values.size == 0:
        raise ValueError("difference: no token to compare")
    block = max(1, min(block, values.size // 20))
    starts = np.arange(0, values.size, block)
    sums = np.add.reduceat(values, starts)
    sizes = np.diff(np.append(starts, values.size))
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0.0 else -math.inf


def _check_shapes(base: Tensor, memories: Sequence[Tensor]) -> None:
    if not memories:
        raise ValueError("memories: need at least one memory to fit a weight, got none")
    for i, memory in enumerate(memories):
        if memory.shape != base.shape or base.dim() != 1:
            raise ValueError(
                f"memories[{i}]: expected one log-probability per token as in base "
                f"{tuple(base.shape)}, got {tuple(memory.shape)}"
            )
