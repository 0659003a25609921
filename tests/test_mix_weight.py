"""Mixture arithmetic on gold log-probabilities, against plain numpy in fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdkernels.mix_weight import (
    check_weights,
    fit_mix_weight,
    mixture_logprobs,
    weight_curve,
)


def logprobs(rows, seed, scale=3.0):
    """Gold log-probs of an imaginary model: mostly poor, sometimes near 0."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(-rng.exponential(scale, rows)).float()


def naive(base, memories, weights):
    p = (1 - sum(weights)) * np.exp(base.double().numpy())
    for memory, weight in zip(memories, weights, strict=True):
        p = p + weight * np.exp(memory.double().numpy())
    return np.log(p)


@pytest.mark.parametrize("weights", [(0.3,), (0.0,), (1.0,), (0.25, 0.5), (0.0, 1.0)])
def test_mixture_is_the_weighted_sum_of_probabilities(weights):
    base = logprobs(1000, 0)
    memories = [logprobs(1000, i + 1) for i in range(len(weights))]
    ours = mixture_logprobs(base, memories, weights)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), naive(base, memories, weights), rtol=1e-12, atol=1e-12)


def test_probabilities_far_below_the_double_range_do_not_vanish():
    base, memory = torch.tensor([-2000.0]), torch.tensor([-2001.0])
    expected = -2000.0 + math.log(0.5 * (1 + math.exp(-1)))
    assert float(mixture_logprobs(base, [memory], [0.5])) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_newton_finds_the_grid_optimum(seed):
    rng = np.random.default_rng(seed)
    base, memory = logprobs(20000, seed), logprobs(20000, 100 + seed, rng.uniform(1.5, 5))
    fit = fit_mix_weight(base, [memory])
    grid = np.linspace(0, 1, 2001)
    nats = [-naive(base, [memory], [w]).mean() for w in grid]
    assert fit.nats <= min(nats) + 1e-12
    assert abs(fit.weights[0] - grid[int(np.argmin(nats))]) <= 1e-3
    assert fit.iterations < 20
    assert fit.gap < 1e-9


def test_the_optimum_may_be_an_end_of_the_interval():
    base = logprobs(500, 0)
    assert fit_mix_weight(base, [base - 1]).weights == (0.0,)
    assert fit_mix_weight(base, [base + 0.01]).weights == (1.0,)
    assert fit_mix_weight(base, [base]).nats == pytest.approx(-float(base.double().mean()))


def test_tokens_that_only_one_model_knows_keep_the_weight_inside():
    base, memory = logprobs(100, 0), logprobs(100, 1)
    base[3] = memory[7] = -math.inf
    fit = fit_mix_weight(base, [memory])
    assert 0.0 < fit.weights[0] < 1.0
    assert math.isfinite(fit.nats)
    memory[3] = -math.inf
    assert fit_mix_weight(base, [memory]).nats == math.inf
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_mix_weight(torch.tensor([-math.inf]), [torch.tensor([-math.inf])])


def slow_fit(base, memories):
    """(weights, gap) by expectation maximisation: 10000 passes, in plain numpy."""
    p = np.exp(np.stack([base.double().numpy(), *[m.double().numpy() for m in memories]]))
    w = np.full(len(p), 1 / len(p))
    for _ in range(10_000):
        gains = (p / (w @ p)).mean(1)
        w = w * gains
    return w[1:], math.log(gains.max())


@pytest.mark.parametrize("scales", [(3.0, 2.5, 3.5), (3.0, 3.0, 3.0, 3.0), (2.0, 6.0, 2.5)])
def test_several_memories_reach_the_simplex_optimum(scales):
    base, *memories = (logprobs(500, seed, scale) for seed, scale in enumerate(scales))
    fit = fit_mix_weight(base, memories)
    assert fit.gap < 1e-10
    assert fit.iterations < 15
    assert min(fit.weights) >= 0.0
    weights, gap = slow_fit(base, memories)
    assert fit.nats <= -naive(base, memories, weights).mean() + 1e-10
    assert fit.nats == pytest.approx(-naive(base, memories, fit.weights).mean(), abs=1e-12)
    if gap < 1e-9:
        np.testing.assert_allclose(fit.weights, weights, atol=1e-4)
    assert fit.nats <= fit_mix_weight(base, memories[:1]).nats


