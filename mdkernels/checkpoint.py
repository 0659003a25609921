"""Training checkpoints: a plain Hugging Face directory plus the state an exact resume needs.

    <run>/checkpoints/step-00000128/
        config.json model.safetensors tokenizer.json ...     `from_pretrained` reads these
        training_state.safetensors                           AdamW moments, random state
        training_state.json                                  step and bookkeeping
        checksums.json                                       of all these, written last

A checkpoint is written under another name, flushed to disk and renamed, and an old one is renamed
before it is deleted, so a directory called `step-*` is always complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from .seal import seal

_STATE_JSON = "training_state.json"
_STATE_TENSORS = "training_state.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


def save(directory: Path, step: int, model, tokenizer, optimizer, extra: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` under `directory`.

    `extra` is any JSON-able bookkeeping that `restore` returns. Raises OSError (disk full, ...)
    with the previous checkpoints untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = path_of(directory, step)
    partial = directory / f".writing-{final.name}"
    for leftover in directory.glob(".*-step-*"):
        shutil.rmtree(leftover)
    try:
        save_model(partial, model, tokenizer)
        save_file(_tensors(model, optimizer), partial / _STATE_TENSORS)
        (partial / _STATE_JSON).write_text(json.dumps({"step": step, **extra}))
        seal(partial)
        sync_tree(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # what its writer makes of a full disk
            raise OSError(f"{final} could not be written: {error}") from error
        raise
    sync_path(directory)
    return final


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(directory)[:-keep]:
        _discard(old)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def save_model(directory: Path, model, tokenizer) -> None:
    """Model and tokenizer as `from_pretrained` reads them."""
    # transformers draws a bar of its own per call, which would cut the training bar in two.
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory, max_shard_size="1TB")
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints under `directory`, oldest first."""
    found = [p for p in directory.glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def restore(path: Path, model, optimizer) -> dict[str, Any]:
    """Load weights, moments and random state in place; return what `save` was given, with `step`.

    Raises ValueError if the checkpoint belongs to a model with other parameters.
    """
    state = json.loads((path / _STATE_JSON).read_text())
    tensors = load_file(path / _STATE_TENSORS)
    saved = type(model).from_pretrained(path, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())
    parameters = dict(model.named_parameters())
    expected = {f"adamw.{name}.exp_avg" for name, p in parameters.items() if p.requires_grad}
    found = {key for key in tensors if key.endswith(".exp_avg")}
    if expected != found:
        odd = sorted(expected ^ found)[0]
        raise ValueError(f"{path} does not belong to this model: optimizer state differs at {odd}")
    for key, value in tensors.items():
        if key.startswith("adamw."):
            name, field = key[len("adamw.") :].rsplit(".", 1)
            parameter = parameters[name]
            optimizer.state[parameter][field] = value.to(parameter.device)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def _tensors(model, optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{name}.{field}"] = value.detach().contiguous()
    return tensors


def _discard(path: Path) -> None:
    """Delete a checkpoint so that no half-deleted one is ever listed."""
    doomed = path.with_name(f".deleting-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def sync_tree(directory: Path) -> None:
    """Flush every file of `directory`, and the directory, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        sync_path(path)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
