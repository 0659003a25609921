"""Padded top-k teacher log-probabilities of other trainers."""

import pytest
import torch
import torch.nn.functional as F
from integration_fixtures import topk_dense, topk_examples
from pipeline_fixtures import VOCAB_SIZE

from mdkernels import sparse_kl
from mdkernels.integrations import SparseTargetsCollator, from_topk_logprobs

VOCAB = 50
NAN = float("nan")


def teacher(k=VOCAB, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, 3, VOCAB, generator=draw)).log_softmax(-1).topk(k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_distribution_equals_the_dense_kl(dtype):
    logprobs, ids = teacher()
    targets = from_topk_logprobs(ids, logprobs.to(dtype))
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    found = sparse_kl(logits, targets, kl_weight=1.0).kl
    dense = torch.zeros(2, 3, VOCAB, dtype=torch.float64)
    dense.scatter_(-1, ids, logprobs.to(dtype).double().exp())
    logq = logits.double().log_softmax(-1)
    expected = F.kl_div(logq, dense.flatten(0, 1), reduction="batchmean")
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
def test_truncation_keeps_or_spreads_the_mass(renormalize):
    logprobs, ids = teacher(4)
    dense = from_topk_logprobs(ids, logprobs, renormalize=renormalize).to_dense(VOCAB)
    mass = logprobs.double().exp().sum(-1).flatten()
    assert (mass < 0.9).any()
    expected = torch.ones_like(mass) if renormalize else mass
    assert torch.allclose(dense.sum(1).double(), expected, rtol=1e-6)


def test_all_ways_of_padding_mean_the_same():
    """K = 4, of which a position has 0 to 4; the padding repeats id 0, which is also real."""
    logprobs, ids = teacher(4)
    counts = torch.tensor([[4, 0, 2], [1, 3, 4]])
    keep = torch.arange(4) < counts[..., None]
    ids = ids.masked_fill(~keep, 0)
    expected = from_topk_logprobs(ids, logprobs, keep, temperature=2.0)
    assert expected.row_offsets.diff().tolist() == counts.flatten().tolist()
    for found in (
        from_topk_logprobs(ids, logprobs.masked_fill(~keep, -torch.inf), temperature=2.0),
        from_topk_logprobs(ids, logprobs.masked_fill(~keep, -1e9), temperature=2.0),
        from_topk_logprobs(ids.masked_fill(~keep, -1), logprobs, temperature=2.0),
        from_topk_logprobs(ids, logprobs.masked_fill(~keep, 0.0), keep.int(), temperature=2.0),
        from_topk_logprobs(
            ids.masked_fill(~keep, -(2**40)), logprobs.masked_fill(~keep, NAN), temperature=2.0
        ),
    ):
        assert torch.equal(found.row_offsets, expected.row_offsets)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.allclose(found.probs, expected.probs, rtol=1e-6)
    by_position = from_topk_logprobs(ids, logprobs, torch.tensor([[1, 0, 1], [1, 1, 0]]))
    assert by_position.row_offsets.diff().tolist() == [4, 0, 4, 4, 4, 0]


def test_nan_of_the_teacher_shows():
    logprobs, ids = teacher(4)
    logprobs[0, 1, 2] = NAN
    for options in ({}, {"renormalize": True}):
        targets = from_topk_logprobs(ids, logprobs, **options)
        with pytest.raises(ValueError, match="row 1 has nan"):
            targets.validate(VOCAB)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": torch.zeros(2, 3, 4)}, ValueError, r"position \(0, 0\) .* sum to 4"),
        ({"logprobs": torch.zeros(2, 3, 5)}, ValueError, "one shape"),
        ({"logprobs": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "floating dtype"),
        ({"token_ids": torch.zeros(2, 3, 4)}, TypeError, "ids: expected integers"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask: expected \(2, 3, 4\) or \(2, 3\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number"),
        ({"temperature": "a"}, TypeError, "temperature: expected a number, got 'a'"),
        ({"token_ids": None}, TypeError, r"token_ids: expected a torch\.Tensor, got NoneType"),
        ({"logprobs": None}, TypeError, r"logprobs: expected a torch\.Tensor, got NoneType"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    logprobs, ids = teacher(4)
    with pytest.raises(error, match=message):
        from_topk_logprobs(**{"token_ids": ids, "logprobs": logprobs} | changes)


# --- the same as columns of a dataset


@pytest.mark.parametrize("renormalize", [False, True])
def test_columns_become_the_targets_of_the_scored_positions(renormalize):
    examples = topk_examples()
    batch = SparseTargetsCollator(renormalize=renormalize)(examples)
    expected = topk_dense(examples, renormalize)
    assert len(batch["scored"]) == len(expected)
    found = batch["targets"].to_dense(VOCAB_SIZE).double()
    assert torch.allclose(found, expected, rtol=1e-6)
    for example in examples:  # with labels that are shifted, so are the rows
        for name in ("target_token_ids", "target_logprobs", "target_mask"):
            example[name] = [*example[name][1:], example[name][0]]
        example["shift_labels"] = [*example.pop("labels")[1:], -100]
    shifted = SparseTargetsCollator(renormalize=renormalize)(examples)
    assert torch.equal(shifted["shift_labels"], batch["shift_labels"])
    assert torch.equal(shifted["targets"].to_dense(VOCAB_SIZE).double(), found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_logprobs": None}, r"target_logprobs of number 1 is NoneType, .* \(6, k\)"),
        ({"target_token_ids": [[1, 2], [3]] * 3}, "target_token_ids of number 1 is list"),
        ({"target_mask": [[1] * 4] * 5}, r"target_mask of number 1 is \(5, 4\), .* \(6, k\)"),
        ({"target_mask": [[1] * 3] * 6}, r"number 1: mask: expected"),
        ({"target_logprobs": [[0.0] * 4] * 6}, "number 1: logprobs: .* sum to 4"),
        ({"targets": from_topk_logprobs(*teacher()[::-1])}, "expected targets or"),
    ],
)
def test_bad_columns_are_named(changes, message):
    examples = topk_examples()
    examples[1] |= changes
    with pytest.raises(ValueError, match=message):
        SparseTargetsCollator()(examples)
