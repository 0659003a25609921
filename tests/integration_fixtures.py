"""A dense float64 oracle of the loss for batches of the integrations, without the package's ops."""

import math

import torch
import torch.nn.functional as F
from helpers import dense_probs
from pipeline_fixtures import VOCAB_SIZE


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


def topk_examples(k=4):
    """Three examples of lists with the columns that axolotl prepares: row t of the teacher is about
    token t itself, with padded and masked entries."""
    draw = torch.Generator().manual_seed(0)
    examples = []
    for length in (9, 6, 9):
        tokens = torch.randint(1, VOCAB_SIZE, (length,), generator=draw).tolist()
        labels = [-100] * 3 + tokens[3:]
        logprobs, ids = torch.randn(length, VOCAB_SIZE, generator=draw).log_softmax(-1).topk(k)
        logprobs[4, -1], ids[4, -1] = -torch.inf, 0
        logprobs[:3] = 0.0  # of tokens that are not scored
        mask = [[1] * k for _ in tokens]
        mask[5] = [1] * (k - 1) + [0]
        columns = {"target_token_ids": ids.tolist(), "target_logprobs": logprobs.tolist()}
        examples.append({"input_ids": tokens, "labels": labels, "target_mask": mask} | columns)
    return examples


def topk_dense(examples, renormalize=False):
    """(scored positions of all examples, VOCAB_SIZE) teacher probabilities, in float64."""
    rows = []
    for example in examples:
        for t in range(1, len(example["labels"])):
            if example["labels"][t] == -100:
                continue
            row = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
            columns = (example[f"target_{name}"][t] for name in ("token_ids", "logprobs", "mask"))
            for token, logprob, keep in zip(*columns, strict=True):
                row[token] += math.exp(logprob) * keep
            rows.append(row / row.sum() if renormalize else row)
    return torch.stack(rows)
