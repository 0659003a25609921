"""mix_verify against the float64 verification of mix_verify_oracle.py: every token, row by row."""

import math

import mix_fixtures
import numpy as np
import pytest
import torch
from helpers import threads
from mix_fixtures import (
    DTYPES,
    UNCHECKED,
    fewer,
    generator,
    mix_argmax,
    mix_sample,
    mix_verify,
    needs_cpu,
    no_cuda_here,
    pair,
    place,
    same_after_fork,
)
from mix_verify_oracle import distributions, drafts, verify

import mdkernels
from mdkernels import BackendUnavailable

backend = mix_fixtures.backend
FILTERS = {
    "plain": {},
    "draft_temperature": {"draft_temperature": 1.6},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


def case(batch, drafted, width, dtype=torch.float32, seed=0, memory_width=None):
    """(base, memory) of all places."""
    flat = pair(batch * (drafted + 1), width, dtype, seed, memory_width)
    return [x.view(batch, drafted + 1, -1) for x in flat]


def streams(batch, seed=0):
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator(seed))
    return seeds, torch.randint(0, 2**40, (batch,), generator=generator(seed + 1))


def lengths_of(batch, drafted, seed=0):
    return torch.randint(0, drafted + 1, (batch,), generator=generator(seed))


def check(base, memories, weights, backend, lengths=None, draft=0, seed=0, **options):
    """Counts and tokens are the oracle's wherever its float64 decisions are not within rounding."""
    batch, drafted = len(base), base.shape[1] - 1
    filters = {k: x for k, x in options.items() if k in ("temperature", "top_k", "top_p", "min_p")}
    memory_temperature = options.get("memory_temperature", 1.0)
    draft_temperature = options.get(
        "draft_temperature", memory_temperature * filters.get("temperature", 1.0)
    )
    v, q = distributions(base, memories, weights, draft_temperature, memory_temperature, draft)
    seeds, offsets = streams(batch, seed)
    ids = drafts(q, seed)
    options |= {"seeds": seeds, "offsets": offsets, "draft_memory": draft, "backend": backend}
    got = mix_verify(base, memories, weights, ids, draft_lengths=lengths, **options)
    full = torch.full((batch,), drafted) if lengths is None else lengths
    accepted, tokens, clear = verify(
        v, q, ids.numpy(), full.numpy(), seeds.numpy(), offsets.numpy(), **filters
    )
    assert got.num_accepted.dtype == got.tokens.dtype == torch.int64
    assert torch.equal(got.num_accepted[clear], accepted[clear])
    assert torch.equal(got.tokens[clear], tokens[clear])
    return clear.double().mean()


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.interpreted(
    backend="triton",
    filters=[{}, {"temperature": 0.6}, FILTERS["top_p"], FILTERS["all"]],
)
def test_emits_the_tokens_of_the_specification(backend, filters):
    batch = fewer(backend, 150, 3)
    base, memory = case(batch, 4, 157, seed=3)
    lengths = lengths_of(batch, 4)
    assert check(base, memory, 0.4, backend, lengths, memory_temperature=1.2, **filters) > 0.95


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 2049, 5003])
@pytest.mark.interpreted(backend="triton", dtype=torch.float32, width=[1, 2049])
def test_widths_and_dtypes(backend, dtype, width):
    base, memory = case(fewer(backend, 5, 2), 2, width, dtype)
    for options in ({}, {"temperature": 0.7, "top_p": 0.9}, {"draft_temperature": 2.0}):
        check(base, memory, 0.3, backend, **options)


@pytest.mark.interpreted(backend="triton")
def test_models_of_other_widths_weights_and_layouts(backend):
    """What only the base has is in the residual; what only the memory has can be drafted."""
    batch = fewer(backend, 60, 2)
    for widths in ((300, 270), (270, 300)):
        base, memory = case(batch, 2, widths[0], torch.bfloat16, memory_width=widths[1])
        check(base, memory, torch.linspace(0, 1, batch), backend, draft_temperature=1.4)
        second = case(batch, 2, 281, seed=5)[0]
        table = torch.rand(batch, 2, generator=generator(1)) / 2
        for draft in (0, 1):
            check(base, [memory, second], table, backend, draft=draft)
        check(base, [memory, second], [0.5, 0.0], backend, draft=1, memory_temperature=0.8)
        check(base[:, :2], memory.transpose(0, 1).contiguous().transpose(0, 1)[:, :2], 0.4, backend)


