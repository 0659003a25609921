"""Values and gradients of sparse_kl against dense float64 torch, on data that can fail."""

import functools
import math

import pytest
import torch
from buffers import Frame, Produce, bits
from helpers import IGNORE, LOGITS, Problem, csr, make_logits, problem
from tolerances import Expected

from mdkernels import SparseTargets, sparse_kl

OP = "sparse_kl"
KL_WEIGHT = 0.3
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, *range(60, 69), 127, 128, 129, 511, 512, 513]
BLOCKS = [4095, 4096, 4097, 8191, 12289]


@functools.cache
def solved(kind, rows, vocab, dtype, probs=torch.float32):
    p = problem(kind, rows, vocab, dtype, probs)
    return p, Expected(p, KL_WEIGHT, 1 - KL_WEIGHT)


def run(p: Problem, variant, inplace: bool, **options):
    """(per-row output, gradient) with the logits in guarded, strided, offset memory."""
    frame = Frame(p.logits, variant.device)
    leaf = torch.zeros_like(p.logits, device=variant.device, requires_grad=True)
    labels = None if p.labels is None else p.labels.to(variant.device)
    options = {"kl_weight": KL_WEIGHT, "reduction": "none", **options}
    targets = p.targets.to(variant.device)
    logits = Produce.apply(leaf, frame)
    out = sparse_kl(logits, targets, labels, inplace=inplace, backend=variant.backend, **options)
    out.loss.backward(torch.ones_like(out.loss))
    frame.check_guards()
    if not inplace:
        frame.check_unmodified()
    return out, leaf.grad


def check(p, expected, variant, inplace):
    out, grad = run(p, variant, inplace)
    expected.check_losses(out)
    expected.check_grad(grad, variant)


