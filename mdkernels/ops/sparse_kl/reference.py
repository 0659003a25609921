"""sparse_kl in eager torch: the specification, fp32 arithmetic (fp64 for fp64 logits)."""

import math

import torch
from torch import Tensor

from ..checks import find_fault, raise_fault
from .reduction import loss_grad_through


def forward(logits, row_offsets, token_ids, probs, labels, ignore_index):
    rows, ids, p, gold, live, poison = _merged(
        logits, row_offsets, token_ids, probs, labels, ignore_index
    )
    z = _wide(logits)
    lse = z.logsumexp(1)
    # Through the maximum, not through lse: at logits near 1e4 an fp32 lse has lost three digits.
    top = z.amax(1)
    log_normalizer = (z - top[:, None]).exp().sum(1).log()
    logprob = z[rows, ids] - top[rows] - log_normalizer[rows]
    terms = torch.where(p == 0, 0.0, p * (p.log() - logprob))
    kl = _sum_rows(terms, rows, z)
    ce = torch.zeros_like(kl)
    if labels is not None:
        ce = log_normalizer - (z.gather(1, gold).squeeze(1) - top)
    kl, ce = (term.where(live, 0.0).masked_fill(poison, math.nan) for term in (kl, ce))
    return kl, ce, lse.where(live, 0.0).double()


def backward(
    logits, row_offsets, token_ids, probs, labels, ignore_index, lse, kl_coef, ce_coef
) -> Tensor:
    rows, ids, p, gold, live, poison = _merged(
        logits, row_offsets, token_ids, probs, labels, ignore_index
    )
    z = _wide(logits)
    kl_coef, ce_coef = kl_coef.to(z.dtype), ce_coef.to(z.dtype)
    if labels is None:
        ce_coef = torch.zeros_like(kl_coef)
    mass = _sum_rows(p, rows, z)
    grad = z.softmax(1) * (kl_coef * mass + ce_coef)[:, None]
    grad.index_put_((rows, ids), -kl_coef[rows] * p, accumulate=True)
    if labels is not None:
        grad.scatter_add_(1, gold, -ce_coef[:, None])
    grad = grad.where(live[:, None], 0.0).masked_fill(poison[:, None], math.nan)
    return grad.to(logits.dtype)


def forward_backward_(
    logits, row_offsets, token_ids, probs, labels, ignore_index, kl_coef, ce_coef
) -> tuple[Tensor, Tensor]:
    sparse = (row_offsets, token_ids, probs, labels, ignore_index)
    kl, ce, lse = forward(logits, *sparse)
    logits.copy_(backward(logits, *sparse, lse, kl_coef, ce_coef))
    return kl, ce


def loss_grad_(logits, *arguments):
    return loss_grad_through(forward_backward_, logits, *arguments)


def scale_(grad: Tensor, factor: Tensor) -> None:
    grad.mul_(factor if factor.ndim == 0 else factor[:, None])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum_rows(values: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """Sums of the entries of each row; in fp64, since index_add_ adds one after the other."""
    sums = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, rows, values.double()).to(logits.dtype)


def _merged(logits, row_offsets, token_ids, probs, labels, ignore_index) -> tuple[Tensor, ...]:
    """Distinct (row, id) pairs and their summed probability; (N, 1) labels to gather at; and which
    rows are not ignored, and of those which have an id or label out of range, that a GPU's device
    code cannot raise for."""
    num_rows, vocab = logits.shape
    if logits.device.type == "cpu":
        raise_fault(find_fault(row_offsets, token_ids, vocab, labels, ignore_index), vocab)
    if len(token_ids):  # on a GPU the offsets may be a window into those of a larger batch
        first, last = int(row_offsets[0]), int(row_offsets[-1])
        token_ids, probs = token_ids[first:last], probs[first:last]
    lengths = row_offsets.diff()
    rows = torch.repeat_interleave(torch.arange(num_rows, device=logits.device), lengths)
    live = torch.ones(num_rows, dtype=torch.bool, device=logits.device)
    gold, poison = torch.zeros_like(live, dtype=torch.int64), ~live
    if labels is not None:
        live = labels != ignore_index
        poison = live & ((labels < 0) | (labels >= vocab))
        gold = labels.where(live & ~poison, 0)
    unknown = (token_ids < 0) | (token_ids >= vocab)
    poison = poison | (live & (gold.new_zeros(num_rows).index_add_(0, rows, unknown.long()) > 0))
    token_ids = token_ids.masked_fill(unknown, 0)
    keys, inverse = torch.unique(rows * vocab + token_ids, return_inverse=True)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    merged = torch.zeros(len(keys), dtype=torch.float64, device=logits.device)
    merged.index_add_(0, inverse, probs.double())
    return keys // vocab, keys % vocab, merged.to(wide), gold[:, None], live, poison
