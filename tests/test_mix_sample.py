"""mix_sample against the float64 race of mix_sample_oracle.py: the token itself, row by row."""

import math

import mix_fixtures
import numpy as np
import pytest
import torch
from helpers import threads
from mix_fixtures import (
    DTYPES,
    UNCHECKED,
    WIDTHS,
    fewer,
    generator,
    log,
    logits,
    mix_argmax,
    mix_sample,
    mixture,
    needs_cpu,
    no_cuda_here,
    pair,
    place,
    same_after_fork,
    softmax,
    worst,
)
from mix_sample_oracle import draw, exponentials

import mdkernels
from mdkernels import BackendUnavailable, MixSampleOutput
from mdkernels.ops.mix_sample import arguments

backend = mix_fixtures.backend
FILTERS = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "top_p_hot": {"top_p": 0.98, "temperature": 3.0},
    "all": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


def check(base, memory, weight, backend, memory_temperature=1.0, seed=0, **filters):
    """The tokens are the oracle's wherever its float64 decisions are not within fp32 rounding."""
    seeds = torch.randint(-(2**62), 2**62, (len(base),), generator=generator(seed))
    offsets = torch.randint(0, 2**40, (len(base),), generator=generator(seed + 1))
    p = mixture(base, memory, weight, memory_temperature)
    want, clear = draw(p, seeds.numpy(), offsets.numpy(), **filters)
    options = {
        "memory_temperature": memory_temperature,
        "seeds": seeds,
        "offsets": offsets,
        "backend": backend,
        **filters,
    }
    got = mix_sample(base, memory, weight, **options)
    assert got.dtype == torch.int64
    assert torch.equal(got[clear], want[clear])
    return clear.double().mean()


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.interpreted(backend="triton")
def test_draws_the_token_of_the_specification(backend, filters):
    base, memory = pair(fewer(backend, 1500, 8), 157, seed=3)
    assert check(base, memory, 0.4, backend, 1.2, **filters) > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.interpreted(backend="triton", dtype=torch.float32, width=[1, 17, 2049])
def test_widths_and_dtypes(backend, dtype, width):
    base, memory = pair(fewer(backend, 20, 2), width, dtype)
    for filters in ({}, FILTERS["all"], {"top_p": 0.5}, {"min_p": 0.01, "temperature": 0.7}):
        check(base, memory, 0.3, backend, **filters)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.interpreted(backend="triton", filters=FILTERS["plain"])
def test_real_width(backend, filters):
    base, memory = pair(fewer(backend, 3, 1), 50257, torch.bfloat16)
    with threads(2):
        check(base, memory, 0.3, backend, **filters)
        if len(base) > 1:
            check(base[:1], memory[:1], 0.3, backend, **filters)


@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0])
@pytest.mark.interpreted(backend="triton", spread=0.0)
def test_flat_and_peaked_rows(backend, spread):
    rows = fewer(backend, 12, 1)
    base, memory = (logits(rows, 6001, seed=s, spread=spread) for s in (1, 2))
    for filters in ({}, {"top_p": 0.9}, {"top_p": 0.3, "temperature": 5.0}, {"top_k": 3000}):
        check(base, memory, 0.5, backend, **filters)


@pytest.mark.interpreted(backend="triton")
def test_masks_shifts_row_weights_and_memories(backend):
    rows = fewer(backend, 60, 8)
    base, memory = pair(rows, 900)
    hidden = torch.rand(base.shape, generator=generator(1)) < 0.6
    masked = base.masked_fill(hidden, -math.inf)
    check(masked, memory + 1e4, 0.4, backend, top_p=0.9)
    check(masked, memory.masked_fill(hidden, -math.inf), 0.4, backend)
    memories, weights = [memory, logits(rows, 1000, torch.bfloat16, 4)], torch.rand(rows, 2) / 2
    seeds, filters = torch.arange(rows), {"top_k": 50}
    got = mix_sample(base, memories, weights, seeds=seeds, backend=backend, **filters)
    p = mixture(base, memories, weights.numpy())
    want, clear = draw(p, seeds.numpy(), np.zeros(rows), **filters)
    assert torch.equal(got[clear], want[clear])
    check(base[::2, 3:501], memory[::2, :700], 0.3, backend, top_k=9, top_p=0.8)