@pytest.mark.interpreted(backend="triton")
def test_a_memory_of_weight_one_is_always_right(backend):
    batch = fewer(backend, 200, 6)
    base, memory = case(batch, 3, 301)
    ids = drafts(distributions(base, memory, 1.0, 1.3)[1], 2)
    bad = torch.full_like(base, math.nan)
    for weight in (1.0, torch.ones(batch)):
        got = mix_verify(bad, memory, weight, ids, seeds=1, memory_temperature=1.3, backend=backend)
        assert (got.num_accepted == 3).all()
        assert torch.equal(got.tokens[:, :3], ids)


@pytest.mark.interpreted(backend="triton")
def test_a_row_without_draft_is_sampled(backend):
    batch = fewer(backend, 40, 5)
    base, memory = case(batch, 2, 301)
    seeds, offsets = streams(batch)
    ids = torch.full((batch, 2), -7)  # never looked at
    options = {"seeds": seeds, "offsets": offsets, "temperature": 0.8, "backend": backend}
    got = mix_verify(base, memory, 0.3, ids, draft_lengths=torch.zeros_like(seeds), **options)
    want = mix_sample(base[:, 0], memory[:, 0], 0.3, **options)
    assert torch.equal(got.tokens[:, 0], want)
    assert (got.tokens[:, 1:] == -1).all()
    assert not got.num_accepted.any()
    got = mix_verify(base[:, :1], memory[:, :1], 0.3, ids[:, :0], **options)
    assert torch.equal(got.tokens[:, 0], want)


@pytest.mark.interpreted(backend="triton")
def test_impossible_tokens(backend):
    """0 / 0 is a rejection, v / 0 is not; and a residual of nothing is the target."""
    base, memory = case(fewer(backend, 50, 4), 1, 40)
    batch, (seeds, offsets) = len(base), streams(len(base))
    base[:, 0, 7] = memory[:, 0, 7] = memory[:, 0, 9] = -math.inf
    options = {"seeds": seeds, "offsets": offsets, "backend": backend}
    seven, nine = (torch.full((batch, 1), x) for x in (7, 9))
    got = mix_verify(base, memory, 0.5, seven, **options)
    assert not got.num_accepted.any()
    assert (got.tokens[:, 0] != 7).all()
    assert (mix_verify(base, memory, 0.5, nine, **options).num_accepted == 1).all()
    got = mix_verify(base, memory, 1.0, seven, **options)
    assert not got.num_accepted.any()
    assert (got.tokens[:, 0] >= 0).all()
    assert (~torch.isin(got.tokens[:, 0], torch.tensor([7, 9]))).all()
    assert len(got.tokens[:, 0].unique()) > batch // 10
    best = base[:, 0].argmax(1)
    got = mix_verify(base, base, 0.5, seven, top_k=1, **options)  # a filter leaves one token
    assert torch.equal(got.tokens[:, 0], best)
    got = mix_verify(base, base, 0.5, best[:, None], top_p=0.0, **options)
    assert torch.equal(got.tokens[:, 0], best)
    assert (got.num_accepted == 1).all()


def greedy_tables(states, seed):
    return [x * 2 for x in pair(states, states, seed=seed)]


@pytest.mark.interpreted(backend="triton")
def test_greedy_speculation_is_greedy_decoding(backend):
    """Next-token logits that depend on the last token: the memory drafts, the mixture verifies."""
    states, batch, drafted = 23, fewer(backend, 40, 6), 4
    base, memory = greedy_tables(states, 1)
    best = mix_argmax(base, memory, 0.4, backend=backend)
    start = torch.arange(batch) % states
    context = [start]
    for _ in range(drafted):
        context.append(memory[context[-1]].argmax(1))
    context = torch.stack(context, 1)
    lengths = lengths_of(batch, drafted)
    got = mix_verify(
        base[context],
        memory[context],
        0.4,
        context[:, 1:],
        draft_lengths=lengths,
        seeds=0,
        temperature=0.0,
        top_k=5,
        backend=backend,
    )
    for row in range(batch):
        token, emitted = start[row], []
        i = int(got.num_accepted[row])
        for _ in range(i + 1):
            token = best[token]
            emitted.append(int(token))
        assert got.tokens[row].tolist() == emitted + [-1] * (drafted + 1 - len(emitted))
        stopped = i < lengths[row]
        assert not stopped or emitted[i] != context[row, i + 1]
        assert i <= lengths[row]
    assert 0 < got.num_accepted.sum() < lengths.sum()


