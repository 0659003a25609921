"""sparse_kl under autograd: its gradient is that of the loss it returns, alone and in a model."""

import pytest
import torch
from helpers import Problem, csr, make_logits, on, problem
from tolerances import Expected
from torch.utils.checkpoint import checkpoint

from mdkernels import SparseTargets, sparse_kl

OP = "sparse_kl"
REDUCTIONS = ["mean", "sum", "none"]


def small(dtype=torch.float64, rows=6, vocab=11):
    """Zero entries, repeated ids, mass 0 / below / above 1, an ignored row: all in six rows."""
    targets = csr(
        [
            ([], []),
            ([3], [1.0]),
            ([4, 4, 4, 9], [0.1, 0.2, 0.3, 0.1]),
            (range(vocab), torch.linspace(0.0, 0.5, vocab)),
            ([0, vocab - 1], [0.25, 0.75]),
            ([1, 2], [0.5, 0.5]),
        ],
        dtype,
    )
    labels = torch.tensor([0, 3, 4, -100, vocab - 1, 7])
    return Problem(3 * make_logits("normal", rows, vocab, dtype), targets, labels)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(kl_weight, reduction):
    p = small()

    def loss(z):
        return sparse_kl(z, p.targets, p.labels, kl_weight=kl_weight, reduction=reduction).loss

    torch.autograd.gradcheck(loss, p.logits.requires_grad_())


def test_gradcheck_of_kl_and_ce_together():
    p = small()

    def parts(z):
        out = sparse_kl(z, p.targets, p.labels, reduction="none")
        return out.kl, out.ce, out.loss

    torch.autograd.gradcheck(parts, p.logits.requires_grad_())


def test_second_derivative_is_an_error():
    p = small()
    z = p.logits.requires_grad_()
    (grad,) = torch.autograd.grad(sparse_kl(z, p.targets, p.labels).loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.25, 1.0])
def test_gradient_belongs_to_the_returned_loss(variant, kl_weight, reduction, inplace):
    """Central difference of the loss itself along a direction, fp32, with upstream gradients that
    are neither 1 nor equal. Error: the truncation, step^2 / 6 times a third cumulant of a direction
    bounded by 1 (at most 2 a row), and the roundings of two losses over two steps."""
    p = problem("normal", 16, 331, torch.float32)
    logits, targets, labels = on(p, variant)
    direction = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    direction = direction.to(variant.device)
    options = {"kl_weight": kl_weight, "reduction": reduction, "backend": variant.backend}
    upstream = torch.linspace(-1, 2, 16) if reduction == "none" else torch.tensor(2.5)
    upstream = upstream.to(variant.device)

    def value(z):
        return (sparse_kl(z, targets, labels, **options).loss.double() * upstream).sum()

    leaf = logits.clone().requires_grad_()
    out = sparse_kl(leaf * 1, targets, labels, inplace=inplace, **options)
    out.loss.backward(upstream)
    slope = (leaf.grad.double() * direction).sum()

    step = 2.0**-7
    numeric = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    rows = 1.0 if reduction == "mean" else float(len(logits))
    weight = float(upstream.abs().max()) * rows * 3.0  # the heaviest row has mass 3
    magnitude = float(upstream.abs().max()) * float(sparse_kl(leaf, targets, labels, **options).loss
        .detach().abs().sum())  # fmt: skip
    allowed = weight * step**2 / 3 + 16 * 2.0**-24 * (magnitude + weight) / step
    assert abs(float(slope - numeric)) <= allowed
    assert allowed < 0.1 * abs(float(numeric)), "the test could not fail"


def test_a_constant_shift_has_no_gradient_when_mass_is_one(variant):
    p = problem("peaked", 8, 331, torch.float32)
    p.targets = csr([([1, 5, 9], [0.5, 0.25, 0.25])] * 8)
    logits, targets, labels = on(p, variant)
    z = logits.requires_grad_()
    sparse_kl(
        z, targets, labels, kl_weight=0.4, reduction="sum", backend=variant.backend
    ).loss.backward()
    # One rounding per entry, entries whose absolute values add up to at most 2.
    assert z.grad.double().sum(1).abs().max() <= 2 * 16 * 2.0**-24


def test_fresh_second_backward_is_right(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    z = logits.requires_grad_()
    loss = sparse_kl(z, targets, labels, backend=variant.backend).loss
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * once)


def test_targets_and_labels_are_never_written(variant):
    p = problem("normal", 8, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    kept = [t.clone() for t in (targets.row_offsets, targets.token_ids, targets.probs, labels)]
    sparse_kl(
        logits.requires_grad_() * 1, targets, labels, inplace=True, backend=variant.backend
    ).loss.backward()
    now = (targets.row_offsets, targets.token_ids, targets.probs, labels)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def linear_step(hidden, weight, targets, labels, variant, inplace, autocast=False, remat=False):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def head(h):
        with torch.autocast(variant.device, torch.bfloat16, enabled=autocast):
            logits = torch.nn.functional.linear(h, weight)
            assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
            return sparse_kl(logits, targets, labels, inplace=inplace, backend=variant.backend).loss

    loss = checkpoint(head, hidden, use_reentrant=False) if remat else head(hidden)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.fixture
def layer(variant):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=draw), torch.randn(301, 16, generator=draw)
    p = problem("normal", 8, 301, torch.float32)
    _, targets, labels = on(p, variant)
    return hidden.to(variant.device), weight.to(variant.device), targets, labels


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_activation_checkpointing_changes_nothing(variant, layer, inplace):
    plain = linear_step(*layer, variant, inplace)
    remat = linear_step(*layer, variant, inplace, remat=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, remat, strict=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_autocast(variant, layer, inplace):
    """bf16 logits of a linear layer go in as they are; the loss is fp32 arithmetic on them."""
    if torch.bfloat16 not in variant.dtypes():
        pytest.skip(f"{variant} takes no bf16")
    hidden, weight, targets, labels = layer
    loss, *grads = linear_step(*layer, variant, inplace, autocast=True)
    bf16 = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16())
    exact = Expected(Problem(bf16.cpu(), targets.to("cpu"), labels.cpu()), 0.5, 0.5).exact
    live = int((labels >= 0).sum())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.cpu().double(), ((exact.kl + exact.ce) / 2).sum() / live, rtol=2e-6, atol=0
    )
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


def test_empty_targets_are_cross_entropy_alone(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, _, labels = on(p, variant)
    z = logits.requires_grad_()
    targets = SparseTargets.empty(4, device=variant.device)
    sparse_kl(z, targets, labels, kl_weight=0.0, backend=variant.backend).loss.backward()
    reference = logits.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(reference, labels).backward()
    torch.testing.assert_close(z.grad, reference.grad)
