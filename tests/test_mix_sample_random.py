"""Are the random numbers of mix_sample good: known answers, frequencies, rare tokens, filters."""

import math

import mix_fixtures
import numpy as np
import pytest
import torch
from mix_fixtures import (
    ON_GPU,
    UNCHECKED,
    fewer,
    generator,
    logit_mix,
    mix_sample,
    mixture,
    needs_cpu,
    pair,
    softmax,
)
from mix_sample_oracle import exponentials, g_test, philox, philox_array, words
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mdkernels.ops.mix_sample import philox as ours
from mdkernels.ops.mix_sample.philox import row_seeds

backend = mix_fixtures.backend
slow_backends = ({"triton", "cuda"} & UNCHECKED) - ON_GPU
ALPHA = 1e-4  # of all the frequency tests together
TESTS = 10  # how many there are, per backend


def test_philox_known_answers():
    """The vectors that Salmon et al. published with Random123."""
    full = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, want in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert philox(counter, key) == want
        assert tuple(int(x) for x in philox_array(counter, key)) == want


def test_torch_philox_is_philox():
    seeds = torch.tensor([0, -1, 2**40 + 5, -(2**63)])
    offsets = torch.tensor([0, 2**33 + 1, -7, 3])
    for stream in (0, 1):
        got = ours._words(seeds, offsets, stream, 11).numpy()
        assert np.array_equal(got, words(seeds, offsets, stream, 11).astype(np.int64))
    got = ours.exponentials(seeds, offsets, 11).numpy()
    assert got == pytest.approx(exponentials(seeds, offsets, 11), rel=1e-12)


def frequencies(base, memory, weight, draws, backend, seed, **filters):
    """Counts per token over `draws` rows that are all the same row."""
    many = (base.expand(draws, -1), memory.expand(draws, -1))
    drawn = mix_sample(*many, weight, seeds=seed, backend=backend, **filters)
    return np.bincount(drawn.numpy(), minlength=base.shape[1])


@pytest.mark.parametrize("width", [2, 97, 1025])
def test_frequencies(backend, width):
    if backend in slow_backends:
        return  # its tokens are those of the specification: test_mix_sample.py
    draws = 1000000 if backend in ON_GPU else 40000 if backend == "cpu" else 10000
    base, memory = pair(1, width, seed=width)
    p = mixture(base, memory, 0.35)[0]
    counts = frequencies(base, memory, 0.35, draws, backend, 1)
    assert g_test(counts, p) > ALPHA / TESTS
    q = p**0.5 / (p**0.5).sum()
    counts = frequencies(base, memory, 0.35, draws, backend, 2, temperature=2.0)
    assert g_test(counts, q) > ALPHA / TESTS
    kept = np.where(p >= np.sort(p)[-2 if width > 2 else -1], p, 0)
    counts = frequencies(base, memory, 0.35, draws, backend, 3, top_k=2 if width > 2 else 1)
    assert (counts[kept == 0] == 0).all()
    if width > 2:
        two = kept > 0
        assert g_test(counts[two], kept[two] / kept.sum()) > ALPHA / TESTS


def test_a_biased_sampler_would_be_noticed():
    base, memory = pair(1, 97)
    p = mixture(base, memory, 0.35)[0]
    biased = p * np.where(np.arange(97) % 2, 1.1, 0.9)
    counts = np.random.default_rng(0).multinomial(40000, biased / biased.sum())
    assert g_test(counts, p) < ALPHA / TESTS


@needs_cpu
def test_frequencies_at_real_width():
    """V = 50257, cells of equal probability."""
    base, memory = pair(1, 50257)
    p = mixture(base, memory, 0.35)[0]
    order = np.argsort(-p)
    cell = np.empty(50257, int)
    cell[order] = np.minimum(np.cumsum(p[order]) * 50, 49).astype(int)
    counts = frequencies(base, memory, 0.35, 4000, "cpu", 5)
    merged = np.bincount(cell, counts, 50)
    assert g_test(merged, np.bincount(cell, p, 50)) > ALPHA / TESTS


@needs_cpu
def test_frequencies_of_components():
    base, memory = pair(1, 97)
    p = mixture(base, memory, 0.35)[0]
    counts = frequencies(base, memory, 0.35, 40000, "cpu", 6, mode="component")
    assert g_test(counts, p) > ALPHA / TESTS


