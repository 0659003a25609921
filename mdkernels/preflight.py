"""What a training run checks before its first step, so that nothing foreseeable fails after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .artifact import PARTIAL, ArtifactError
from .models import load_tokenizer
from .scoring import check_scorable
from .tokenizer_check import check_tokenizers, check_trained
from .train_config import TrainConfig

RUN = "run.json"


def check_model(model, corpus, block: int) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"model: parameter {name} is {parameter.dtype}; the optimizer needs fp32 weights, "
                "pass model.float() and ask for dtype bfloat16 instead"
            )
    check_scorable(model, corpus, block)


def tokenizer_of(config: TrainConfig, corpus):
    """The tokenizer to save, checked against the corpus; None for a live model without one."""
    check_trained(config.model)
    source = config.tokenizer
    if source is None and not isinstance(config.model, torch.nn.Module):
        source = config.model
    if source is None:
        return None
    check_tokenizers([source], [corpus])
    return load_tokenizer(source)


def refuse_other_config(out: Path, header: dict[str, Any]) -> None:
    """An interrupted run may be hours of work: only resume=False discards it."""
    partial = out.with_name(out.name + PARTIAL)
    try:
        found = json.loads((partial / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return
    if not checkpoint.checkpoints(partial / "checkpoints"):
        return
    here, there = _flat(header), _flat(found)
    changed = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if changed:
        raise ArtifactError(
            f"{partial} holds an interrupted run with another config ({'; '.join(changed)}): "
            "repeat that config to continue it, choose another out, or pass resume=False "
            "(--no-resume) to discard it"
        )


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in header.items():
        nested = value.items() if isinstance(value, dict) else ((None, value),)
        flat |= {key if name is None else f"{key}.{name}": item for name, item in nested}
    return flat