@pytest.mark.interpreted(
    inplace=True, dtype=torch.float32, kind=[k for k in LOGITS if k not in ("normal", "peaked")]
)
@pytest.mark.interpreted(inplace=False, dtype=torch.float32, kind=["shifted_1e4", "all_lowest"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("kind", LOGITS)
def test_kinds_of_logits(variant, dtype, kind, inplace, poisoned_memory):
    if dtype == torch.float16 and kind == "shifted_2^24":
        pytest.skip("2^24 is infinite in fp16")
    check(*solved(kind, 8, 4801, dtype), variant, inplace)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("vocab", WIDTHS + BLOCKS)
def test_widths(variant, dtype, vocab, inplace, poisoned_memory):
    check(*solved("peaked", 8, vocab, dtype), variant, inplace)


@pytest.mark.interpreted(dtype=torch.float16, inplace=True)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_gpt2_vocabulary(variant, dtype, inplace, poisoned_memory):
    check(*solved("peaked", 8, 50257, dtype), variant, inplace)


@pytest.mark.interpreted(dtype=torch.float32)
@pytest.mark.parametrize("probs", [torch.bfloat16, torch.float16, torch.float64])
def test_probs_dtypes(variant, dtype, probs):
    check(*solved("normal", 8, 301, dtype, probs), variant, False)


@pytest.mark.interpreted(dtype=torch.float32, rows=[0, 1])
@pytest.mark.parametrize("rows", [0, 1, 127, 129])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_numbers_of_rows(variant, dtype, rows, inplace):
    check(*solved("normal", rows, 33, dtype), variant, inplace)


@pytest.mark.interpreted(dtype=torch.float32)
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_weight_at_its_ends(variant, dtype, kl_weight):
    p = problem("peaked", 8, 301, dtype)
    expected = Expected(p, kl_weight, 1 - kl_weight)
    for inplace in (False, True):
        out, grad = run(p, variant, inplace, kl_weight=kl_weight)
        assert torch.equal(out.loss, out.kl if kl_weight else out.ce)
        expected.check_grad(grad, variant)


@pytest.mark.interpreted(dtype=torch.float32)
def test_without_labels_every_row_counts(variant, dtype):
    p = problem("peaked", 8, 301, dtype)
    p.labels = None
    expected = Expected(p, 1.0, 0.0)
    for inplace in (False, True):
        out, grad = run(p, variant, inplace, kl_weight=1.0)
        expected.check_losses(out)
        assert not out.ce.any()
        expected.check_grad(grad, variant)


@pytest.mark.interpreted(dtype=torch.float32)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_upstream_gradient_per_row(variant, dtype, inplace):
    """As a weighted sum of rows gives it: neither 1 nor equal in all rows, one of them 0."""
    p = problem("peaked", 8, 301, dtype)
    upstream = torch.tensor([2.0, -0.5, 0.0, 1e-3, 3.0, 0.25, 7.0, 1.5])
    coefs = KL_WEIGHT * upstream.double(), (1 - KL_WEIGHT) * upstream.double()
    expected = Expected(p, *coefs)
    frame = Frame(p.logits, variant.device)
    leaf = torch.zeros_like(p.logits, device=variant.device, requires_grad=True)
    logits = Produce.apply(leaf, frame)
    on_device = p.targets.to(variant.device), p.labels.to(variant.device)
    out = sparse_kl(
        logits, *on_device, kl_weight=KL_WEIGHT, reduction="none", inplace=inplace,
        backend=variant.backend,
    )  # fmt: skip
    out.loss.backward(upstream.to(out.loss))
    expected.check_grad(leaf.grad, variant, rescaled_by=float(upstream.abs().max()) * inplace)


@pytest.mark.interpreted(dtype=torch.float32)
def test_kl_and_ce_have_gradients_of_their_own(variant, dtype):
    p = problem("peaked", 8, 301, dtype)
    expected = Expected(p, 0.7, -1.3)
    z = p.logits.to(variant.device).requires_grad_()
    targets, labels = p.targets.to(variant.device), p.labels.to(variant.device)
    out = sparse_kl(z, targets, labels, reduction="none", backend=variant.backend)
    (0.7 * out.kl - 1.3 * out.ce).sum().backward()
    expected.check_grad(z.grad, variant)


def test_reductions(variant, dtype):
    p = problem("normal", 16, 33, dtype)
    targets, labels = p.targets.to(variant.device), p.labels.to(variant.device)
    logits = p.logits.to(variant.device)
    run = functools.partial(
        sparse_kl, logits, targets, kl_weight=KL_WEIGHT, backend=variant.backend
    )
    rows, total, mean = (run(labels, reduction=r) for r in ("none", "sum", "mean"))
    live = int((labels != IGNORE).sum())
    assert 0 < live < len(labels)
    for name in ("loss", "kl", "ce"):
        expected = getattr(rows, name).double().sum()
        close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0, check_dtype=False)
        close(getattr(total, name).double(), expected)
        close(getattr(mean, name).double(), expected / live)
    no_labels = sparse_kl(logits, targets, kl_weight=1.0, backend=variant.backend)
    every = sparse_kl(logits, targets, kl_weight=1.0, reduction="sum", backend=variant.backend)
    torch.testing.assert_close(no_labels.loss * len(logits), every.loss)


@pytest.mark.interpreted(dtype=torch.float32, reduction="mean")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_all_rows_ignored(variant, dtype, reduction, inplace):
    """Loss 0 and gradient 0, even over NaN logits."""
    p = problem("normal", 5, 33, dtype)
    p.logits[2] = torch.nan
    p.labels = torch.full((5,), IGNORE)
    out, grad = run(p, variant, inplace, reduction=reduction)
    assert all(not part.any() for part in out)
    assert not grad.any()


def test_nan_logits_reach_only_their_row(variant, dtype):
    rows = [0, 2]
    p = problem("masked", 3, 4801, dtype)
    clean = {inplace: run(p, variant, inplace) for inplace in (False, True)}
    for column in (0, 700, 4095, 4800):
        p.logits = make_logits("masked", 3, 4801, dtype)
        p.logits[1, column] = torch.nan
        for inplace in (False, True):
            out, grad = run(p, variant, inplace)
            assert out.loss[1].isnan()
            assert grad[1].isnan().all()
            assert torch.equal(out.loss[rows], clean[inplace][0].loss[rows])
            assert torch.equal(bits(grad[rows]), bits(clean[inplace][1][rows]))


@pytest.mark.interpreted(dtype=torch.float32)
def test_infinite_logits_agree_with_torch(variant, dtype):
    p = problem("normal", 8, 301, dtype)
    p.logits[1, 200] = torch.inf
    p.logits[2] = -torch.inf
    p.logits[3, 0] = torch.inf
    expected = Expected(p, KL_WEIGHT, 1 - KL_WEIGHT)
    for inplace in (False, True):
        out, grad = run(p, variant, inplace)
        bad = torch.tensor([1, 2, 3])
        assert out.ce[bad].cpu().isnan().equal(expected.exact.ce[bad].isnan())
        assert grad[bad].isnan().all()
        good = torch.tensor([0, 4, 5, 7])
        assert grad[good].isfinite().all()
        assert not expected.plain.grad[good].isnan().any()


@pytest.mark.interpreted(dtype=torch.float32)
def test_target_on_a_masked_logit_is_infinite_and_trains_the_rest(variant, dtype):
    logits = make_logits("normal", 2, 40, dtype)
    logits[:, 7] = -torch.inf
    p = Problem(logits, csr([([7, 3], [0.4, 0.6]), ([1], [1.0])]), torch.tensor([5, 7]))
    expected = Expected(p, KL_WEIGHT, 1 - KL_WEIGHT)
    assert expected.exact.kl[0] == torch.inf
    assert expected.exact.ce[1] == torch.inf
    for inplace in (False, True):
        check(p, expected, variant, inplace)


@pytest.mark.interpreted(dtype=torch.float32)
@pytest.mark.parametrize("bad", [-0.25, math.nan])
def test_bad_probability_poisons_its_row(variant, dtype, bad):
    p = problem("normal", 2, 40, dtype)
    p.targets = csr([([7, 3], [0.4, bad]), ([1], [1.0])])
    p.labels = torch.tensor([5, 7])
    out, _ = run(p, variant, False)
    assert out.kl[0].isnan()
    assert out.kl[1].isfinite()
    assert out.ce.isfinite().all()


@pytest.mark.interpreted(dtype=torch.float32)
def test_cross_entropy_alone(variant, dtype):
    """Without targets and at kl_weight 0 it is F.cross_entropy, its mean included."""
    p = problem("peaked", 9, 257, dtype)
    targets = SparseTargets.empty(9, device=variant.device)
    z, labels = p.logits.to(variant.device), p.labels.to(variant.device)
    out = sparse_kl(z, targets, labels, kl_weight=0.0, backend=variant.backend)
    exact = float(torch.nn.functional.cross_entropy(p.logits.double(), p.labels))
    assert abs(out.loss.item() - exact) <= 2.0**-20 * (1 + exact)
    assert not out.kl.any()
