"""The operators bound to small arguments on a GPU: what the tests that only a GPU can run share."""

import pytest
import torch
from helpers import variants

import mdkernels
from mdkernels import SparseTargets

DEVICE = "cuda"
OPS = ("sparse_kl", "token_logprobs", "logit_mix", "mix_argmax", "mix_sample", "knn_targets")
BACKENDS = [(op, v.backend) for op in OPS for v in variants(op) if v.device == DEVICE]
every_op = pytest.mark.parametrize(("op", "backend"), BACKENDS)


def only(*ops):
    return pytest.mark.parametrize(("op", "backend"), [b for b in BACKENDS if b[0] in ops])


def randn(rows, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (3 * torch.randn(rows, width, generator=generator, device=DEVICE)).to(dtype)


def targets_for(rows, vocab, k=64) -> tuple[SparseTargets, torch.Tensor]:
    """k distinct ids a row, uniform weights, and labels."""
    offsets = torch.arange(rows + 1, device=DEVICE) * k
    row, place = torch.arange(rows, device=DEVICE)[:, None], torch.arange(k, device=DEVICE)
    ids = ((row * 131 + place * 7919) % vocab).int().flatten()
    labels = torch.arange(rows, device=DEVICE) * 37 % vocab
    return SparseTargets(offsets, ids, torch.full_like(ids, 1.0 / k, dtype=torch.float32)), labels


class Intermediate(torch.autograd.Function):
    """A tensor that inplace=True may overwrite. Nobody asks for a gradient beyond it."""

    @staticmethod
    def forward(ctx, parameter, values):
        return values.detach()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("the gradient went past the logits")


class Call:
    """An operator bound to its small arguments; `run(*inputs)` returns a list of results."""

    def __init__(self, op, backend, rows=64, vocab=50257, dtype=torch.bfloat16):
        self.op, self.backend = op, backend
        self.options = {"backend": backend}
        self.targets, self.labels = targets_for(rows, vocab, min(64, vocab))
        self.parameter = torch.zeros((), device=DEVICE, requires_grad=True)
        if op == "knn_targets":
            generator = torch.Generator(DEVICE).manual_seed(4)
            values = torch.randint(0, 997, (vocab,), generator=generator, device=DEVICE)
            self.ids = torch.randint(0, vocab, (rows, 200), generator=generator, device=DEVICE)
            self.values = values
            self.inputs = [torch.rand(rows, 200, generator=generator, device=DEVICE) * 50]
        elif op in ("sparse_kl", "token_logprobs"):
            self.inputs = [randn(rows, vocab, dtype)]
        else:
            self.inputs = [randn(rows, vocab, dtype, 1), randn(rows, vocab, dtype, 2)]
        if op == "mix_sample":
            self.options["seeds"] = torch.arange(rows, device=DEVICE)
            self.options["offsets"] = torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def run(self, *inputs) -> list[torch.Tensor]:
        if self.op == "sparse_kl":
            z = inputs[0].detach().requires_grad_()
            out = mdkernels.sparse_kl(z, self.targets, self.labels, **self.options)
            return [*(t.detach() for t in out), *torch.autograd.grad(out.loss, z)]
        if self.op == "token_logprobs":
            z = inputs[0].detach().requires_grad_()
            out = mdkernels.token_logprobs(z, self.labels, **self.options)
            return [out.detach(), *torch.autograd.grad(out.sum(), z)]
        if self.op == "knn_targets":
            out = mdkernels.knn_targets(
                inputs[0], self.ids, self.values, temperature=3.0, **self.options
            )
            return [out.row_offsets, out.token_ids, out.probs]
        with torch.no_grad():
            return [getattr(mdkernels, self.op)(*inputs, 0.3, **self.options)]

    def in_place(self, z) -> list[torch.Tensor]:
        """sparse_kl only: loss, kl, ce, and `z` turned into the gradient."""
        logits = Intermediate.apply(self.parameter, z)
        out = mdkernels.sparse_kl(logits, self.targets, self.labels, inplace=True, **self.options)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert grad.data_ptr() == z.data_ptr()
        return [*(t.detach() for t in out), z]