@needs_cpu
def test_successive_offsets_and_seeds_are_independent():
    """Pairs of draws, from one stream at two offsets and from two streams: a 2-D frequency test."""
    base, memory = pair(1, 6)
    rows = 40000
    many = (base.expand(rows, -1), memory.expand(rows, -1), 0.4)
    p = mixture(base, memory, 0.4)[0]
    seeds = torch.arange(rows)
    first = mix_sample(*many, seeds=seeds, offsets=0, backend="cpu").numpy()
    later = mix_sample(*many, seeds=seeds, offsets=1, backend="cpu").numpy()
    neighbour = mix_sample(*many, seeds=seeds + 1, offsets=0, backend="cpu").numpy()
    for second in (later, neighbour):
        counts = np.bincount(6 * first + second, minlength=36)
        assert g_test(counts, np.outer(p, p).ravel()) > ALPHA / TESTS


def test_seeds_from_one_number():
    table = torch.stack([row_seeds(seed, 4096, "cpu") for seed in range(-2, 6)])
    assert table.dtype == torch.int64
    assert table.unique().numel() == table.numel()  # streams of different numbers do not overlap
    assert torch.equal(row_seeds(3, 5, "cpu"), row_seeds(3, 9, "cpu")[:5])
    bits = (table[..., None] >> torch.arange(64)) & 1
    assert ((bits.double().mean((0, 1)) - 0.5).abs() < 5 * 0.5 / math.sqrt(table.numel())).all()


@pytest.mark.interpreted(backend="triton")
def test_rare_tokens_are_resolved_to_the_last_bit(backend):
    """Streams whose token 1 has an exponential around 1e-6 or less, beside a token 0 that it beats
    or not by 1e-4: 32 random bits alone could not tell."""
    seeds = np.arange(1 << 21)
    high = philox_array((0, 0, 0, 0), (seeds.astype(np.uint64), np.uint64(0)))[1]
    rare = np.argsort(high)[:8]
    assert (high[rare] < 1 << 15).all()
    e = exponentials(rare, np.zeros(8), 2)
    for factor, winner in ((1 + 1e-4, 1), (1 - 1e-4, 0)):
        base = torch.zeros(8, 2)
        base[:, 1] = torch.from_numpy(np.log(e[:, 1] / e[:, 0] * factor)).float()
        got = mix_sample(base, base, 0.5, seeds=torch.from_numpy(rare), backend=backend)
        assert got.tolist() == [winner] * 8
    one_word = -np.log1p(-high[rare] / 2**32)
    assert (np.abs(one_word / e[:, 1] - 1) > 1e-4).any()  # else this test would show nothing


def huggingface_kept(logprobs, temperature, top_k, top_p, min_p):
    scores = logprobs / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores > -math.inf


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(3, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.0), (10, 0.8, 0.05), (0, 0.99, 0.03)],
)
def test_filters_keep_what_hugging_face_keeps(backend, temperature, top_k, top_p, min_p):
    """Every kept token that is not too rare turns up, and no other one does."""
    rows, draws = fewer(backend, 6, 1), fewer(backend, 1500, 12)
    base, memory = pair(rows, 40, seed=top_k)
    kept = huggingface_kept(
        logit_mix(base, memory, 0.4, backend="reference"), temperature, top_k, top_p, min_p
    )
    repeated = [x.repeat_interleave(draws, 0) for x in (base, memory)]
    drawn = mix_sample(
        *repeated,
        0.4,
        seeds=11,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        backend=backend,
    ).view(rows, draws)
    q = torch.from_numpy(mixture(base, memory, 0.4)) ** (1 / temperature)
    q = (q * kept) / (q * kept).sum(1, keepdim=True)
    for row in range(rows):
        seen = torch.bincount(drawn[row], minlength=40) > 0
        assert not (seen & ~kept[row]).any()
        common = 30 / draws  # missed with probability 1e-13 each
        assert seen[q[row] > common].all()


def test_a_memory_of_weight_one_is_sampled_alone(backend):
    base, memory = pair(1, 300)
    bad = torch.full_like(base, math.nan)
    draws = fewer(backend, 5000, 60)
    seeds = torch.randint(0, 2**60, (draws,), generator=generator(2))
    got = mix_sample(
        bad.expand(draws, -1), memory.expand(draws, -1), 1.0, seeds=seeds, backend=backend
    )
    assert g_test(np.bincount(got.numpy(), minlength=300), softmax(memory)[0]) > ALPHA / TESTS
