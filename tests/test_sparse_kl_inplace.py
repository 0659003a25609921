"""What sparse_kl(inplace=True) overwrites, and what it refuses or makes an error."""

import pytest
import torch
from helpers import Problem, on, problem
from tolerances import Expected

from mdkernels import sparse_kl

OP = "sparse_kl"


@pytest.mark.interpreted(dtype=torch.float32)
def test_inplace_turns_the_logits_into_the_gradient(variant, dtype):
    p = problem("normal", 8, 301, dtype)
    logits, targets, labels = on(p, variant)
    expected = Expected(p, 0.5, 0.5)
    leaf = logits.clone().requires_grad_()
    z = leaf * 1
    out = sparse_kl(z, targets, labels, reduction="sum", inplace=True, backend=variant.backend)
    expected.check_grad(z.detach(), variant)
    out.loss.backward()
    assert torch.equal(leaf.grad, z.detach())


def test_inplace_refuses_a_parameter_and_its_views(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    leaf = logits.flatten().requires_grad_()
    before = leaf.detach().clone()
    views = (
        leaf.view(4, 33),
        leaf.detach().view(4, 33).requires_grad_(),
        leaf.view(2, 2, 33).flatten(0, 1),
    )
    for z in views:
        with pytest.raises(ValueError, match=r"inplace=True.*leaf"):
            sparse_kl(z, targets, labels, inplace=True, backend=variant.backend)
    assert torch.equal(leaf.detach(), before)


@pytest.mark.interpreted
def test_inplace_refuses_overlapping_rows(variant):
    p = problem("normal", 4, 33, torch.float32)
    _, targets, labels = on(p, variant)
    row = torch.zeros(33, device=variant.device, requires_grad=True)
    z = (row * 1).expand(4, 33)
    with pytest.raises(ValueError, match="overlap"):
        sparse_kl(z, targets, labels, inplace=True, backend=variant.backend)
    out = sparse_kl(z, targets, labels, reduction="sum", backend=variant.backend)
    out.loss.backward()
    expected = Expected(Problem(torch.zeros(4, 33), p.targets, p.labels), 0.5, 0.5)
    torch.testing.assert_close(row.grad.cpu(), expected.exact.grad.sum(0).float())


@pytest.mark.parametrize("producer", [torch.tanh, torch.exp, torch.sigmoid])
def test_inplace_on_a_tensor_somebody_saved_is_an_error(variant, producer):
    """Soft-capped logits: the backward of tanh needs its output, which is gone."""
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    z = producer(logits.requires_grad_())
    out = sparse_kl(z, targets, labels, inplace=True, backend=variant.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inplace_other_reader_of_the_logits_is_an_error(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    z = logits.requires_grad_() * 1
    z_loss = z.logsumexp(1).square().mean()
    out = sparse_kl(z, targets, labels, inplace=True, backend=variant.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + z_loss).backward()


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_inplace_second_backward_is_an_error(variant, scale):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    loss = sparse_kl(
        logits.requires_grad_() * 1, targets, labels, inplace=True, backend=variant.backend
    ).loss
    (scale * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.interpreted
def test_inplace_loss_used_twice(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    z = logits.clone().requires_grad_()
    loss = sparse_kl(z * 1, targets, labels, inplace=True, backend=variant.backend).loss
    (loss * 2 + loss.square() * 0.5).backward()
    reference = logits.clone().requires_grad_()
    sparse_kl(reference, targets, labels, backend=variant.backend).loss.backward()
    torch.testing.assert_close(z.grad, reference.grad * (2 + loss.detach()))


def test_inplace_kl_and_ce_are_reports_only(variant):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    out = sparse_kl(
        logits.requires_grad_() * 1, targets, labels, inplace=True, backend=variant.backend
    )
    assert out.loss.requires_grad
    assert not out.kl.requires_grad
    assert not out.ce.requires_grad


@pytest.mark.parametrize("mode", ["no_grad", "inference", "frozen"])
def test_inplace_without_a_gradient_leaves_the_logits_alone(variant, mode):
    p = problem("normal", 4, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    z = logits.clone().requires_grad_(mode != "frozen")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(
        mode, torch.enable_grad
    )
    with context():
        w = z * 1
        out = sparse_kl(w, targets, labels, inplace=True, backend=variant.backend)
        assert torch.equal(w, logits)
    assert not out.loss.requires_grad
    exact = Expected(p, 0.5, 0.5).exact
    live = int((p.labels >= 0).sum())
    torch.testing.assert_close(
        out.loss.cpu().double(),
        ((exact.kl + exact.ce) / 2).sum() / live,
        rtol=1e-6,
        atol=0,
        check_dtype=False,
    )


@pytest.mark.interpreted
def test_inplace_through_a_view_of_a_model_output(variant):
    """logits[:, :-1] of a (B, T, V) output: strided rows, and the last position gets 0."""
    p = problem("normal", 3, 33, torch.float32)
    logits, targets, labels = on(p, variant)
    whole = torch.cat([logits, torch.full_like(logits[:1], 5.0)]).requires_grad_()
    for inplace in (False, True):
        whole.grad = None
        model_output = whole * 1
        sparse_kl(
            model_output[:-1],
            targets,
            labels,
            reduction="sum",
            inplace=inplace,
            backend=variant.backend,
        ).loss.backward()
        Expected(p, 0.5, 0.5).check_grad(whole.grad[:-1], variant)
        assert not whole.grad[-1].any()


@pytest.mark.parametrize("ignored", [0, 3, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_inplace_reduces_as_the_two_passes_do(variant, kl_weight, reduction, ignored):
    """The in-place pass may reduce inside the kernel; the fresh one leaves it to torch."""
    p = problem("normal", 8, 67)
    logits, targets, labels = on(p, variant)
    labels[:ignored] = -100
    outs, grads = [], []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = sparse_kl(
            leaf * 1,
            targets,
            labels,
            kl_weight=kl_weight,
            reduction=reduction,
            inplace=inplace,
            backend=variant.backend,
        )
        out.loss.sum().backward()
        outs.append(torch.stack([x.detach() for x in out]))
        grads.append(leaf.grad)
    assert outs[0].shape == outs[1].shape
    assert outs[0].dtype == outs[1].dtype == torch.float32
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-6, atol=1e-7)
    if ignored == 8:
        assert not outs[1].any()
        assert not grads[1].any()
