"""Bootstrap intervals: their units, their coverage, and a plain loop over draws."""

import numpy as np
import pytest
import torch

from mdkernels.bootstrap import block_starts, document_starts, mean_intervals, paired_interval


def test_units_of_documents_begin_with_the_row_of_their_first_token():
    # Tokens 0-3, 4, 5-9, 10: row r predicts token r + 1, so token 4 is that of row 3.
    assert document_starts(np.array([0, 4, 5, 10, 11]), 10).tolist() == [0, 3, 4, 9]
    # A first document of one token is predicted by nobody.
    assert document_starts(np.array([0, 1, 3]), 2).tolist() == [0]


def test_blocks_are_short_where_the_text_is():
    assert block_starts(100_000, 4096).tolist() == list(range(0, 100_000, 4096))
    assert len(block_starts(1000)) == 20
    assert block_starts(7).tolist() == list(range(7))


def test_intervals_are_quantiles_over_paired_draws_of_whole_units(monkeypatch):
    monkeypatch.setattr("mdkernels.bootstrap._SLAB", 40)  # several slabs
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 101)) * np.array([[1.0], [5.0], [0.1]])
    values[2] = values[0] - 2.0  # shifted by 2 in every draw, if draws are paired
    starts = np.array([0, 1, 30, 31, 60, 100])
    options = {"draws": 500, "level": 0.8, "seed": 3}
    found = mean_intervals(values, starts, **options)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found[2], found[0] - 2.0, atol=1e-12)
    np.testing.assert_array_equal(
        found, mean_intervals(values, starts, draws=500, level=0.8, seed=3)
    )
    units = np.split(values, starts[1:], axis=1)
    means = []
    for _ in range(4000):
        picked = [units[i] for i in rng.integers(0, 6, 6)]
        means.append(np.concatenate(picked, axis=1).mean(1))
    expected = np.quantile(np.array(means), [0.1, 0.9], axis=0).T
    width = (expected[:, 1] - expected[:, 0])[:, None]
    assert (np.abs(found - expected) < 0.15 * width).all()


def test_equal_values_have_no_interval():
    found = mean_intervals(np.full((1, 50), 0.25), np.array([0, 10, 40]))
    assert found.tolist() == [[0.25, 0.25]]


def logprobs(rows, seed):
    return torch.from_numpy(-np.random.default_rng(seed).exponential(3.0, rows)).float()


def test_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = torch.from_numpy(rng.normal(0.3, 1.0, 2000))
        mean, low, high = paired_interval(sample, block=50, draws=300, seed=trial)
        assert low < mean < high
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_repeats_with_its_seed_and_takes_any_length():
    values = logprobs(1003, 0)
    assert paired_interval(values, seed=1) == paired_interval(values, seed=1)
    assert paired_interval(values, seed=1) != paired_interval(values, seed=2)
    assert paired_interval(torch.tensor([0.5])) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no token"):
        paired_interval(torch.empty(0))
