"""logit_mix against a float64 mixture in probability space, on every backend."""

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
    log,
    logit_mix,
    logits,
    mixture,
    needs_cpu,
    pair,
    place,
    same_after_fork,
    softmax,
    worst,
)

import mdkernels
from mdkernels import BackendUnavailable, mix_argmax

backend = mix_fixtures.backend


def eager(base, memory, weight, temperature=1.0):
    """Plain torch in fp32: the error a user has without this package."""
    base = base.float().log_softmax(1)
    memory = (memory.float() / temperature).log_softmax(1)
    return torch.logaddexp(base + math.log1p(-weight), memory + math.log(weight))


def check(base, memory, weight, temperature, backend, margin=1.0):
    want = log(mixture(base, memory, weight, temperature))
    got = logit_mix(base, memory, weight, memory_temperature=temperature, backend=backend)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    # No worse than plain torch, but for a rounding of the result itself on tiny inputs.
    limit = worst(eager(base, memory, weight, temperature), want)
    largest = float(want[want.isfinite()].abs().max())
    assert worst(got, want) <= margin * limit + 2.0**-23 * max(largest, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.interpreted(
    backend="triton", dtype=[torch.float32, torch.float16], width=[1, 17, 2049]
)
def test_matches_float64(backend, dtype, width):
    for rows in (1, 2, fewer(backend, 9, 3)):
        base, memory = pair(rows, width, dtype, seed=rows)
        check(base, memory, 0.3, 1.3, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_real_width_on_both_thread_layouts(backend, dtype):
    with threads(2):
        for rows in (1, fewer(backend, 9, 1)):  # one row is split over threads, nine are not
            base, memory = pair(rows, 50257, dtype)
            check(base, memory, 0.55, 0.8, backend)


@pytest.mark.parametrize("memory_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.interpreted(backend="triton")
def test_dtypes_may_differ(backend, base_dtype, memory_dtype):
    base, memory = logits(3, 777, base_dtype, 1), logits(3, 777, memory_dtype, 2)
    check(base, memory, 0.25, 1.0, backend)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: z + 1e4,
        lambda z: z - 1e4,
        lambda z: z * 8,
        lambda z: z * 0,
        lambda z: z.masked_fill(
            torch.rand(z.shape, generator=torch.manual_seed(3)) < 0.4, -torch.inf
        ),
        lambda z: z.masked_fill(torch.arange(z.shape[1]) < 700, -torch.inf),
        lambda z: z.masked_fill(torch.arange(z.shape[1]) != 2500, -torch.inf),
        lambda z: z + 60.0 * (torch.arange(z.shape[1]) == 2500),
        lambda z: z + torch.linspace(-300, 300, z.shape[1]),
        lambda z: z + torch.linspace(300, -300, z.shape[1]),
    ],
    ids=[
        "up",
        "down",
        "peaked",
        "flat",
        "masked",
        "head_masked",
        "single",
        "spike",
        "rising",
        "falling",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.interpreted(backend="triton", dtype=torch.float32)
def test_hard_rows(backend, dtype, spoil):
    base, memory = pair(3, fewer(backend, 5003, 2505))
    base, other = spoil(base).to(dtype), memory.to(dtype)
    check(base, other, 0.4, 1.2, backend)
    check(other, base, 0.4, 1.2, backend)
    check(base, base.flip(0), 0.4, 1.2, backend)


@pytest.mark.interpreted(backend="triton")
def test_common_mask_stays_minus_infinity(backend):
    base, memory = pair(2, 600)
    base[:, 10:50] = memory[:, 30:80] = -math.inf
    got = logit_mix(base, memory, 0.5, backend=backend)
    assert (got[:, 30:50] == -math.inf).all()
    assert got[:, :30].isfinite().all()
    assert got[:, 50:].isfinite().all()


@pytest.mark.interpreted(backend="triton")
def test_bad_rows_are_nan_and_only_those(backend):
    base, memory = pair(6, 3000)
    base[1, 2999] = math.nan
    memory[2, 0] = math.nan
    base[3, 7] = math.inf
    memory[4] = -math.inf
    got = logit_mix(base, memory, 0.5, backend=backend)
    assert got.isnan().any(1).tolist() == [False, True, True, True, True, False]
    assert got.isnan().all(1).tolist() == [False, True, True, True, True, False]


@pytest.mark.interpreted(backend="triton")
def test_bad_row_weights(backend):
    """Raised where the values can be looked at for free, else the row is NaN."""
    base, memory = pair(7, 1100)
    weights = torch.tensor([0.5, -0.1, 1.1, math.nan, 1.0, math.inf, 0.0])
    if backend not in UNCHECKED:
        with pytest.raises(ValueError, match="mix_weight: row 1"):
            logit_mix(base, memory, weights, backend=backend)
        return
    got = logit_mix(base, memory, weights, backend=backend)
    assert got.isnan().all(1).tolist() == [False, True, True, True, False, True, False]
    assert not got[[0, 4, 6]].isnan().any()
    pairs = torch.tensor([[0.6, 0.6], [0.6, 0.4]])
    got = logit_mix(base[:2], [memory[:2]] * 2, pairs, backend=backend)
    assert got.isnan().all(1).tolist() == [True, False]
    assert not got[1].isnan().any()


@pytest.mark.parametrize("draw", [logit_mix, mix_argmax])
def test_bad_row_weights_of_the_reference_on_a_gpu(draw, monkeypatch):
    """Nothing is looked at there, so the row is NaN, as of the other backends."""
    monkeypatch.setattr("mdkernels.ops.logit_mix.reference.find_weight_fault", lambda _: None)
    base, memory = pair(5, 1100)
    weights = torch.tensor([0.5, -0.1, 1.1, math.nan, 1.0])
    bad = [False, True, True, True, False]
    got = draw(base, memory, weights, backend="reference")
    if draw is mix_argmax:
        assert (got == -1).tolist() == bad
        return
    assert got.isnan().all(1).tolist() == bad
    assert got.isnan().any(1).tolist() == bad
    pairs = torch.tensor([[0.6, 0.6], [0.6, 0.4]])
    got = draw(base[:2], [memory[:2]] * 2, pairs, backend="reference")
    assert got.isnan().all(1).tolist() == [True, False]


@pytest.mark.interpreted(backend="triton")
def test_weights_zero_and_one_drop_a_model(backend):
    base, memory = pair(2, 3001)
    nothing = torch.full_like(base, math.nan)
    only_base = logit_mix(base, nothing, 0.0, memory_temperature=1.3, backend=backend)
    only_memory = logit_mix(nothing, memory, 1.0, memory_temperature=1.3, backend=backend)
    assert worst(only_base, log(softmax(base))) <= 3e-6
    assert worst(only_memory, log(softmax(memory, 1.3))) <= 3e-6
    rows = logit_mix(base, memory, torch.tensor([0.0, 1.0]), backend=backend)
    assert torch.equal(rows[0], only_base[0])
    assert worst(rows[1], log(softmax(memory))[1]) <= 3e-6


@pytest.mark.interpreted(backend="triton")
def test_row_weights_of_zero_and_one_ignore_nan(backend):
    base, memory = pair(3, 900)
    base[1] = memory[0] = math.nan
    got = logit_mix(base, memory, torch.tensor([0.0, 1.0, 0.5]), backend=backend)
    assert got.isfinite().all()


def test_weights_per_row(backend):
    base, memory = pair(5, 1234, torch.bfloat16)
    weights = torch.tensor([0.1, 0.9, 1e-6, 0.5, 0.999])
    want = log(mixture(base, memory, weights[:, None].numpy()))
    for form in (weights, weights.double(), weights[:, None], [weights], weights.expand(2, 5)[1]):
        assert worst(logit_mix(base, memory, form, backend=backend), want) <= 5e-6
    half = logit_mix(base, memory, 0.5, backend=backend)
    for form in (torch.tensor(0.5), torch.tensor([0.5]), [0.5], torch.full((5,), 0.5)):
        assert torch.equal(logit_mix(base, memory, form, backend=backend), half)


@pytest.mark.interpreted(backend="triton")
def test_several_memories(backend):
    base, first = pair(4, 2500, seed=1)
    others = [first, logits(4, 2500, torch.bfloat16, 5), logits(4, 2500, torch.float16, 6)]
    weights = torch.tensor([0.2, 0.3, 0.4])
    want = log(mixture(base, others, weights.numpy(), 1.1))
    rows = weights.expand(4, 3).contiguous()
    for form in (weights.tolist(), weights, rows, list(weights), [0.2, rows[:, 1], weights[2]]):
        got = logit_mix(base, others, form, memory_temperature=1.1, backend=backend)
        assert worst(got, want) <= 5e-6
    per_row = [[0.2, 0.3, 0.4], [0.0, 1.0, 0.0], [0.7, 0.2, 0.1], [0.0, 0.0, 0.0]]
    got = logit_mix(base, others, torch.tensor(per_row), backend=backend)
    assert worst(got, log(mixture(base, others, per_row))) <= 5e-6


@pytest.mark.interpreted(backend="triton")
def test_weights_that_add_up_to_one_leave_the_base_nothing(backend):
    base = torch.full((2, 40), math.nan)
    memories = [logits(2, 40, seed=s) for s in range(3)]
    for weights in ([0.7, 0.2, 0.1], torch.tensor([0.7, 0.2, 0.1])):
        assert logit_mix(base, memories, weights, backend=backend).isfinite().all()


@pytest.mark.parametrize(
    ("width", "memory_width"), [(1000, 1037), (1037, 1000), (2048, 5000), (3, 1)]
)
@pytest.mark.interpreted(backend="triton")
def test_widths_may_differ(backend, width, memory_width):
    base, memory = pair(3, width, memory_width=memory_width)
    got = logit_mix(base, memory, 0.3, backend=backend)
    assert worst(got, log(mixture(base, memory, 0.3))) <= 5e-6
    assert got.double().exp().sum(1).numpy() == pytest.approx(np.ones(3), abs=1e-5)
    low, high = sorted((width, memory_width))
    dropped = logit_mix(base, memory, float(width > memory_width), backend=backend)
    assert (dropped[:, low:] == -math.inf).all()  # the wider model is out
    assert dropped.shape == (3, high)
    if memory_width > width:  # the documented way to forbid ids that the base does not have
        cut = logit_mix(base, memory[:, :width], 0.3, backend=backend)
        assert worst(cut, log(mixture(base, memory[:, :width], 0.3))) <= 5e-6


def test_memories_of_three_widths(backend):
    base, memories = logits(2, 700), [logits(2, 1500, seed=1), logits(2, 300, torch.bfloat16, 2)]
    got = logit_mix(base, memories, [0.2, 0.3], backend=backend)
    assert worst(got, log(mixture(base, memories, [0.2, 0.3]))) <= 5e-6


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.interpreted(backend="triton")
def test_base_scale(backend, weight):
    base, memory = pair(3, 2100)
    base += torch.tensor([[0.0], [50.0], [-300.0]])
    got = logit_mix(base, memory, weight, scale="base", backend=backend)
    lse = base.double().logsumexp(1)[:, None]
    want = log(mixture(base, memory, weight)) + lse
    assert worst(got, want) <= 5e-5  # an ulp of 300
    if weight == 0.0:
        assert worst(got, base.double()) <= 5e-5


@pytest.mark.interpreted(backend="triton")
def test_strided_rows(backend):
    base, memory = pair(6, 1100)
    want = logit_mix(base[::2, 5:999], memory[::2, 7:1001], 0.3, backend="reference")
    got = logit_mix(base[::2, 5:999], memory[::2, 7:1001], 0.3, backend=backend)
    assert worst(got, want.double()) <= 5e-6
    same = logit_mix(base[:1].expand(4, -1), memory[:1].expand(4, -1), 0.3, backend=backend)
    assert torch.equal(same[0], same[3])


@pytest.mark.usefixtures("poisoned_memory")
def test_streaming_stores_at_every_alignment(backend):
    """From 4 MB on the output bypasses the caches, which needs aligned addresses."""
    for width in (8197, 8192):
        base, memory = pair(fewer(backend, 131, 1), width, torch.bfloat16)
        got = logit_mix(base, memory, 0.3, backend=backend)
        assert worst(got, log(mixture(base, memory, 0.3))) <= 5e-6


@pytest.mark.interpreted(backend="triton")
def test_no_rows(backend):
    for weight in (0.5, torch.zeros(0)):
        got = logit_mix(torch.zeros(0, 9), torch.zeros(0, 7), weight, backend=backend)
        assert got.shape == (0, 9)


@needs_cpu
def test_result_depends_on_neither_batch_nor_threads():
    base, memory = pair(9, 50257)
    with threads(1):
        want = logit_mix(base, memory, 0.3, backend="cpu")
    with threads(2):
        assert torch.equal(logit_mix(base, memory, 0.3, backend="cpu"), want)
        for row in (0, 8):
            alone = logit_mix(base[row : row + 1], memory[row : row + 1], 0.3, backend="cpu")
            assert torch.equal(alone[0], want[row])


@needs_cpu
def test_after_fork():
    base, memory = pair(1, 50257)
    with threads(2):
        assert same_after_fork(lambda: logit_mix(base, memory, 0.3, backend="cpu"))


@pytest.mark.parametrize("size", [1e7, 1e12, 1e28, 1e34])
def test_huge_logits(backend, size):
    """Beyond what any model gives, but finite: one token has it all, and nothing is NaN."""
    for width in (1, 2, 8, 300):
        base, memory = (x * size for x in pair(2, width))
        got = logit_mix(base, memory, 0.3, backend=backend)
        want = log(mixture(base, memory, 0.3))
        assert not got.isnan().any()
        torch.testing.assert_close(got.double().exp(), want.exp(), rtol=1e-6, atol=1e-12)


def test_float64_runs_on_the_reference():
    base, memory = pair(2, 300)
    want = log(mixture(base, memory, 0.3))
    for inputs in ((base.double(), memory), (base, memory.double())):
        got = logit_mix(*inputs, 0.3)
        assert got.dtype == torch.float64
        assert worst(got, want) <= 1e-12
    with pytest.raises(BackendUnavailable, match="float64"):
        logit_mix(base.double(), memory, 0.3, backend="cpu")


@pytest.mark.interpreted(backend="triton")
def test_opcheck(backend):
    base, memory = pair(2, 33)
    for row_weights, weights in ((None, [0.7, 0.3]), (torch.full((2, 1), 0.3), [])):
        arguments = place((base, [memory], row_weights, weights, 1.1, True, backend), backend)
        torch.library.opcheck(torch.ops.mdk.logit_mix_forward.default, arguments)


def test_compiles_in_one_graph(backend):
    base, memory = pair(2, 33)

    def step(b, m, w):
        return mdkernels.logit_mix(b, m, w, memory_temperature=1.1, backend=backend) * 2

    base, memory = place((base, memory), backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for weight in place((0.3, torch.tensor([0.2, 0.4])), backend):
        assert torch.equal(compiled(base, memory, weight), step(base, memory, weight))