@pytest.mark.interpreted(backend="triton")
def test_masked_tokens_are_never_drawn(backend):
    base, memory = pair(1, 64)
    hidden = torch.arange(64) % 3 > 0
    for x in (base, memory):
        x[:, hidden] = -math.inf
    draws = fewer(backend, 20000, 40)
    many = (base.expand(draws, -1), memory.expand(draws, -1))
    assert (mix_sample(*many, 0.5, seeds=3, backend=backend) % 3 == 0).all()


@pytest.mark.interpreted(backend="triton")
def test_greedy(backend):
    base, memory = pair(fewer(backend, 30, 5), 1001)
    want = mix_argmax(base, memory, 0.3, backend=backend)
    for filters in ({"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 0.0}):
        assert torch.equal(mix_sample(base, memory, 0.3, seeds=1, backend=backend, **filters), want)
    assert torch.equal(mix_sample(base, memory, 0.3, seeds=1, min_p=1.0, backend=backend), want)


@pytest.mark.interpreted(backend="triton")
def test_token_depends_on_its_own_row_only(backend):
    rows = fewer(backend, 40, 8)
    base, memory = pair(rows, 700)
    seeds, offsets = torch.arange(rows) * 7, torch.arange(rows)
    options = {"top_p": 0.95, "backend": backend}
    want = mix_sample(base, memory, 0.3, seeds=seeds, offsets=offsets, **options)
    order = torch.randperm(rows, generator=generator(0))
    shuffled = mix_sample(
        base[order], memory[order], 0.3, seeds=seeds[order], offsets=offsets[order], **options
    )
    assert torch.equal(shuffled, want[order])
    for row in range(5):
        one = slice(row, row + 1)
        alone = mix_sample(
            base[one], memory[one], 0.3, seeds=seeds[one], offsets=offsets[one], **options
        )
        assert torch.equal(alone, want[one])


@needs_cpu
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_threads_and_batches_agree(filters):
    base, memory = pair(9, 50257, torch.bfloat16)
    seeds = torch.arange(9)
    with threads(1):
        want = mix_sample(base, memory, 0.3, seeds=seeds, backend="cpu", **filters)
    with threads(2):
        assert torch.equal(
            mix_sample(base, memory, 0.3, seeds=seeds, backend="cpu", **filters), want
        )
        for rows in (slice(4, 5), slice(2, 5)):
            part = mix_sample(
                base[rows], memory[rows], 0.3, seeds=seeds[rows], backend="cpu", **filters
            )
            assert torch.equal(part, want[rows])


@needs_cpu
def test_after_fork():
    base, memory = pair(1, 50257)
    with threads(2):
        assert same_after_fork(
            lambda: mix_sample(base, memory, 0.3, seeds=1, top_p=0.9, backend="cpu")
        )


@pytest.mark.interpreted(backend="triton")
def test_logprobs_are_those_before_the_filters(backend):
    base, memory = pair(6, 900, memory_width=800)
    seeds = torch.arange(6)
    options = {"seeds": seeds, "memory_temperature": 1.2, "backend": backend}
    for filters in ({}, {"temperature": 0.5, "top_k": 9}, {"temperature": 0.0}):
        plain = mix_sample(base, memory, 0.3, **options, **filters)
        got = mix_sample(base, memory, 0.3, return_logprobs=True, **options, **filters)
        assert isinstance(got, MixSampleOutput)
        assert torch.equal(got.tokens, plain)
        gold = plain[:, None]
        want = log(mixture(base, memory, 0.3, 1.2)).gather(1, gold)[:, 0]
        assert worst(got.logprobs, want) <= 5e-6
        assert worst(got.base_logprobs, log(softmax(base)).gather(1, gold)[:, 0]) <= 5e-6
        padded = torch.full((6, 900), -math.inf, dtype=torch.float64)
        padded[:, :800] = log(softmax(memory, 1.2))
        assert worst(got.memory_logprobs, padded.gather(1, gold)[:, 0]) <= 5e-6


@pytest.mark.interpreted(backend="triton")
def test_logprobs_of_a_list_and_of_a_dropped_model(backend):
    base, memories = logits(3, 90), [logits(3, 90, seed=1), logits(3, 80, seed=2)]
    got = mix_sample(base, memories, [0.4, 0.0], seeds=5, return_logprobs=True, backend=backend)
    assert got.memory_logprobs.shape == (3, 2)
    assert got.memory_logprobs[:, 0].isfinite().all()
    nothing = torch.full((3, 90), math.nan)
    got = mix_sample(base, nothing, 0.0, seeds=5, return_logprobs=True, backend=backend)
    assert torch.equal(got.logprobs, got.base_logprobs)
    assert got.memory_logprobs.isnan().all()
    wide = torch.full((3, 99), -20.0)
    wide[:, 95] = 20.0
    got = mix_sample(base, wide, 0.999, seeds=5, return_logprobs=True, backend=backend)
    assert got.tokens.tolist() == [95] * 3
    assert (got.base_logprobs == -math.inf).all()


@pytest.mark.interpreted(backend="triton")
def test_component(backend):
    """A model is drawn, then a token of that model alone: what the other ones hold is not seen."""
    rows = fewer(backend, 300, 12)
    base, memories = logits(rows, 90), [logits(rows, 90, seed=1), logits(rows, 70, seed=2)]
    models, seeds, offsets = [base, *memories], torch.arange(rows) * 977, torch.arange(rows)
    table = torch.tensor([[0.3, 0.2], [0.0, 1.0], [0.5, 0.0]])[torch.arange(rows) % 3]
    for weights in ([0.25, 0.45], table):
        each = torch.as_tensor(weights).expand(rows, 2).numpy().astype(float)
        shares = np.concatenate([1 - each.sum(1, keepdims=True), each], 1)
        shares[shares < 1e-6] = 0
        with np.errstate(divide="ignore"):
            clocks = exponentials(seeds.numpy(), offsets.numpy(), 3, stream=2) / shares
        chosen = clocks.argmin(1)
        p = np.zeros((rows, 90))
        for row, k in enumerate(chosen):
            q = softmax(models[k][row : row + 1])[0]
            p[row, : len(q)] = q
        want, clear = draw(p, seeds.numpy(), offsets.numpy())
        hidden = [
            m.masked_fill(torch.from_numpy(chosen != k)[:, None], math.nan)
            for k, m in enumerate(models)
        ]
        options = {"seeds": seeds, "offsets": offsets, "mode": "component", "backend": backend}
        got = mix_sample(hidden[0], hidden[1:], weights, **options)
        assert torch.equal(got[clear], want[clear])
        assert len(set(chosen)) == 3
    full = mix_sample(base, memories, [0.25, 0.45], return_logprobs=True, **options)
    gold = log(mixture(base, memories, [0.25, 0.45])).gather(1, full.tokens[:, None])[:, 0]
    assert worst(full.logprobs, gold) <= 5e-6


@pytest.mark.interpreted(backend="triton")
def test_no_rows(backend):
    nothing = torch.zeros(0, 9)
    got = mix_sample(nothing, nothing, 0.5, seeds=0, return_logprobs=True, backend=backend)
    assert [x.shape for x in got] == [(0,)] * 4


@pytest.mark.interpreted(backend="triton")
def test_rows_without_a_distribution(backend):
    base, memory = pair(5, 3000)
    base[3, 17] = math.nan
    memory[4] = -math.inf
    options = {"seeds": 0, "return_logprobs": True, "backend": backend}
    got = mix_sample(base, memory, 0.5, temperature=0.0, **options)
    assert (got.tokens[:3] >= 0).all()
    assert got.tokens[3:].tolist() == [-1, -1]
    for table in got[1:]:
        assert table.isnan().tolist() == [False, False, False, True, True]
    if backend in UNCHECKED:
        got = mix_sample(base, memory, 0.5, seeds=0, return_logprobs=True, backend=backend)
        assert (got.tokens[:3] >= 0).all()
        assert got.tokens[3:].tolist() == [-1, -1]
        assert got.logprobs.isnan().tolist() == [False, False, False, True, True]
        options = {"top_k": 9, "top_p": 0.5, "min_p": 0.1}
        got = mix_sample(base[2:], memory[2:], 0.5, seeds=0, backend=backend, **options)
        assert (got >= 0).tolist() == [True, False, False]
        return
    for rows in (slice(0, 5), slice(3, 4)):
        first = 3 - rows.start
        with pytest.raises(ValueError, match=f"row {first} holds NaN"):
            mix_sample(base[rows], memory[rows], 0.5, seeds=0, backend=backend)
    with threads(2), pytest.raises(ValueError, match="row 0 holds NaN"):
        mix_sample(base[4:], memory[4:], 0.5, seeds=0, backend=backend)


@pytest.mark.interpreted(backend="triton")
def test_log_probabilities_of_no_token_are_nan(backend):
    """Not those of the row before, or a device that stops."""
    base, memory = pair(3, 40)
    tokens = torch.tensor([-1, 40, 7])
    base, memory, tokens = place((base, memory, tokens), backend)
    table = torch.ops.mdk.mix_sample_logprobs(
        base, [memory], None, [0.5, 0.5], 1.0, tokens, backend
    )
    assert table.isnan().all(1).tolist() == [True, True, False]
    assert table[2].isfinite().all()


def test_greedy_draws_expand_no_seeds(monkeypatch):
    base, memory = pair(3, 40)
    monkeypatch.setattr(arguments, "row_seeds", lambda *_: pytest.fail("not read"))
    assert mix_sample(base, memory, 0.5, seeds=1, temperature=0.0).shape == (3,)


def test_inputs_that_require_grad(backend):
    base, memory = pair(2, 40)
    base.requires_grad_()
    got = mix_sample(base, memory, 0.3, seeds=1, return_logprobs=True, backend=backend)
    assert not any(x.requires_grad for x in got)


@pytest.mark.interpreted(backend="triton")
def test_opcheck_and_compile(backend):
    base, memory = pair(2, 33)
    seeds, offsets = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    # Imitated, a search takes its time, and what is looked at here does not depend on it.
    filters = fewer(backend, (10, 0.9, 0.01), (0, 1.0, 0.01))
    base, memory, seeds, offsets = place((base, memory, seeds, offsets), backend)
    mix = (base, [memory], None, [0.7, 0.3], 1.0)
    torch.library.opcheck(
        torch.ops.mdk.mix_sample_forward.default, (*mix, 0.9, *filters, seeds, offsets, backend)
    )
    torch.library.opcheck(torch.ops.mdk.mix_sample_logprobs.default, (*mix, seeds, backend))

    def step(b, m, s):
        return mdkernels.mix_sample(
            b, m, 0.3, seeds=s, top_p=filters[1], min_p=0.01, return_logprobs=True, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for s in (seeds, 7):
        for got, want in zip(compiled(base, memory, s), step(base, memory, s), strict=True):
            assert torch.equal(got, want)


BASE = torch.zeros(3, 8)
SEEDS = torch.arange(3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": math.nan}, ValueError, "temperature: expected"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got None"),
        ({"top_k": 2**63}, ValueError, "top_k: expected an int that fits 64 bits"),
        ({"offsets": 2**63}, ValueError, "offsets: expected an int that fits 64 bits"),
        ({"top_k": -1}, ValueError, "top_k: expected an int of at least 0"),
        ({"top_k": 2.0}, ValueError, "top_k: expected an int"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0, 1\]"),
        ({"min_p": -0.5}, ValueError, "min_p: expected a number"),
        ({"mode": "both"}, ValueError, "mode: expected one of"),
        ({"mode": "component", "top_k": 5}, ValueError, "mode: 'component' is exact only for"),
        ({"mode": "component", "temperature": 0.5}, ValueError, "exact only for temperature 1"),
        ({"seeds": SEEDS.int()}, TypeError, "seeds: expected int64"),
        ({"seeds": SEEDS[:2]}, ValueError, r"seeds: expected shape \(3,\)"),
        ({"seeds": 0.5}, TypeError, "seeds: expected a torch.Tensor"),
        ({"offsets": SEEDS[:2]}, ValueError, r"offsets: expected shape \(3,\)"),
        ({"mix_weight": torch.tensor([0.0, 2.0, 0.0])}, ValueError, "mix_weight: row 1 has 2"),
        pytest.param({"backend": "cuda"}, BackendUnavailable, "cuda", marks=no_cuda_here),
    ],
)
@pytest.mark.parametrize("where", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_errors(options, error, match, where):
    arguments = {"mix_weight": 0.5, "seeds": SEEDS, "backend": where, **options}
    with pytest.raises(error, match=match):
        mix_sample(BASE, BASE, **arguments)