def test_corners_and_edges_of_the_simplex():
    base, memory = logprobs(2000, 0), logprobs(2000, 1)
    newton = fit_mix_weight(base, [memory])
    useless = fit_mix_weight(base, [memory, torch.full_like(base, -100.0)])
    assert useless.weights == (pytest.approx(newton.weights[0], abs=1e-6), 0.0)
    assert useless.nats == pytest.approx(newton.nats, abs=1e-10)
    twins = fit_mix_weight(base, [memory, memory])  # any split of the weight will do
    assert sum(twins.weights) == pytest.approx(newton.weights[0], abs=1e-6)
    assert fit_mix_weight(base, [base - 1, base - 2]).weights == (0.0, 0.0)
    assert fit_mix_weight(base, [base - 1, base + 1]).weights == (0.0, 1.0)
    memories = [memory.clone(), logprobs(2000, 2)]
    memories[0][5] = memories[1][5] = base[7] = memories[1][7] = -math.inf
    alone = fit_mix_weight(base, memories)
    assert 0.0 < alone.weights[0] < 1.0
    assert math.isfinite(alone.nats)
    assert alone.gap < 1e-10


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 10**6))
def test_simplex_fit_meets_its_bound(rows, count, seed):
    base, *memories = (logprobs(rows, seed + i, 1.0 + i) for i in range(count + 1))
    fit = fit_mix_weight(base, memories)
    p = np.exp(np.stack([t.double().numpy() for t in (base, *memories)]))
    weights = np.array([1 - sum(fit.weights), *fit.weights])
    gains = (p / (weights @ p)).mean(1)
    assert math.log(gains.max()) < 1e-9  # then no weights are better by more than that
    assert fit.iterations < 100


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_fit_is_never_worse_than_either_end(rows, seed):
    base, memory = logprobs(rows, seed), logprobs(rows, seed + 1)
    fit = fit_mix_weight(base, [memory])
    ends = (-float(base.double().mean()), -float(memory.double().mean()))
    assert fit.nats <= min(ends) + 1e-9


def test_curve_ends_at_the_single_models():
    base, memory = logprobs(300, 0), logprobs(300, 1)
    curve = weight_curve(base, [memory], points=5)
    assert [w for w, _ in curve] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve[0][1] == pytest.approx(-float(base.double().mean()))
    assert curve[-1][1] == pytest.approx(-float(memory.double().mean()))


@pytest.mark.parametrize("shares", [None, (0.2, 0.6), (0.0, 0.0)])
def test_curve_is_the_mixture_at_every_weight(shares):
    base, *memories = (logprobs(300, seed) for seed in range(3))
    base[0], memories[0][1], memories[1][1] = -2000.0, -3000.0, -4000.0
    parts = (0.25, 0.75) if shares == (0.2, 0.6) else (0.5, 0.5)
    for weight, nats in weight_curve(base, memories, shares=shares):
        expected = -mixture_logprobs(base, memories, [weight * part for part in parts]).mean()
        assert nats == pytest.approx(float(expected), rel=1e-12)


def test_a_token_nobody_knows_makes_the_whole_curve_infinite():
    base, memory = logprobs(30, 0), logprobs(30, 1)
    base[4] = memory[4] = -math.inf
    assert {nats for _, nats in weight_curve(base, [memory], points=5)} == {math.inf}


@pytest.mark.parametrize(
    ("weight", "memories", "message"),
    [
        (1.5, 1, r"in \[0, 1\], got 1.5"),
        (float("nan"), 1, "got nan"),
        ([0.6, 0.6], 2, "sum to 1.2"),
        (0.5, 2, r"1 weight\(s\) for 2"),
    ],
)
def test_weights_outside_the_simplex_are_refused(weight, memories, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weight, memories)


def test_weights_that_fp32_rounded_up_are_taken():
    assert sum(check_weights(torch.tensor([0.6, 0.3, 0.1]).tolist(), 3)) > 1.0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"memories\[1\].*\(9,\)"):
        fit_mix_weight(logprobs(10, 0), [logprobs(10, 1), logprobs(9, 2)])
    with pytest.raises(ValueError, match="at least one memory"):
        fit_mix_weight(logprobs(10, 0), [])
