"""The mixture kernels in CUDA on the host: every shape of launch a device can get, which the
operator tests, with the widths' own shapes, meet only in part. See cuda_host.sh."""

import cuda_host
import numpy as np
import pytest
import test_logit_mix
import test_mix_argmax
import test_mix_sample
import test_mix_verify
import torch
from mix_fixtures import generator, log, logits, mixture, pair, worst
from mix_sample_oracle import draw

from mdkernels import logit_mix, mix_argmax, mix_sample
from mdkernels.ops.logit_mix import cuda_kernels as kernels
from mdkernels.ops.mix_sample import cuda_kernels as sample_kernels

shims_device = pytest.mark.skipif(
    cuda_host.FROM_PTX, reason="made for another device than the kernels from PTX are told of"
)
pytestmark = pytest.mark.skipif(
    not cuda_host.PATH, reason="needs the kernels compiled for the host: make test-cuda-host"
)

# (threads, blocks of a cluster), the order in which they run, where the scores of a row live: one
# block, shares, more blocks than the row has columns for.
LAUNCHES = [
    ((64, 1), "forwards", "shared"),
    ((64, 2), "backwards", "shared"),
    ((96, 3), "forwards", "scratch"),
    ((32, 8), "backwards", "shared"),
    ((320, 1), "forwards", "scratch"),
]
FILTERS = [
    {},
    {"temperature": 0.4},
    {"top_k": 7},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 60, "top_p": 0.9, "min_p": 0.01},
]


@pytest.fixture(params=LAUNCHES, ids=str)
def launch(request, monkeypatch):
    shape, order, scores = request.param
    monkeypatch.setattr(kernels, "LAUNCH", shape)
    monkeypatch.setenv("MDK_SHIM_ORDER", order)
    if scores == "scratch":
        monkeypatch.setattr(sample_kernels, "HEADER", 1 << 30)


def models(width, seed=0):
    base, memory = pair(3, width, torch.bfloat16, seed, memory_width=width + 9)
    return base, [memory, logits(3, max(width - 3, 1), torch.float16, seed + 5)]


@pytest.mark.parametrize("width", [1, 301, 1030])
def test_mix_and_argmax(launch, width):
    base, memories = models(width)
    weights = torch.tensor([[0.3, 0.2], [0.0, 1.0], [0.6, 0.0]])
    p = mixture(base, memories, weights.numpy(), 1.2)
    options = {"memory_temperature": 1.2, "backend": "cuda"}
    for scale, shift in (("logprob", 0.0), ("base", base.double().logsumexp(1)[:, None])):
        got = logit_mix(base, memories, weights, scale=scale, **options)
        assert worst(got, log(p) + shift) <= 5e-6
    got = mix_argmax(base, memories, weights, **options).numpy()
    assert (p[np.arange(3), got] >= p.max(1) * (1 - 2e-6)).all()


DRAWS = [(301, filters) for filters in FILTERS] + [(1, FILTERS[-1])]


@pytest.mark.parametrize(("width", "filters"), DRAWS, ids=str)
def test_draws(launch, width, filters):
    base, memories = models(width)
    seeds = torch.randint(-(2**62), 2**62, (3,), generator=generator(width))
    p = mixture(base, memories, [0.3, 0.2])
    want, clear = draw(p, seeds.numpy(), np.zeros(3), **filters)
    got = mix_sample(base, memories, [0.3, 0.2], seeds=seeds, backend="cuda", **filters)
    assert torch.equal(got[clear], want[clear])
    assert clear.any()


@pytest.mark.parametrize("launch", LAUNCHES[1:3], indirect=True, ids=str)
@pytest.mark.parametrize("filters", [{"top_p": 0.31}, {"top_k": 40, "top_p": 0.6}, {"top_k": 3}])
def test_ties_across_blocks(launch, filters):
    """Every token of the highest score has the same probability: the id decides who stays."""
    base = torch.zeros(4, 203)
    base[:, ::2] = 4.0
    seeds = torch.arange(4)
    want, clear = draw(mixture(base, base, 0.5), seeds.numpy(), np.zeros(4), **filters)
    got = mix_sample(base, base, 0.5, seeds=seeds, backend="cuda", **filters)
    assert clear.all()
    assert torch.equal(got[clear], want[clear])


def test_verification(launch):
    base, memory = test_mix_verify.case(4, 2, 301, torch.bfloat16, memory_width=310)
    lengths = torch.tensor([2, 0, 2, 1])
    assert test_mix_verify.check(base, memory, 0.4, "cuda", lengths) > 0.7


