"""LM head and loss in plain torch, and problems for them: what the tests of the linear operators
share. The oracle materialises everything and shares no code with the package."""

import dataclasses

import torch
import torch.nn.functional as F
from helpers import IGNORE, dense_probs, problem

from mdkernels import SparseTargets, linear_sparse_kl

WIDTH = 24


@dataclasses.dataclass
class Head:
    """Leaves, on the device of the test."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: SparseTargets
    labels: torch.Tensor | None

    def leaves(self):
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def run(self, **options):
        inputs = self.hidden, self.weight, self.targets, self.labels
        return linear_sparse_kl(*inputs, bias=self.bias, **options)

    def grads(self, **options):
        """(outputs, gradients by name) of the loss times `upstream` (default 1, or rows of it)."""
        upstream = options.pop("upstream", None)
        for leaf in self.leaves().values():
            leaf.grad = None
        out = self.run(**options)
        upstream = torch.ones_like(out.loss) if upstream is None else upstream.to(out.loss)
        out.loss.backward(upstream)
        return out, {name: leaf.grad for name, leaf in self.leaves().items()}


def make_head(
    rows=19, vocab=203, dtype=torch.float32, device="cpu", bias=True, seed=0, scale=0.5, width=WIDTH
) -> Head:
    """Ragged targets of all sorts, an odd vocabulary, logits of a few units."""
    draw = torch.Generator().manual_seed(seed)
    p = problem("normal", rows, vocab, torch.float32, seed=seed)
    hidden = torch.randn(rows, width, generator=draw)
    weight = torch.randn(vocab, width, generator=draw) * scale
    offset = torch.randn(vocab, generator=draw) if bias else None
    hidden, weight, offset = (
        None if t is None else t.to(device, dtype).requires_grad_()
        for t in (hidden, weight, offset)
    )
    return Head(hidden, weight, offset, p.targets.to(device), p.labels.to(device))


@dataclasses.dataclass
class Solution:
    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor
    grads: dict
    terms: dict  # the gradients if no two terms of a logit's gradient cancelled


def solve(head: Head, dtype, kl_weight=0.5, reduction="mean", upstream=None) -> Solution:
    """F.linear in `dtype`, the dense loss on it in fp32 (fp64 for fp64), autograd."""
    leaves = {
        name: leaf.detach().cpu().to(dtype).requires_grad_() for name, leaf in head.leaves().items()
    }
    z = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    logq = (z if dtype == torch.float64 else z.float()).log_softmax(1)
    p = dense_probs(head.targets, z.shape[1]).to(logq)
    kl = torch.where(p > 0, p * (p.log() - logq), 0.0).sum(1)
    ce, count = torch.zeros_like(kl), max(len(kl), 1)
    if head.labels is not None:
        labels = head.labels.cpu()
        kl = kl.where(labels != IGNORE, 0.0)
        ce = F.nll_loss(logq, labels, ignore_index=IGNORE, reduction="none")
        count = max(int((labels != IGNORE).sum()), 1)
    if reduction != "none":
        kl, ce = (part.sum() / (count if reduction == "mean" else 1) for part in (kl, ce))
    loss = kl_weight * kl + (1 - kl_weight) * ce
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    loss.backward(upstream)
    found = {name: leaf.grad.double() for name, leaf in leaves.items()}
    factor = upstream.abs() / (count if reduction == "mean" else 1)
    terms = _terms(leaves, logq.exp(), p, head.labels, kl_weight, factor)
    return Solution(*(part.detach().double() for part in (loss, kl, ce)), found, terms)


@torch.no_grad()
def _terms(leaves, q, p, labels, kl_weight, factor) -> dict:
    """Roundings are relative to these, not to their difference, which a vocabulary of 1 makes 0."""
    gold = torch.zeros_like(q)
    if labels is not None:
        labels = labels.cpu()
        live = (labels != IGNORE)[:, None].to(q)
        gold.scatter_(1, labels.clamp(min=0)[:, None], live)
        p, q = p * live, q * live
    size = kl_weight * (p.sum(1, keepdim=True) * q + p) + (1 - kl_weight) * (q + gold)
    size = (size * factor.reshape(-1, 1)).double()
    hidden, weight = (leaves[name].double().abs() for name in ("hidden", "weight"))
    return {"hidden": size @ weight, "weight": size.t() @ hidden, "bias": size.sum(0)}


def check(out, grads, head: Head, dtype, exact: Solution, plain: Solution) -> None:
    """Losses and gradients no worse than 1.5 times plain torch at the same dtype, both against
    float64; the floors are 8 roundings of fp32 terms, and two of the gradient's own dtype."""
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-24
    for name in ("loss", "kl", "ce"):
        ours, want = getattr(out, name).detach().cpu().double(), getattr(exact, name)
        worst = (getattr(plain, name) - want).abs().max() if want.numel() else 0.0
        allowed = 1.5 * worst + 32 * unit * (1 + want.abs())
        assert bool(((ours - want).abs() <= allowed).all()), f"{name}: {ours} instead of {want}"
    for name, leaf in head.leaves().items():
        assert grads[name].dtype == leaf.dtype
        assert grads[name].shape == leaf.shape
        if leaf.numel() == 0:
            continue
        ours, want = grads[name].cpu().double(), exact.grads[name]
        own = torch.finfo(leaf.dtype).eps
        for what, norm in (("largest", torch.inf), ("euclidean", 2)):
            error = torch.linalg.vector_norm(ours - want, norm)
            least = torch.linalg.vector_norm(plain.grads[name] - want, norm)
            size = torch.linalg.vector_norm(want, norm)
            terms = torch.linalg.vector_norm(exact.terms[name], norm)
            allowed = 1.5 * least + 8 * unit * terms + own * size
            assert error <= allowed, f"{name}, {what} error: {error:.3g}, allowed {allowed:.3g}"
