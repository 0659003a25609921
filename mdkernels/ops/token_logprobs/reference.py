"""token_logprobs in eager torch: the specification."""

import math

import torch
from torch import Tensor

from ..checks import raise_fault


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    gold, live, poison = _gold(logits, labels, ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = z.log_softmax(1).gather(1, gold).squeeze(1)
    return logprobs.where(live, 0.0).masked_fill(poison, math.nan), z.logsumexp(1).double()


def backward(logits, labels, ignore_index, lse, grad) -> Tensor:
    gold, live, poison = _gold(logits, labels, ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    g = grad.where(live, 0.0).masked_fill(poison, math.nan)[:, None].to(z.dtype)
    dense = -g * z.softmax(1)
    return dense.scatter_add(1, gold, g).where(live[:, None], 0.0).to(logits.dtype)


def _gold(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 1) labels to gather at, which rows are not ignored, and of those which have a label out
    of range, that a GPU's device code cannot raise for."""
    live = labels != ignore_index
    bad = ((labels < 0) | (labels >= logits.shape[1])) & live
    if logits.device.type == "cpu" and bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise_fault(("label", row, int(labels[row])), logits.shape[1])
    return labels.where(live & ~bad, 0)[:, None], live, bad
