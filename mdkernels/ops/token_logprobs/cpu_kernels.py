"""token_logprobs is the cross-entropy part of sparse_kl with the sign changed, so the same C++
kernel runs it, without targets."""

from torch import Tensor

from ..sparse_kl import cpu_kernels

DTYPES = cpu_kernels.DTYPES


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _, ce, lse = cpu_kernels.forward(logits, None, None, None, labels, ignore_index)
    return ce.neg_(), lse


def backward(logits, labels, ignore_index, lse, grad) -> Tensor:
    sparse = (None, None, None, labels, ignore_index)
    return cpu_kernels.backward(logits, *sparse, lse, grad, -grad)
