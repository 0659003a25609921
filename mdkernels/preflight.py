"""What a training run checks before its first step, so that nothing foreseeable fails after it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import checkpoint
from .artifact import PARTIAL, ArtifactError, digest
from .artifact_writer import PROGRESS
from .models import load_tokenizer, model_id
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
    with TemporaryDirectory() as scratch:
        try:
            model.config.save_pretrained(scratch)
            if model.can_generate():
                model.generation_config.save_pretrained(scratch)
        except ValueError as error:
            raise ValueError(
                f"model {model_id(model)}: transformers refuses to save its configuration, "
                f"and would at the first checkpoint: {error}"
            ) from error


def check_base(base, model) -> None:
    """Raise ValueError if training `model`, in place, would change the live model `base`."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in base.parameters():
        if id(parameter) in trained:
            raise ValueError(
                f"base: shares {trained[id(parameter)]} with model, which is trained in place; "
                "pass copy.deepcopy(base) as model"
            )
    if base is model:  # frozen, which adapters leave it
        raise ValueError(
            "base: is the model itself, which gets its adapters in place; pass "
            "copy.deepcopy(base) as model"
        )


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
    if not checkpoint.checkpoints(partial / "checkpoints"):
        return
    found, progress = _read_object(partial / RUN), _read_object(partial / PROGRESS)
    here, there = _flat(header), _flat(found or header)
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
    if (progress or {}).get("header") != digest(header):  # the writer would clear the directory
        raise ArtifactError(
            f"{partial} holds an interrupted run, and its {PROGRESS} is missing, damaged or of "
            "another config. Its checkpoints are models: move those you need, then pass "
            "resume=False (--no-resume) to discard the rest; or choose another out"
        )


def usable_checkpoint(directory: Path, step: int) -> Path:
    """The checkpoint of `step`, or the newest one before it whose files are as they were written,
    those of the best step until then included.

    Warns when it is not that of `step`, naming the damage. Newer ones, which are damaged or which a
    kill kept from being recorded, are put aside under a name that is never listed: the run would
    keep them in place of its own. Raises ArtifactError, and changes nothing, when there is none.

    A best step that was deleted is no obstacle where nothing older will do: it is not coming back.
    """
    damaged: dict[Path, str] = {}
    wanted = checkpoint.path_of(directory, step)
    listed = checkpoint.checkpoints(directory)
    if wanted not in listed:
        damaged[wanted] = "it is missing"
    for path in reversed(listed):
        if path.name > wanted.name:
            continue
        damage = find_damage(path) or _damage_of_best(path)
        if damage is None:
            break
        damaged[path] = damage
    else:
        whole = [p for p in damaged if p in listed and find_damage(p) is None]
        bests = [_best(p) for p in whole]
        path = next((p for p, best in zip(whole, bests, strict=True) if not best.exists()), None)
        if path is None:
            delete = f"delete {bests[0]} to go on without that best step, " if bests else ""
            raise ArtifactError(
                f"no checkpoint to resume from: {_listed(damaged)}. Put back a copy, {delete}or "
                "pass resume=False (--no-resume) to discard the run and start again"
            )
    if damaged:
        warnings.warn(
            f"{_listed(damaged)}; training goes on from {path.name}, later steps are repeated",
            stacklevel=2,
        )
    for newer in listed[listed.index(path) + 1 :]:
        newer.rename(newer.with_name(f".dropped-{newer.name}"))
    return path


def _damage_of_best(path: Path) -> str | None:
    """Of the checkpoint whose weights a run that goes on from `path` may have to end with."""
    kept = _best(path)
    if kept is None:
        return None
    damage = find_damage(kept) if kept.exists() else "it is missing"
    return None if damage is None else f"its best step, {kept.name}: {damage}"


def _best(path: Path) -> Path | None:
    """The checkpoint of the best step until the one of `path`."""
    step = (checkpoint.read_state(path)["best"] or {}).get("step")
    return None if step is None else checkpoint.path_of(path.parent, step)


def _listed(damaged: dict[Path, str]) -> str:
    return "; ".join(f"checkpoint {path} is damaged ({why})" for path, why in damaged.items())


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON file, None where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in header.items():
        nested = value.items() if isinstance(value, dict) else ((None, value),)
        flat |= {key if name is None else f"{key}.{name}": item for name, item in nested}
    return flat
