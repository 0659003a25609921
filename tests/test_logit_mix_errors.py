"""What logit_mix refuses, and in which words."""

import math

import pytest
import torch
from mix_fixtures import logit_mix, needs_cpu, no_cuda_here

from mdkernels import BackendUnavailable

BASE, MEMORY = torch.zeros(3, 8), torch.zeros(3, 8)
TWO = [MEMORY, MEMORY]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((BASE[0], MEMORY, 0.5), {}, ValueError, r"base_logits: expected shape \(rows, vocab\)"),
        ((BASE.long(), MEMORY, 0.5), {}, TypeError, "base_logits: expected a floating point"),
        ((BASE, MEMORY.t(), 0.5), {}, ValueError, "memory_logits: rows must be contiguous"),
        ((BASE, MEMORY[:2], 0.5), {}, ValueError, "memory_logits: 2 rows, base_logits has 3"),
        ((BASE, [MEMORY, MEMORY[:2]], [0.1, 0.1]), {}, ValueError, r"memory_logits\[1\]: 2 rows"),
        ((BASE, [], []), {}, TypeError, "memory_logits: expected a tensor or a non-empty list"),
        ((BASE, 3.0, 0.5), {}, TypeError, "memory_logits: expected a tensor"),
        (
            (BASE, MEMORY, 1.5),
            {},
            ValueError,
            r"mix_weight: expected a number in \[0, 1\], got 1.5",
        ),
        ((BASE, MEMORY, math.nan), {}, ValueError, "mix_weight: expected a number"),
        ((BASE, MEMORY, "0.5"), {}, TypeError, "mix_weight: expected a number, a tensor"),
        ((BASE, TWO, 0.5), {}, ValueError, "one number for 2 memories"),
        ((BASE, TWO, [0.5]), {}, ValueError, "1 weights for 2 memories"),
        ((BASE, TWO, [0.6, 0.6]), {}, ValueError, "add up to 1.2"),
        ((BASE, TWO, torch.full((3,), 0.1)), {}, ValueError, r"expected shape \(2,\)"),
        ((BASE, TWO, torch.full((3, 2), 0.6)), {}, ValueError, "weights of row 0 add up to 1.2"),
        ((BASE, MEMORY, torch.full((2,), 0.5)), {}, ValueError, r"expected shape \(3,\)"),
        (
            (BASE, MEMORY, torch.ones(3, dtype=torch.int64)),
            {},
            TypeError,
            "mix_weight: expected a fl",
        ),
        ((BASE, MEMORY, torch.tensor([0, -0.1, 0])), {}, ValueError, "mix_weight: row 1 has -0.1"),
        ((BASE, MEMORY, torch.tensor([0, 0, math.nan])), {}, ValueError, "row 2 has nan"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": 0.0}, ValueError, "memory_temperature"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": math.inf}, ValueError, "memory_temperature"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": 1e-45}, ValueError, "memory_temperature"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": 1e300}, ValueError, "memory_temperature"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": None}, TypeError, "memory_temperature: ex"),
        ((BASE, MEMORY, 0.5), {"memory_temperature": "a"}, TypeError, "memory_temperature: ex"),
        ((BASE, MEMORY, 0.5), {"scale": "logits"}, ValueError, "scale: expected one of"),
        ((BASE, MEMORY, 0.5), {"backend": "tpu"}, ValueError, "backend: got 'tpu'"),
        pytest.param(
            *((BASE, MEMORY, 0.5), {"backend": "cuda"}, BackendUnavailable, "cuda"),
            marks=no_cuda_here,
        ),
    ],
)
@pytest.mark.parametrize("where", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_errors(arguments, options, error, match, where):
    with pytest.raises(error, match=match):
        logit_mix(*arguments, **{"backend": where, **options})
