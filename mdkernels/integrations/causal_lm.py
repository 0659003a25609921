"""The sparse KL + CE loss of a Hugging Face causal LM, inside the model's own forward.

The loss is computed where the LM head would have run: the model is called as always, through DDP,
FSDP2, autocast or peft, and meanwhile its head takes the scored hidden states and answers with the
loss of `linear_sparse_kl`. So every wrapper's hooks see a normal forward pass, and logits exist
for a chunk of scored rows at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models import lm_head, model_id
from ..ops.linear_sparse_kl import linear_sparse_kl
from ..ops.sparse_kl import SparseKLOutput
from ..ops.sparse_targets import SparseTargets
from .windows import IGNORE_INDEX

# Exact in fp32, bf16 and fp16, and far from what a capped or scaled logit could still be.
_MARK = 2.0**14
_unchanged: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    kl_weight: float = 0.5,
    reduction: str = "mean",
) -> SparseKLOutput:
    """The Memory Decoder loss (arXiv 2508.09874, eq. 4-6) of a batch; call .loss.backward().

    Equivalent to, with gradients for all parameters and no logits beyond a chunk of rows::

        logits = model(input_ids, attention_mask).logits.flatten(0, 1)[scored]
        labels = shift_labels.flatten()[scored]
        sparse_kl(logits, targets, labels, kl_weight=kl_weight, reduction=reduction)

    Args:
        model: a Hugging Face causal LM on the device of the batch, possibly wrapped in DDP or
            sharded by `fully_shard`. Its head must be a linear layer.
        batch: as `SparseTargetsCollator` makes it; `scored` may be missing (it is then found by
            waiting for the device), `targets` only if kl_weight is 0.
        reduction: "mean" over the scored positions, or "sum".

    Returns:
        SparseKLOutput(loss, kl, ce) in nats; kl and ce are detached.

    Raises ValueError for a model that this cannot be done with, naming what it does instead: one
    that changes its logits behind the head, was compiled as a whole, or runs in DataParallel.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a live Hugging Face causal LM, got {type(model).__name__}"
        )
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch: expected a mapping as SparseTargetsCollator makes it, got "
            f"{type(batch).__name__}"
        )
    inner = _unwrap(model)
    head = lm_head(inner)
    for name in ("input_ids", "shift_labels"):
        if name not in batch:
            raise ValueError(
                f"batch: has no {name}, got {sorted(batch)}; make it with SparseTargetsCollator"
            )
        if not isinstance(batch[name], Tensor):
            raise TypeError(f"batch: expected a tensor as {name}, got {type(batch[name]).__name__}")
    labels = batch["shift_labels"].reshape(-1)
    scored = batch.get("scored")
    if scored is None:
        scored = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    labels = labels.index_select(0, scored)
    targets = batch.get("targets")
    if targets is None:
        if kl_weight:
            raise ValueError(
                f"batch: has no targets, which kl_weight {kl_weight} needs; got {sorted(batch)}"
            )
        targets = SparseTargets.empty(len(labels), device=labels.device)
    if not isinstance(targets, SparseTargets):
        raise TypeError(f"batch: expected SparseTargets as targets, got {type(targets).__name__}")
    targets = targets.to(labels.device, non_blocking=True)

    found: list[SparseKLOutput] = []

    def loss_of(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored)
        options = {"bias": head.bias, "kl_weight": kl_weight, "reduction": reduction}
        out = linear_sparse_kl(rows, head.weight, targets, labels, **options)
        found.append(out)
        # (1, 1, 2), as logits have three dimensions; no view, which FSDP2 would warn of.
        values = [out.loss, torch.full_like(out.loss, _MARK)]
        return torch.stack([value.view(1, 1) for value in values], dim=-1)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with _instead_of(head, loss_of):
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    if head not in _unchanged:  # once per model, because it waits for the device
        if len(found) != 1 or logits.numel() != 2 or float(logits.detach()[0, 0, 1]) != _MARK:
            raise ValueError(
                f"model {model_id(inner)} ({inner.config.model_type}) changes its logits after the "
                "LM head, or calls it more than once; compute its logits and call "
                "mdkernels.sparse_kl on the scored rows"
            )
        _unchanged.add(head)
    out = found[-1]
    return SparseKLOutput(_Behind.apply(out.loss, logits), out.kl.detach(), out.ce.detach())


class _Behind(torch.autograd.Function):
    """`loss`, whose backward pass begins with that of `logits`: there FSDP2 gathers the weights.

    What logits are made of includes the loss, but a dtype policy may have rounded them.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.zeros = torch.zeros_like(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.zeros


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: is wrapped in DataParallel, which cannot split sparse targets; start one "
                "process per GPU (torchrun, accelerate launch) or show this one a single GPU"
            )
        if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
            raise ValueError(
                "model: was compiled as a whole, and the loss runs inside its forward; compile "
                "model.base_model.compile() only"
            )
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _instead_of(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, `head(x)` is `function(x)` amid the head's hooks."""
    if "forward" in vars(head):
        raise ValueError(
            f"model: the forward of its LM head was already replaced, by {head.forward!r}; load it "
            "without device_map or offloading"
        )
    head.forward = function
    try:
        yield
    finally:
        del head.forward
