"""How the (N,) kl and ce of sparse_kl become the loss, in plain torch: for every backend that does
not do it in its kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def valid_rows(rows: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor | int:
    """How many rows count, at least 1: a batch without any has loss 0, not NaN."""
    if labels is None:
        return max(rows.shape[0], 1)
    return (labels != ignore_index).sum().clamp(min=1)


def combine(kl, ce, labels, ignore_index, kl_weight, reduction) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kl, ce), reduced and weighed. A weight of 0 drops its term: 0 * inf is NaN."""
    if reduction != "none":
        count = valid_rows(kl, labels, ignore_index) if reduction == "mean" else 1
        kl, ce = kl.sum() / count, ce.sum() / count
    if kl_weight in (0.0, 1.0):
        return (kl if kl_weight else ce).clone(), kl, ce
    return kl_weight * kl + (1.0 - kl_weight) * ce, kl, ce


def loss_grad_through(forward_backward_: Callable, logits, *arguments):
    """The operator's `loss_grad_` out of a kernel that takes the factor of every row.

    `forward_backward_(logits, *sparse, kl_coef, ce_coef)` returns (N,) kl and ce and writes the
    gradient of ``(kl_coef * kl + ce_coef * ce).sum()`` over the logits.
    """
    *sparse, kl_weight, reduction = arguments
    labels, ignore_index = sparse[-2:]
    row = torch.ones(logits.shape[0], dtype=wide_dtype(logits), device=logits.device)
    if reduction == "mean":
        row = row / valid_rows(row, labels, ignore_index)
    kl, ce = forward_backward_(logits, *sparse, kl_weight * row, (1.0 - kl_weight) * row)
    return combine(kl, ce, labels, ignore_index, kl_weight, reduction)