@pytest.mark.interpreted(backend="triton")
def test_tokens_depend_on_their_own_row_only(backend):
    batch = fewer(backend, 30, 3)
    base, memory = case(batch, 3, 700)
    ids = drafts(distributions(base, memory, 0.3, 1.0)[1], 0)
    seeds, offsets = streams(batch)
    every = (base, memory, ids, lengths_of(batch, 3), seeds, offsets)

    def run(rows):
        b, m, x, n, s, o = (item[rows] for item in every)
        options = {"seeds": s, "offsets": o, "top_p": 0.95, "backend": backend}
        return mix_verify(b, m, 0.3, x, draft_lengths=n, **options)

    want = run(slice(None))
    order = torch.randperm(batch, generator=generator(0))
    for rows in (order, slice(2, 3)):
        for got, all_of_it in zip(run(rows), want, strict=True):
            assert torch.equal(got, all_of_it[rows])


@needs_cpu
@pytest.mark.parametrize("filters", [{}, FILTERS["all"], {"temperature": 0.0}])
def test_threads_and_forks_agree(filters):
    base, memory = case(3, 2, 50257, torch.bfloat16)
    ids = drafts(distributions(base, memory, 0.3, filters.get("temperature") or 1.0)[1], 0)
    options = {"backend": "cpu", **filters}
    seeds = torch.arange(3)
    with threads(1):
        want = mix_verify(base, memory, 0.3, ids, seeds=seeds, **options)
    with threads(2):
        for rows in (slice(0, 3), slice(1, 2)):
            args = (base[rows], memory[rows], 0.3, ids[rows])
            got = mix_verify(*args, seeds=seeds[rows], **options)
            assert torch.equal(got.tokens, want.tokens[rows])
        assert same_after_fork(lambda: mix_verify(*args, seeds=seeds[rows], **options).tokens)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.interpreted(backend="triton", greedy=False)
def test_places_without_a_distribution(backend, greedy):
    """They matter only if they are reached."""
    base, memory = case(3, 2, 90)
    memory[0] = base[0]
    ids = memory[:, :2].argmax(2)
    base[1, 0] = -60.0
    base[1, 0, (ids[1, 0] + 1) % 90] = 60.0  # another token for sure
    memory[1, 0, ids[1, 0]] += 20.0
    base[1, 1:] = math.nan
    options = {"seeds": 1, "temperature": 0.0 if greedy else 1.0, "backend": backend}
    got = mix_verify(base[:2], memory[:2], 1e-6, ids[:2], **options)
    assert got.num_accepted[1] == 0
    assert got.tokens[1].tolist() == [int(ids[1, 0] + 1) % 90, -1, -1]
    base[0, 2, 5] = math.nan
    if backend in UNCHECKED:
        nothing = torch.full_like(base[:1], math.nan)
        for filters in ({}, {"top_k": 60, "top_p": 0.99}):
            got = mix_verify(base[:2], memory[:2], 1e-6, ids[:2], **options, **filters)
            end = got.tokens[0, got.num_accepted[0]]
            assert end == -1 if got.num_accepted[0] == 2 else end >= 0
            for draft in (0, -1):  # neither stands for a token that nothing asks for
                draft_ids = torch.full((1, 2), draft)
                got = mix_verify(nothing, memory[:1], 0.5, draft_ids, **options, **filters)
                assert got.num_accepted.tolist() == [0]
                assert got.tokens.tolist() == [[-1, -1, -1]]
        return
    always = {"mix_weight": 1e-6, "draft_ids": base[:1, :2].argmax(2), **options}
    one = [x[:1] * 30 for x in (base, memory)]  # peaked: all are accepted
    with pytest.raises(ValueError, match="row 0 at place 2 holds NaN"):
        mix_verify(*one, **always)
    if not greedy:
        memory[0, 0] = math.nan
        with pytest.raises(ValueError, match="row 0 at place 0 holds NaN"):
            mix_verify(base[:1], memory[:1], 0.0, ids[:1], **options)


@pytest.mark.interpreted(backend="triton")
def test_no_rows(backend):
    got = mix_verify(
        torch.zeros(0, 3, 9),
        torch.zeros(0, 3, 9),
        0.5,
        torch.zeros(0, 2, dtype=torch.int64),
        seeds=0,
        backend=backend,
    )
    assert [tuple(x.shape) for x in got] == [(0,), (0, 3)]


