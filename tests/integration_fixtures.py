"""A dense float64 oracle of the loss for batches of the integrations, without the package's ops."""

import torch
import torch.nn.functional as F
from helpers import dense_probs


def dense_loss(model, batch, kl_weight, reduction="mean"):
    """kl_weight * KL + (1 - kl_weight) * CE over the scored positions; differentiable."""
    mask = batch.get("attention_mask")
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.flatten(0, 1)
    labels = batch["shift_labels"].flatten()
    scored = labels != -100
    logq, labels = logits[scored].double().log_softmax(1), labels[scored]
    loss = (1 - kl_weight) * F.nll_loss(logq, labels, reduction="sum")
    if kl_weight:
        probs = dense_probs(batch["targets"], logq.shape[1])
        loss = loss + kl_weight * F.kl_div(logq, probs, reduction="sum")
    return loss / len(labels) if reduction == "mean" else loss


def gradients(model, loss):
    """{name: gradient} of one backward pass, and the model's own left empty."""
    model.zero_grad()
    loss.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def assert_close(found, expected, rtol):
    """Every tensor within rtol of the largest entry of what was expected."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= rtol * value.abs().max(), name
