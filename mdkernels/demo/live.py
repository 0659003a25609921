"""The fused loss against eager torch on the demo's own targets, measured while the reader waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.sparse_kl import sparse_kl
from ..ops.sparse_targets import SparseTargets

KL_WEIGHT = 0.5


def dense_loss(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
    """The published training loss: a dense (N, V) target, KL of it, and cross-entropy.

    The published code fills the target in a Python loop over rows; here one call does it.
    """
    dense = targets.probs.new_zeros(logits.shape)
    dense[targets.row_ids(), targets.token_ids.long()] = targets.probs
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kl = F.kl_div(F.log_softmax(logits, dim=-1), dense, reduction="batchmean")
    return KL_WEIGHT * kl + (1 - KL_WEIGHT) * F.cross_entropy(logits, labels)


def sparse_loss(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
    """What a careful user writes: one log_softmax, and gathers at the targets."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    rows = targets.row_ids()
    picked = logprobs[rows, targets.token_ids.long()]
    kl = (targets.probs * (targets.probs.log() - picked)).sum() / len(logits)
    return KL_WEIGHT * kl + (1 - KL_WEIGHT) * F.nll_loss(logprobs, labels)


def fused_loss(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
    return sparse_kl(logits, targets, labels, kl_weight=KL_WEIGHT, inplace=True).loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "official dense": dense_loss,
    "eager sparse": sparse_loss,
    "fused in place": fused_loss,
}


def compare_losses(
    targets: SparseTargets,
    labels: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    rounds: int = 15,
    seed: int = 0,
) -> dict[str, Any]:
    """Median milliseconds of forward and backward of each loss, in interleaved rounds.

    The fused loss and its gradient are compared first with the dense ones in float64: RuntimeError
    if they differ by more than rounding at `dtype`. Logits are random, with a spread of 3 nats.
    """
    generator = torch.Generator().manual_seed(seed)
    source = (3 * torch.randn(len(labels), vocab_size, generator=generator)).to(dtype)
    source, labels, targets = (
        source.to(targets.device),
        labels.to(targets.device),
        SparseTargets(targets.row_offsets, targets.token_ids, targets.probs.float()),
    )

    def call(loss: Callable[..., Tensor]) -> tuple[float, Tensor, Tensor]:
        leaf = source.detach().requires_grad_()
        logits = leaf.clone()  # an intermediate result, as an LM head's output is
        _synchronise(logits)
        began = time.perf_counter()
        value = loss(logits, targets, labels)
        value.backward()
        _synchronise(logits)
        return time.perf_counter() - began, value.detach(), leaf.grad

    # Not with the dense loss at `dtype`: torch's own fp32 normaliser may be off by more than ours.
    exact = source.double().requires_grad_()
    wide = SparseTargets(targets.row_offsets, targets.token_ids, targets.probs.double())
    expected = dense_loss(exact, wide, labels)
    expected.backward()
    _, found, fused_gradient = call(fused_loss)
    tolerance = 4 * torch.finfo(dtype).eps
    worst = float((fused_gradient.double() - exact.grad).abs().max() * len(labels))
    off = abs(float(found) / float(expected.detach()) - 1)
    if worst > tolerance or off > 1e-4:
        raise RuntimeError(
            f"the fused loss differs from the dense one in float64: loss by {off:.1e}, gradient "
            f"by {worst:.1e}"
        )
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            times[name].append(call(loss)[0] * 1e3)
    return {
        "rows": len(labels),
        "vocab_size": vocab_size,
        "targets_per_row": targets.nnz / len(labels),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "quartiles": {name: _quartiles(values) for name, values in times.items()},
        "gradient_error": worst,
    }


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
