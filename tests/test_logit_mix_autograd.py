"""Derivatives of logit_mix, in both modes; they come from the reference backend."""

import math

import pytest
import torch
from mix_fixtures import needs_cpu, pair

from mdkernels import BackendUnavailable, logit_mix


def test_gradient():
    base, memory = (x.double().requires_grad_() for x in pair(2, 9))
    weight = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)

    def run(b, m, w):
        return logit_mix(b, m, w, memory_temperature=1.3, scale="base")

    assert torch.autograd.gradcheck(run, (base, memory, weight))
    single = memory.detach().float().requires_grad_()
    assert logit_mix(base.detach().float(), single, 0.3).requires_grad


def test_gradient_with_masked_and_dropped_entries():
    base, memory = pair(2, 9)
    base[:, 3] = memory[:, 3:5] = -math.inf
    base.requires_grad_()
    for weight in (0.3, 0.0, torch.tensor([0.0, 0.4])):
        out = logit_mix(base, memory, weight)
        (grad,) = torch.autograd.grad(out[:, 0].sum(), base)
        assert grad.isfinite().all()


@needs_cpu
def test_cpu_refuses_a_gradient():
    base, memory = pair(2, 9)
    base.requires_grad_()
    with pytest.raises(BackendUnavailable, match="requires grad"):
        logit_mix(base, memory, 0.3, backend="cpu")
    with torch.no_grad():
        logit_mix(base, memory, 0.3, backend="cpu")


def test_forward_mode():
    """The kernels know no tangents: silently, the derivative would be 0."""
    base, memory = (x.double() for x in pair(2, 9))
    weight = torch.tensor([0.3, 0.6], dtype=torch.float64)
    step = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(x, b, m, w):
        return logit_mix(x if b is None else b, x if m is None else m, w)

    for b, m, x in ((None, memory, base), (base, None, memory)):
        _, tangent = torch.func.jvp(lambda z, b=b, m=m: run(z, b, m, weight), (x,), (step,))
        h = 1e-6
        want = (run(x + h * step, b, m, weight) - run(x - h * step, b, m, weight)) / (2 * h)
        torch.testing.assert_close(tangent, want, rtol=1e-7, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(base.float(), step.float())
        out = torch.autograd.forward_ad.unpack_dual(logit_mix(dual, memory.float(), 0.3))
        assert out.tangent is not None
