"""What a training run checks before its first step, so that nothing foreseeable fails after it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .artifact import PARTIAL, ArtifactError
from .models import load_tokenizer
from .scoring import check_scorable
from .seal import find_damage
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


def usable_checkpoint(directory: Path, step: int) -> Path:
    """The checkpoint of `step`, or the newest one before it whose files are as they were written.

    Warns when it is not that of `step`, naming the damage; damaged ones are put aside under a name
    that is never listed. Raises ArtifactError, and changes nothing, when there is none.
    """
    damaged: dict[Path, str] = {}
    wanted = checkpoint.path_of(directory, step)
    found = [path for path in checkpoint.checkpoints(directory) if path.name <= wanted.name]
    if wanted not in found:
        damaged[wanted] = "it is missing"
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            break
        damaged[path] = damage
    else:
        raise ArtifactError(
            f"no checkpoint to resume from: {_listed(damaged)}. Put back a copy, or pass "
            "resume=False (--no-resume) to discard the run and start again"
        )
    if damaged:
        warnings.warn(
            f"{_listed(damaged)}; training goes on from {path.name}, later steps are repeated",
            stacklevel=2,
        )
    for bad in damaged:
        if bad.exists():
            bad.rename(bad.with_name(f".damaged-{bad.name}"))
    return path


def _listed(damaged: dict[Path, str]) -> str:
    return "; ".join(f"checkpoint {path} is damaged ({why})" for path, why in damaged.items())


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in header.items():
        nested = value.items() if isinstance(value, dict) else ((None, value),)
        flat |= {key if name is None else f"{key}.{name}": item for name, item in nested}
    return flat
