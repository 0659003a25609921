"""token_logprobs is the cross-entropy part of sparse_kl with the sign changed, so the same Triton
kernels run it, compiled without targets."""

from torch import Tensor

from ..sparse_kl import triton_kernels

OP = "token_logprobs"
DTYPES = triton_kernels.DTYPES


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _, ce, lse = triton_kernels.forward(logits, None, None, None, labels, ignore_index, op=OP)
    return ce.neg_(), lse


def backward(logits, labels, ignore_index, lse, grad) -> Tensor:
    sparse = (None, None, None, labels, ignore_index)
    return triton_kernels.backward(logits, *sparse, lse, grad, -grad, op=OP)