@pytest.mark.parametrize("launch", LAUNCHES[1:3], indirect=True, ids=str)
def test_verification_against_what_the_filters_keep(launch):
    base, memory = test_mix_verify.case(2, 1, 301, torch.bfloat16, memory_width=310)
    assert test_mix_verify.check(base, memory, 0.4, "cuda", **FILTERS[-1]) == 1


def test_logprobs_and_bad_rows(launch):
    base, memory = pair(4, 301)
    base[1, 300] = torch.nan
    memory[2] = -torch.inf
    tokens = torch.tensor([7, 8, 9, 301])
    out = sample_kernels.logprobs(base, [memory], None, [0.6, 0.4], 1.0, tokens)
    assert out.isnan().tolist() == [
        [False, False, False],
        [True, True, False],
        [True, False, True],
        [True, True, True],
    ]
    want = log(mixture(base[:1], memory[:1], 0.4))[0, 7]
    assert abs(float(out[0, 0]) - float(want)) <= 5e-6
    drawn = mix_sample(base, memory, 0.4, seeds=1, backend="cuda")
    assert drawn[1:3].tolist() == [-1, -1]
    assert (drawn[[0, 3]] >= 0).all()


@pytest.mark.parametrize(
    "test",
    [
        test_logit_mix.test_bad_row_weights,
        test_logit_mix.test_bad_rows_are_nan_and_only_those,
        test_logit_mix.test_row_weights_of_zero_and_one_ignore_nan,
        test_logit_mix.test_several_memories,
        test_mix_argmax.test_rows_without_a_distribution_give_minus_one,
        test_mix_argmax.test_several_memories_row_weights_and_widths,
        test_mix_sample.test_component,
        test_mix_sample.test_logprobs_of_a_list_and_of_a_dropped_model,
        test_mix_sample.test_masks_shifts_row_weights_and_memories,
        test_mix_verify.test_a_memory_of_weight_one_is_always_right,
        test_mix_verify.test_impossible_tokens,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_operators(test):
    """The operators' own tests that the lane would otherwise leave out."""
    test("cuda")


@shims_device
def test_an_a100_keeps_the_scores_in_global_memory(monkeypatch):
    monkeypatch.setenv("MDK_SHIM_DEVICE", "80,4,166912")
    kernels.device.cache_clear()
    base, memory = pair(1, 50257, torch.bfloat16)
    for filters in ({}, {"top_k": 40}):
        want, clear = draw(mixture(base, memory, 0.3), [5], [0], **filters)
        got = mix_sample(base, memory, 0.3, seeds=torch.tensor([5]), backend="cuda", **filters)
        assert clear.all()
        assert torch.equal(got, want)
    kernels.device.cache_clear()


def test_rows_beyond_32_bits():
    """The second row starts 2^31 + 7 elements after the first; untouched memory costs nothing."""
    base, memory = pair(2, 301, torch.bfloat16)
    far = torch.empty(2**31 + 400, dtype=torch.bfloat16).as_strided((2, 301), (2**31 + 7, 1))
    far.copy_(base)
    assert (
        worst(logit_mix(far, memory, 0.3, backend="cuda"), log(mixture(base, memory, 0.3))) < 5e-6
    )


def test_results_depend_on_no_neighbour():
    base, memory = pair(5, 2600, torch.bfloat16)
    options = {"top_p": 0.9, "backend": "cuda"}
    want = mix_sample(base, memory, 0.3, seeds=torch.arange(5), **options)
    mixed = logit_mix(base, memory, 0.3, backend="cuda")
    for row in (0, 3):
        one = slice(row, row + 1)
        alone = mix_sample(base[one], memory[one], 0.3, seeds=torch.tensor([row]), **options)
        assert torch.equal(alone, want[one])
        assert torch.equal(logit_mix(base[one], memory[one], 0.3, backend="cuda"), mixed[one])


@shims_device
@pytest.mark.parametrize("pieces", [2, 8])
def test_logprobs_depend_on_no_number_of_blocks(pieces, monkeypatch):
    """A row of few has a block per piece, one of many a block for all of them."""
    monkeypatch.setattr(kernels, "LAUNCH", (64, pieces))
    base, memory = pair(30, 1031, torch.bfloat16)
    tokens = torch.arange(30) * 34
    assert [sample_kernels.blocks_of_a_row(base[:n], pieces) for n in (1, 30)] == [pieces, 1]
    many = sample_kernels.logprobs(base, [memory], None, [0.7, 0.3], 1.1, tokens)
    for row in (0, 17, 29):
        one = slice(row, row + 1)
        alone = (base[one], [memory[one]], None, [0.7, 0.3], 1.1, tokens[one])
        assert torch.equal(sample_kernels.logprobs(*alone), many[one])
