"""Launchers of the C++ kernel csrc/cpu/sparse_kl.inl. Nothing here copies or converts logits."""

import torch
from torch import Tensor

from .. import native
from ..checks import loss_storages, raise_fault
from .reduction import combine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    grad = native.empty_huge(logits, logits.shape)
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    _launch(logits, sparse, lse=lse, grad=grad, coefs=(kl_coef, ce_coef), grad_only=True)
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
    kl, ce = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    if reduction == "none":
        _launch(logits, sparse, kl=kl, ce=ce, grad=logits, kl_weight=kl_weight)
        return combine(kl, ce, labels, ignore_index, kl_weight, reduction)
    totals = tuple(kl.new_empty(()) for _ in range(3))
    _launch(
        logits,
        sparse,
        kl=kl,
        ce=ce,
        grad=logits,
        kl_weight=kl_weight,
        mean=reduction == "mean",
        totals=totals,
    )
    return totals


def scale_(grad: Tensor, factor: Tensor) -> None:
    # Almost always the loss is the root of the graph and this is 1: no pass over (N, V).
    if factor.ndim == 0 and float(factor) == 1.0:
        return
    grad.mul_(factor if factor.ndim == 0 else factor[:, None])


def add_product_(
    high: Tensor, low: Tensor | None, product: Tensor, *, low_known: bool, last: bool
) -> None:
    """For linear_sparse_kl: add bf16 numbers to an fp32 sum in two halves, all contiguous. `high`
    (bf16) has the upper bits of the sum, `low` (int16) the lower ones, which are 0 without
    `low_known`. With `last`, `high` becomes the rounded sum and `low`, unless it is known, may be
    None."""
    native.load("_cpu").module.split_sum(
        high.data_ptr(),
        native.address(low),
        product.data_ptr(),
        product.numel(),
        low_known,
        last,
        torch.get_num_threads(),
    )


def _launch(
    logits,
    sparse,
    *,
    kl=None,
    ce=None,
    lse=None,
    grad=None,
    coefs=(None, None),
    grad_only=False,
    kl_weight=0.0,
    mean=False,
    totals=(None, None, None),
) -> None:
    """With a gradient, `coefs` are the factors of every row, or None: then they are `kl_weight` and
    what it leaves of 1, over the number of rows that count if `mean`."""
    row_offsets, token_ids, probs, labels, ignore_index = sparse
    loss_storages(logits, row_offsets, token_ids, probs, labels)
    if probs is not None and probs.dtype == torch.float64:
        probs = probs.float()
    rows, vocab = logits.shape
    # Expanded upstream gradients (stride 0) become vectors; these names keep them alive.
    kl_coef, ce_coef = (None if c is None else c.contiguous() for c in coefs)
    labels = None if labels is None else labels.contiguous()
    fault = native.load("_cpu").module.sparse_kl(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocab,
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
        grad_only,
        native.address(grad),
        0 if grad is None else grad.stride(0),
        native.address(kl_coef),
        native.address(ce_coef),
        kl_weight,
        mean,
        *(native.address(total) for total in totals),
        torch.get_num_threads(),
    )
    raise_fault(fault, vocab)
