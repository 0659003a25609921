"""Launchers of csrc/cuda/sparse_kl.cu, sparse_kl_loss.cu and scale_rows.cu. Nothing here copies
or converts logits, or waits."""

import torch
from torch import Tensor

from .. import native
from ..checks import loss_storages, storage_covers
from .reduction import combine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (threads of a block, blocks of a cluster, 16-byte blocks of a chunk); 0: the kernel's own table.
LAUNCH = (0, 0, 0)


def forward(logits, row_offsets, token_ids, probs, labels, ignore_index):
    # Separate tensors: the outputs of a registered operator must not share storage.
    kl, ce = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    _launch(logits, sparse, kl=kl, ce=ce, lse=lse)
    return kl, ce, lse


def backward(
    logits, row_offsets, token_ids, probs, labels, ignore_index, lse, kl_coef, ce_coef
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    _launch(logits, sparse, lse=lse, grad=grad, coefs=(kl_coef, ce_coef), lse_known=True)
    return grad


def forward_backward_(
    logits, row_offsets, token_ids, probs, labels, ignore_index, kl_coef, ce_coef
) -> tuple[Tensor, Tensor]:
    kl, ce = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    _launch(logits, sparse, kl=kl, ce=ce, grad=logits, coefs=(kl_coef, ce_coef))
    return kl, ce


def loss_grad_(
    logits, row_offsets, token_ids, probs, labels, ignore_index, kl_weight, reduction
) -> tuple[Tensor, Tensor, Tensor]:
    native_ops, where = native.load("_cuda").module, native.stream(logits)
    rows, weights = logits.shape[0], (kl_weight, 1.0 - kl_weight)
    labels = None if labels is None else labels.contiguous()
    kl_coef, ce_coef, count = coefs = logits.new_empty(3, dtype=torch.float32)
    native_ops.sparse_kl_coefs(
        *where,
        native.address(labels),
        rows,
        ignore_index,
        reduction == "mean",
        *weights,
        coefs.data_ptr(),
    )
    kl, ce = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    _launch(logits, sparse, kl=kl, ce=ce, grad=logits, coefs=(kl_coef, ce_coef))
    if reduction == "none":
        return combine(kl, ce, labels, ignore_index, kl_weight, reduction)
    sums = tuple(logits.new_empty((), dtype=torch.float32) for _ in range(3))
    native_ops.sparse_kl_sums(
        *where,
        kl.data_ptr(),
        ce.data_ptr(),
        rows,
        *weights,
        count.data_ptr(),
        *(total.data_ptr() for total in sums),
    )
    return sums


def scale_(grad: Tensor, factor: Tensor) -> None:
    # Whether the factor is 1 is decided on the device, where it is.
    storage_covers("grad", grad)
    factor = factor.to(torch.float32)
    native.load("_cuda").module.scale_rows(
        *native.stream(grad),
        grad.data_ptr(),
        grad.stride(0),
        *grad.shape,
        native.DTYPE_CODE[grad.dtype],
        factor.data_ptr(),
        0 if factor.ndim == 0 else factor.stride(0),
    )


def _launch(
    logits, sparse, *, kl=None, ce=None, lse=None, grad=None, coefs=(None, None), lse_known=False
) -> None:
    row_offsets, token_ids, probs, labels, ignore_index = sparse
    loss_storages(logits, row_offsets, token_ids, probs, labels)
    if probs is not None and probs.dtype == torch.float64:
        probs = probs.float()
    # One for all rows, or (N,): expanded upstream gradients (stride 0) become vectors. These names
    # keep them alive.
    kl_coef, ce_coef = (None if c is None else c.contiguous() for c in coefs)
    labels = None if labels is None else labels.contiguous()
    native.load("_cuda").module.sparse_kl(
        *native.stream(logits),
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        native.DTYPE_CODE[logits.dtype],
        native.address(row_offsets),
        native.address(token_ids),
        native.address(probs),
        0 if probs is None else native.DTYPE_CODE[probs.dtype],
        0 if token_ids is None else len(token_ids),
        native.address(labels),
        ignore_index,
        native.address(kl),
        native.address(ce),
        native.address(lse),
        lse_known,
        native.address(grad),
        0 if grad is None else grad.stride(0),
        native.address(kl_coef),
        native.address(ce_coef),
        0 if kl_coef is None or kl_coef.ndim == 0 else 1,
        *LAUNCH,
    )