@pytest.mark.interpreted(backend="triton")
def test_opcheck_and_compile(backend):
    base, memory = case(2, 2, 33)
    ids, seeds = torch.tensor([[3, 4], [5, 6]]), torch.arange(2)
    base, memory, ids, seeds = place((base, memory, ids, seeds), backend)
    mix = (base.flatten(0, 1), [memory.flatten(0, 1)], None, [0.7, 0.3], 1.0)
    draft = (ids, torch.full_like(seeds, 2), 0, 1.1)
    # Imitated, a search takes its time, and what is looked at here does not depend on it.
    filters = fewer(backend, (10, 0.9, 0.01), (0, 1.0, 0.01))
    torch.library.opcheck(
        torch.ops.mdk.mix_verify_forward.default,
        (*mix, *draft, 0.9, *filters, seeds, seeds, backend),
    )

    def step(b, m, w, x, s):
        options = {"top_p": filters[1], "min_p": 0.01, "backend": backend}
        return mdkernels.mix_verify(b, m, w, x, seeds=s, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    weights = torch.full_like(seeds, 0.3, dtype=torch.float32)
    for s in (seeds, 7):
        args = (base, memory, weights, ids, s)
        for got, want in zip(compiled(*args), step(*args), strict=True):
            assert torch.equal(got, want)


BASE = torch.zeros(3, 3, 8)
IDS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"base_logits": BASE[0]}, ValueError, r"base_logits: expected shape \(batch, drafted"),
        ({"memory_logits": BASE[:, :2]}, ValueError, r"memory_logits: \(batch, drafted \+ 1\) is"),
        ({"memory_logits": []}, TypeError, "memory_logits: expected a tensor or a non-empty"),
        ({"memory_logits": [BASE, None]}, TypeError, r"memory_logits\[1\]: expected a torch"),
        ({"draft_ids": IDS[:, :1]}, ValueError, r"draft_ids: expected shape \(3, 2\)"),
        ({"draft_ids": IDS.int()}, TypeError, "draft_ids: expected int64"),
        ({"draft_ids": IDS + 8}, ValueError, r"row 0 has an id outside \[0, 8\) at place 0: 8"),
        ({"draft_ids": IDS - 1}, ValueError, "row 0 has an id outside"),
        ({"draft_lengths": IDS[:, 0] + 3}, ValueError, r"row 0 has 3, expected a number in \[0, 2"),
        ({"draft_lengths": IDS[:, 0] - 1}, ValueError, "draft_lengths: row 0 has -1"),
        ({"draft_lengths": IDS}, ValueError, r"draft_lengths: expected shape \(3,\)"),
        ({"draft_lengths": 2}, TypeError, "draft_lengths: expected a torch.Tensor"),
        ({"draft_memory": 1}, ValueError, "draft_memory: expected 0 to 0, got 1"),
        ({"draft_memory": 0.5}, TypeError, "draft_memory: expected an int"),
        ({"draft_temperature": 0.0}, ValueError, "draft_temperature: expected a number in"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0, 1\]"),
        ({"seeds": torch.zeros(9, dtype=torch.int64)}, ValueError, r"seeds: expected shape \(3,\)"),
        ({"mix_weight": torch.tensor([0.0, 2.0, 0.0])}, ValueError, "mix_weight: row 1 has 2"),
        ({"mix_weight": torch.zeros(9)}, ValueError, r"mix_weight: expected shape \(3,\)"),
        pytest.param({"backend": "cuda"}, BackendUnavailable, "cuda", marks=no_cuda_here),
    ],
)
@pytest.mark.parametrize("where", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_errors(options, error, match, where):
    arguments = {
        "base_logits": BASE,
        "memory_logits": BASE,
        "mix_weight": 0.5,
        "draft_ids": IDS,
        "seeds": 0,
        "backend": where,
        **options,
    }
    with pytest.raises(error, match=match):
        mix_verify(**arguments)


def test_ids_behind_the_draft_may_be_anything(backend):
    ids = torch.tensor([[1, -5], [99, 99], [2, 3]])
    got = mix_verify(
        BASE,
        BASE,
        0.5,
        ids,
        draft_lengths=torch.tensor([1, 0, 2]),
        seeds=0,
        backend=backend,
    )
    assert got.num_accepted.tolist() == [1, 0, 2]
    assert (np.sort(got.tokens.numpy(), 1)[:, -1] < 8).all()
