"""AdamW as the trainer uses it: what is decayed, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .models import lm_head
from .train_config import TrainConfig


def adamw(model, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves norms, biases and (un)embeddings alone."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    embeddings.add(id(lm_head(model).weight))
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
            (decayed if matrix else plain).append(parameter)
    if not decayed and not plain:
        raise ValueError("model: every parameter is frozen, there is nothing to train")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def lr_factor(step: int, steps: int, config: TrainConfig) -> float:
    """Share of the peak learning rate used by optimizer step `step`, counted from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / (steps - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if config.schedule == "linear" else 1.0
