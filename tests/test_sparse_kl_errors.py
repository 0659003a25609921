"""Wrong arguments of sparse_kl: errors that name the argument, what came and what was expected."""

import numpy as np
import pytest
import torch
from helpers import IGNORE, csr, on, problem

from mdkernels import SparseTargets, sparse_kl
from mdkernels.ops.sparse_kl import reference

OP = "sparse_kl"
N, V = 4, 33


@pytest.fixture
def good(variant):
    return on(problem("normal", N, V, torch.float32), variant)


def call(variant, logits, targets, labels, **options):
    return sparse_kl(logits, targets, labels, backend=variant.backend, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z: z[0], ValueError, r"logits: expected shape \(rows, vocab\), got \(33,\)"),
        (lambda z: z[None], ValueError, r"logits: .*got \(1, 4, 33\).*flatten"),
        (lambda z: z.long(), TypeError, r"logits: .*floating point.*torch.int64"),
        (lambda z: z.to(torch.complex64), TypeError, r"logits: .*complex64"),
        (lambda z: z.t().contiguous().t(), ValueError, r"logits: .*stride.*contiguous\(\)"),
        (lambda z: z[:, ::2], ValueError, r"logits: .*stride"),
        (lambda z: z[:, :0], ValueError, r"logits: .*vocabulary.*empty"),
        (lambda z: z.to_sparse(), TypeError, r"logits: .*dense.*sparse"),
        (lambda z: z.tolist(), TypeError, r"logits: expected a torch.Tensor, got list"),
        (lambda z: z.cpu().numpy(), TypeError, r"logits: .*ndarray"),
        (lambda z: z[:3], ValueError, r"targets: 4 rows for 3 rows of logits"),
    ],
)
def test_logits(variant, good, change, error, message):
    logits, targets, labels = good
    with pytest.raises(error, match=message):
        call(variant, change(logits), targets, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: y.int(), TypeError, r"labels: expected int64, got torch.int32.*\.long\(\)"),
        (lambda y: y.float(), TypeError, r"labels: expected int64"),
        (lambda y: y[:3], ValueError, r"labels: expected shape \(4,\).*got \(3,\)"),
        (lambda y: y[:, None], ValueError, r"labels: expected shape \(4,\).*got \(4, 1\)"),
        (lambda y: y.to("meta"), ValueError, r"labels: expected device .*got meta"),
        (lambda y: y.tolist(), TypeError, r"labels: expected a torch.Tensor, got list"),
        (lambda y: None, ValueError, r"labels: required unless kl_weight is 1, got None with 0.5"),
    ],
)
def test_labels(variant, good, change, error, message):
    logits, targets, labels = good
    with pytest.raises(error, match=message):
        call(variant, logits, targets, change(labels))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl_weight": -0.1}, ValueError, r"kl_weight: .*\[0, 1\], got -0.1"),
        ({"kl_weight": 1.5}, ValueError, r"kl_weight: .*got 1.5"),
        ({"kl_weight": float("nan")}, ValueError, r"kl_weight: .*nan"),
        ({"kl_weight": "half"}, TypeError, r"kl_weight: .*'half'"),
        ({"kl_weight": None}, TypeError, r"kl_weight: .*None"),
        ({"reduction": "batchmean"}, ValueError, r"reduction: .*'mean'.*got 'batchmean'"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index: expected an int, got float"),
        ({"ignore_index": np.float32(3)}, TypeError, r"ignore_index: expected an int, got float32"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index: expected an int that fits 64 bits"),
        ({"ignore_index": None}, TypeError, r"ignore_index: expected an int, got NoneType"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_options(variant, good, options, error, message, inplace):
    logits, targets, labels = good
    with pytest.raises(error, match=message):
        call(variant, logits.requires_grad_() * 1, targets, labels, inplace=inplace, **options)


def test_targets_of_another_kind(variant, good):
    logits, _, labels = good
    with pytest.raises(TypeError, match=r"targets: expected SparseTargets, got Tensor.*from_dense"):
        call(variant, logits, logits.softmax(1), labels)


def test_targets_on_another_device(variant, good):
    logits, targets, labels = good
    with pytest.raises(ValueError, match=r"targets: on meta, logits on .*use \.to\(\)"):
        call(variant, logits, targets.to("meta"), labels)


def attempt(variant, logits, targets, labels, inplace):
    """Both passes; the error must come before anything is written."""
    z = logits.clone().requires_grad_() * 1
    before = z.detach().clone()
    try:
        return call(variant, z, targets, labels, inplace=inplace, reduction="none")
    except ValueError:
        assert torch.equal(z.detach(), before)
        raise


@pytest.mark.interpreted
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("bad", [-1, V, 2**31 - 1, -(2**31)])
def test_token_id_out_of_range(variant, good, bad, inplace):
    logits, _, labels = good
    targets = csr([([1], [1.0]), ([], []), ([2, bad], [0.5, 0.5]), ([0], [1.0])])
    targets = targets.to(variant.device)
    if variant.checks_values:
        with pytest.raises(
            ValueError, match=rf"targets.token_ids: row 2 has id {bad}, .*\[0, 33\)"
        ):
            attempt(variant, logits, targets, labels, inplace)
    else:
        out = attempt(variant, logits, targets, labels, inplace)
        assert out.loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.interpreted
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("bad", [-1, -101, V, 2**31, 2**32 + 5, -(2**63)])
def test_label_out_of_range(variant, good, bad, inplace):
    """2^32 + 5 would be 5 in 32 bits."""
    logits, targets, labels = good
    labels = labels.clone()
    labels[1] = bad
    if variant.checks_values:
        with pytest.raises(ValueError, match=rf"labels: row 1 has label {bad}, outside \[0, 33\)"):
            attempt(variant, logits, targets, labels, inplace)
    else:
        out = attempt(variant, logits, targets, labels, inplace)
        assert out.loss.isnan().tolist() == [False, True, False, False]


def test_the_reference_on_a_gpu_answers_what_it_cannot_raise_for(monkeypatch):
    """Where values are not looked at: a bad id or label makes its row NaN, and no other."""
    monkeypatch.setattr(reference, "find_fault", lambda *_: None)
    logits = torch.randn(N, V, requires_grad=True)
    targets = csr([([1], [1.0]), ([V], [0.5]), ([2, -1], [0.5, 0.5]), ([0], [1.0])])
    labels = torch.tensor([-1, IGNORE, 4, 5])
    out = sparse_kl(logits, targets, labels, reduction="none", backend="reference")
    out.loss.sum().backward()
    for rows in (out.loss, logits.grad.sum(1)):
        assert rows.isnan().tolist() == [True, False, True, False]
    assert logits.grad[[1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 1, 2, 3, 4], r"row_offsets: must start at 0, got 1"),
        ([0, 2, 1, 3, 4], r"row_offsets: must ascend, but row 1 ends at 1"),
        ([0, 1, 2, 3, 5], r"row_offsets: must end at the number of token_ids, but ends at 5"),
        ([0, 1, 2, 3, 3], r"row_offsets: must end at .* ends at 3"),
        ([0, 9, 9, 9, 4], r"row_offsets: must ascend, but row 3 ends at 4"),
        ([0, -5, 0, 0, 4], r"row_offsets: must ascend, but row 0 ends at -5"),
        ([0, 2**62, 2**62, 2**62, 2**62], r"row_offsets: must end at .*4611686018427387904"),
    ],
)
def test_offsets_that_are_none(variant, good, offsets, message):
    logits, _, labels = good
    if not variant.checks_values:
        pytest.skip("offsets are checked where they are free to read")
    targets = SparseTargets(
        torch.tensor(offsets), torch.arange(4, dtype=torch.int32), torch.full((4,), 0.25)
    )
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message):
            attempt(variant, logits, targets, labels, inplace)


