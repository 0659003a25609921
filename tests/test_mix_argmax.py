"""mix_argmax against the float64 mixture: the exact argmax, up to what fp32 can tell apart."""

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
    logits,
    mix_argmax,
    mixture,
    needs_cpu,
    pair,
    place,
    same_after_fork,
)

import mdkernels

backend = mix_fixtures.backend

# Two probabilities closer than this (relative) may be swapped: a dozen fp32 roundings.
MARGIN = 2e-6


def check(base, memory, weight, backend, temperature=1.0):
    p = mixture(base, memory, weight, temperature)
    got = mix_argmax(base, memory, weight, memory_temperature=temperature, backend=backend)
    assert got.dtype == torch.int64
    assert got.shape == (len(base),)
    best = p.max(1)
    assert (p[np.arange(len(p)), got.numpy()] >= best * (1 - MARGIN)).all()
    # Where nothing comes close, there is no excuse.
    clear = (p >= best[:, None] * (1 - MARGIN)).sum(1) == 1
    assert torch.equal(got[clear], torch.from_numpy(p.argmax(1))[clear])
    return int(clear.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.interpreted(backend="triton", dtype=torch.float16, width=[1, 17, 2049])
def test_matches_float64(backend, dtype, width):
    for rows in (1, 2, fewer(backend, 40, 4)):
        base, memory = pair(rows, width, dtype, seed=rows)
        assert check(base, memory, 0.3, backend, 1.3) > 0


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
@pytest.mark.interpreted(backend="triton", spread=0.01)
def test_flat_and_peaked_rows(backend, spread):
    rows = fewer(backend, 30, 3)
    base, memory = (logits(rows, 5003, seed=s, spread=spread) for s in (1, 2))
    for weight in (0.001, 0.5, 0.999):
        check(base, memory, weight, backend)
        check(base.bfloat16(), memory, weight, backend)
        check(base.bfloat16(), memory.bfloat16(), weight, backend)


@pytest.mark.interpreted(backend="triton")
def test_winner_that_neither_model_prefers(backend):
    """The bound of a part is loose exactly here: the tops of the models are elsewhere."""
    base, memory = torch.zeros(4, 5003), torch.zeros(4, 5003)
    rows = torch.arange(4)
    base[rows, 700 * rows + 3] = 9.0
    memory[rows, 4999 - 600 * rows] = 9.0
    both = 2500 + 37 * rows
    base[rows, both] = memory[rows, both] = 8.9
    assert torch.equal(mix_argmax(base, memory, 0.5, backend=backend), both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.interpreted(backend="triton", dtype=torch.float32)
def test_ties_go_to_the_smallest_id(backend, dtype):
    draw = generator(0)
    rows = fewer(backend, 50, 5)
    base = torch.randint(0, 3, (rows, 3001), generator=draw).to(dtype)
    memory = torch.randint(0, 3, (rows, 3001), generator=draw).to(dtype)
    want = ((base == 2) & (memory == 2)).int().argmax(1)
    assert torch.equal(mix_argmax(base, memory, 0.3, backend=backend), want)
    with threads(2):
        for row in range(5):
            one = slice(row, row + 1)
            assert mix_argmax(base[one], memory[one], 0.3, backend=backend) == want[row]
    flat = torch.zeros(3, 3001, dtype=dtype)
    assert mix_argmax(flat, flat, 0.3, backend=backend).tolist() == [0, 0, 0]


def test_shifts_masks_and_large_values(backend):
    base, memory = pair(6, 5003)
    check(base + 1e4, memory - 1e4, 0.4, backend)
    hidden = torch.rand(base.shape, generator=generator(1)) < 0.6
    check(base.masked_fill(hidden, -math.inf), memory.masked_fill(~hidden, -math.inf), 0.4, backend)
    only = torch.full((2, 5003), -math.inf)
    only[0, 5002] = only[1, 0] = 0.0
    assert mix_argmax(only, only, 0.5, backend=backend).tolist() == [5002, 0]
    check(base + torch.linspace(-300, 300, 5003), memory, 0.4, backend)


@pytest.mark.interpreted(backend="triton")
def test_one_model_alone(backend):
    base, memory = pair(5, 3001)
    bad = torch.full_like(base, math.nan)
    assert torch.equal(mix_argmax(base, bad, 0.0, backend=backend), base.argmax(1))
    assert torch.equal(mix_argmax(bad, memory, 1.0, backend=backend), memory.argmax(1))


@pytest.mark.interpreted(backend="triton")
def test_rows_without_a_distribution_give_minus_one(backend):
    base, memory = pair(4, 3000)
    base[1, 2999], memory[2, 5], memory[3] = math.nan, math.inf, -math.inf
    got = mix_argmax(base, memory, 0.5, backend=backend)
    assert got[1:].tolist() == [-1, -1, -1]
    for row in range(1, 4):
        assert mix_argmax(base[row : row + 1], memory[row : row + 1], 0.5, backend=backend) == -1


@pytest.mark.interpreted(backend="triton")
def test_several_memories_row_weights_and_widths(backend):
    base, memories = logits(5, 700), [logits(5, 1500, seed=1), logits(5, 300, torch.bfloat16, 2)]
    check(base, memories, [0.2, 0.3], backend)
    weights = torch.tensor([[0.2, 0.3], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.4, 0.4]])
    p = mixture(base, memories, weights.numpy())
    got = mix_argmax(base, memories, weights, backend=backend)
    assert torch.equal(got, torch.from_numpy(p.argmax(1)))
    base[:, 10] = 20.0
    assert mix_argmax(base, memories, [0.2, 0.3], backend=backend).tolist() == [10] * 5
    memories[0][:, 1400] = 30.0
    assert mix_argmax(base, memories, [0.8, 0.1], backend=backend).tolist() == [1400] * 5


@pytest.mark.interpreted(backend="triton")
def test_strided_rows_and_no_rows(backend):
    base, memory = pair(6, 1100)
    check(base[::2, 5:999], memory[::2, 7:1001], 0.3, backend)
    assert mix_argmax(torch.zeros(0, 9), torch.zeros(0, 9), 0.3, backend=backend).shape == (0,)


@needs_cpu
def test_threads_and_batches_agree():
    base, memory = pair(9, 50257, torch.bfloat16)
    with threads(1):
        want = mix_argmax(base, memory, 0.3, backend="cpu")
    with threads(2):
        assert torch.equal(mix_argmax(base, memory, 0.3, backend="cpu"), want)
        alone = [
            mix_argmax(b[None], m[None], 0.3, backend="cpu")
            for b, m in zip(base, memory, strict=True)
        ]
    assert torch.equal(torch.cat(alone), want)


@needs_cpu
def test_after_fork():
    base, memory = pair(1, 50257)
    with threads(2):
        assert same_after_fork(lambda: mix_argmax(base, memory, 0.3, backend="cpu"))


def test_inputs_that_require_grad(backend):
    base, memory = pair(2, 40)
    want = mix_argmax(base, memory, 0.3, backend=backend)
    base.requires_grad_()
    got = mix_argmax(base, memory, 0.3, backend=backend)
    assert torch.equal(got, want)
    assert not got.requires_grad


def test_opcheck_and_compile(backend):
    base, memory = pair(2, 33)
    torch.library.opcheck(
        torch.ops.mdk.mix_argmax_forward.default,
        place((base, [memory], None, [0.7, 0.3], 1.0, backend), backend),
    )

    def step(b, m):
        return mdkernels.mix_argmax(b, m, 0.3, backend=backend) + 1

    base, memory = place((base, memory), backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(base, memory), step(base, memory))


def test_errors_name_the_argument(backend):
    base, memory = pair(2, 9)
    weights = torch.tensor([0.5, 1.5])
    if backend in UNCHECKED:
        assert mix_argmax(base, memory, weights, backend=backend)[1] == -1
    else:
        with pytest.raises(ValueError, match=r"mix_weight: row 1 has 1\.5"):
            mix_argmax(base, memory, weights, backend=backend)
    with pytest.raises(ValueError, match="memory_logits: 1 rows"):
        mix_argmax(base, memory[:1], 0.5, backend=backend)
