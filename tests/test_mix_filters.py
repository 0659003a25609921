"""Where top-k, top-p and min-p are decided by little: ties, masks, steps, nothing to leave out."""

import math

import mix_fixtures
import pytest
import torch
from mix_fixtures import fewer, generator, mix_sample
from test_mix_sample import check

backend = mix_fixtures.backend


@pytest.mark.interpreted(backend="triton")
def test_ties_are_ranked_by_id(backend):
    base = torch.randint(0, 3, (fewer(backend, 200, 2), 331), generator=generator(0)).float()
    for filters in ({"top_p": 0.4}, {"top_k": 20}, {"top_k": 200, "top_p": 0.7}):
        assert check(base, base.clone(), 0.5, backend, **filters) > 0.9
    rows, kept = fewer(backend, (300, 10), (8, 2))
    flat, top_p = torch.zeros(rows, 100), kept / 100 - 0.0049
    drawn = mix_sample(flat, flat, 0.5, seeds=1, top_p=top_p, backend=backend)
    assert set(drawn.tolist()) == set(range(kept))


AWKWARD = {
    "top_k_1": {"top_k": 1},
    "top_k_past_the_mask": {"top_k": 7, "min_p": 0.5},
    "top_k_all": {"top_k": 1031, "top_p": 0.6},
    "top_p_0": {"top_p": 0.0},
    "top_p_tiny": {"top_p": 1e-9, "temperature": 50.0},
    "top_p_near_1": {"top_p": 1.0 - 1e-9, "temperature": 0.01},
    "min_p_1": {"min_p": 1.0},
}


@pytest.mark.parametrize("filters", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.interpreted(backend="triton", filters=[AWKWARD["top_k_past_the_mask"]])
def test_filters_of_awkward_rows(backend, filters):
    """Equal logits, one token, three tokens in two parts, steps of 1e4, two values."""
    rows = torch.zeros(5, 1031)
    rows[1:3] = -math.inf
    rows[1, 700] = 3.0
    rows[2, [3, 4, 1030]] = torch.tensor([1.0, 2.0, 1.0])
    rows[3] = 1e4 * torch.arange(1031)[torch.randperm(1031, generator=generator(0))]
    rows[4, 5::7] = 1.0
    check(rows, rows.clone(), 0.5, backend, **filters)
