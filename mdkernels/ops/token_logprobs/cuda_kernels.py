"""Launchers of csrc/cuda/token_logprobs.cu, and of sparse_kl's kernel for the backward pass, which
is that of its cross-entropy with the sign changed."""

import torch
from torch import Tensor

from .. import native
from ..checks import storage_covers
from ..sparse_kl import cuda_kernels as sparse_kl

DTYPES = sparse_kl.DTYPES

# (threads of a block, blocks of a cluster); 0: the kernel's own table.
LAUNCH = (0, 0)


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    storage_covers("logits", logits)
    labels = labels.contiguous()
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
    native.load("_cuda").module.token_logprobs(
        *native.stream(logits),
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        native.DTYPE_CODE[logits.dtype],
        labels.data_ptr(),
        ignore_index,
        logprobs.data_ptr(),
        lse.data_ptr(),
        *LAUNCH,
    )
    return logprobs, lse


def backward(logits, labels, ignore_index, lse, grad) -> Tensor:
    sparse = (None, None, None, labels, ignore_index)
    return sparse_kl.backward(logits, *sparse, lse, grad, -grad)