@pytest.mark.interpreted
def test_ignore_index_inside_the_vocabulary(variant, good):
    logits, targets, labels = good
    labels = torch.full_like(labels, 5)
    labels[2] = 7
    out = call(variant, logits, targets, labels, ignore_index=5, reduction="none")
    assert out.ce.nonzero().flatten().tolist() == [2]
    labels = torch.full_like(labels, IGNORE)
    if variant.checks_values:
        with pytest.raises(ValueError, match="labels: row 0 has label -100"):
            call(variant, logits, targets, labels, ignore_index=5)
    else:
        out = call(variant, logits, targets, labels, ignore_index=5, reduction="none")
        assert out.loss.isnan().all()


@pytest.mark.interpreted
def test_labels_may_be_strided(variant, good):
    logits, targets, labels = good
    spread = torch.stack([labels, torch.full_like(labels, 31)], 1)[:, 0]
    assert not spread.is_contiguous()
    expected = call(variant, logits, targets, labels, reduction="none")
    found = call(variant, logits, targets, spread, reduction="none")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.interpreted
def test_freed_storage_is_noticed(variant, good):
    """What FSDP does to a parameter that is not gathered."""
    logits, targets, labels = good
    freed = logits.clone()
    freed.untyped_storage().resize_(0)
    if variant.backend == "reference":
        pytest.skip("eager torch reads through its own checks")
    with pytest.raises(RuntimeError, match=r"logits: its storage has been freed"):
        call(variant, freed, targets, labels)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["row_offsets", "token_ids", "probs", "labels"])
def test_freed_storage_of_the_targets_is_noticed(variant, name, good):
    """Reading it would be a crash, or a loss from whatever lies there now."""
    if variant.backend == "reference":
        pytest.skip("eager torch reads through its own checks")
    logits, targets, labels = good
    given = {f: getattr(targets, f).clone() for f in ("row_offsets", "token_ids", "probs")}
    given["labels"] = labels.clone()
    given[name].untyped_storage().resize_(0)
    labels = given.pop("labels")
    with pytest.raises(RuntimeError, match=f"{name}: its storage has been freed"):
        call(variant, logits, SparseTargets(**given), labels)
