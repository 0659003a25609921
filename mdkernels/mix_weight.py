"""The mixture seen from its gold log-probabilities: its score at any weights, and the best ones.

Everything a mixture scores on a text follows from one number per token and model, so a weight is
fitted and a whole curve drawn without running a model again. Arithmetic
is fp64 throughout; log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ops.logit_mix.arguments import WEIGHT_SLACK


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
    try:
        given = (mix_weight,) if isinstance(mix_weight, (int, float)) else mix_weight
        weights = tuple(float(weight) for weight in given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mix_weight: expected a number or one for each memory, got {mix_weight!r}"
        ) from error
    if len(weights) != memories:
        raise ValueError(
            f"mix_weight: got {len(weights)} weight(s) for {memories} memories; give one each"
        )
    for weight in weights:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"mix_weight must be in [0, 1], got {weight}")
    if sum(weights) > 1.0 + WEIGHT_SLACK:
        raise ValueError(
            f"mix_weight: {list(weights)} sum to {sum(weights):g}; the memories can share at "
            "most 1, the base has the rest"
        )
    return weights


def mixture_logprobs(base: Tensor, memories: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log((1 - sum w) p_base + sum_i w_i p_i) per token: (R,) each, fp64 out (paper eq. 7)."""
    rest = max(0.0, 1.0 - math.fsum(weights))
    total = base.double() + _log(rest)
    for memory, weight in zip(memories, weights, strict=True):
        total = torch.logaddexp(total, memory.double() + _log(weight))
    return total


def fit_mix_weight(base: Tensor, memories: Sequence[Tensor]) -> MixFit:
    """The weights in the simplex with the least mean NLL; the problem is convex.

    One memory: Newton on the derivative, kept between the bounds that its sign has proved. Several:
    Newton on the simplex, with halved steps where a whole one does not descend, until the
    optimality gap is below 1e-10 nats (at most 100 passes; the gap reached is reported). A token
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
    fit = _newton if len(memories) == 1 else _newton_on_simplex
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


def _newton_on_simplex(likelihoods: Tensor) -> tuple[tuple[float, ...], int, float]:
    """Sequential quadratic programming on mixture proportions (Kim et al., arXiv:1806.01412)."""
    models, rows = likelihoods.shape
    weights = torch.full((models,), 1.0 / models, dtype=torch.float64)
    mixed = weights @ likelihoods
    gap, iterations = math.inf, 0
    while iterations < 100:
        iterations += 1
        ratios = likelihoods / mixed
        gains = ratios.mean(1)
        # log(max gain) bounds the excess of the current NLL: Cover's bound for log-optimal
        # portfolios.
        gap = max(math.log(float(gains.max())), 0.0)
        if gap < 1e-10:
            break
        # NLL(w) + sum(w) has its minimum over w >= 0 on the simplex, so w >= 0 is all that the
        # quadratic model has to know; its minimum, scaled to the simplex, lies downhill.
        curvature = (ratios @ ratios.T / rows).numpy()
        target = torch.from_numpy(_nonnegative_minimum(curvature, (2.0 * gains - 1.0).numpy()))
        step, nats = target / target.sum() - weights, -float(mixed.log().mean())
        # Close to the optimum a good step gains less than the NLL rounds.
        limit = nats + 1e-15 * max(1.0, abs(nats))
        for halvings in range(50):
            proposed = (weights + step * 0.5**halvings).clamp_(min=0.0)
            mixed = proposed @ likelihoods
            if -float(mixed.log().mean()) <= limit:
                break
        weights = proposed
    return tuple(weights[1:].tolist()), iterations, gap


def _nonnegative_minimum(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """argmin of y A y / 2 - b y over y >= 0, A positive semidefinite: Lawson and Hanson's NNLS."""
    found, free = np.zeros_like(vector), np.zeros(len(vector), dtype=bool)
    for _ in range(3 * len(vector)):
        slope = np.where(free, -np.inf, vector - matrix @ found)
        if slope.max() <= 1e-14:
            break
        free[slope.argmax()] = True
        while True:
            inner = np.zeros_like(vector)
            inner[free] = np.linalg.lstsq(matrix[np.ix_(free, free)], vector[free], rcond=None)[0]
            leaving = free & (inner <= 0.0)
            if not leaving.any():
                break
            way = (found[leaving] / (found[leaving] - inner[leaving])).min()
            found = found + way * (inner - found)
            free &= found > 1e-15
            found[~free] = 0.0
        found = inner
    return found


def weight_curve(
    base: Tensor,
    memories: Sequence[Tensor],
    points: int = 21,
    *,
    shares: Sequence[float] | None = None,
) -> list[list[float]]:
    """[[w, mean NLL in nats]] for w from 0 to 1, the memories' total weight.

    `shares`: in which proportion the memories divide w (default: equally); a fit's weights put its
    optimum on the curve.
    """
    _check_shapes(base, memories)
    shares = [1.0] * len(memories) if shares is None or not any(shares) else list(shares)
    total = math.fsum(shares)
    nothing = torch.full_like(base, -math.inf)
    memory = mixture_logprobs(nothing, memories, [share / total for share in shares])
    base = base.double()
    ends = [-float(base.mean()), -float(memory.mean())]
    peak = torch.maximum(base, memory)
    # Where both are 0, no weight helps: exp(nan) would hide it.
    odds = [(values - peak).exp().nan_to_num_(nan=0.0) for values in (base, memory)]
    level = float(peak.mean())
    inner = [
        [w, -level - float(torch.lerp(*odds, w).log_().mean())]
        for w in (i / (points - 1) for i in range(1, points - 1))
    ]
    return [[0.0, ends[0]], *inner, [1.0, ends[1]]]


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
