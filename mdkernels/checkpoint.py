"""Training checkpoints: a plain Hugging Face directory plus the state an exact resume needs.

    <run>/checkpoints/step-00000128/
        config.json model.safetensors tokenizer.json ...     `from_pretrained` reads these
        training_state.safetensors                           AdamW moments
        training_state.json                                  step and bookkeeping
        checksums.json                                       of all these, written last

With adapters there are adapter_config.json and adapter_model.safetensors instead of the model. The
format does not depend on the number of processes or on how they share the weights: every process
calls `moments` and `restore_moments`, process 0 alone the others.

A checkpoint is written under another name, flushed to disk and renamed, and an old one is renamed
before it is deleted, so a directory called `step-*` is always complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from . import lora
from .artifact_writer import sync_path
from .distributed import gather
from .seal import seal
from .trained_model import TrainedModel

_STATE_JSON = "training_state.json"
_STATE_TENSORS = "training_state.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


def save(
    directory: Path,
    step: int,
    model,
    tokenizer,
    moments: dict[str, torch.Tensor],
    extra: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` under `directory`.

    `moments` is what the function of that name returned; `extra` is any JSON-able bookkeeping that
    `read_state` returns. Raises OSError (disk full, ...) with the previous checkpoints untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = path_of(directory, step)
    partial = directory / f".writing-{final.name}"
    clear_leftovers(directory)
    try:
        with writing(final):
            save_model(partial, model, tokenizer)
            save_file(moments, partial / _STATE_TENSORS)
        (partial / _STATE_JSON).write_text(json.dumps({"step": step, **extra}))
        seal(partial)
        sync_tree(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
    finally:  # after the rename there is none
        shutil.rmtree(partial, ignore_errors=True)
    sync_path(directory)
    return final


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, what safetensors makes of a full disk is an OSError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def clear_leftovers(directory: Path) -> None:
    """Delete what a kill left half written or half deleted, and what was put aside."""
    for leftover in directory.glob(".*-step-*"):
        shutil.rmtree(leftover)


def prune(directory: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`."""
    for old in checkpoints(directory)[:-keep]:
        if best is None or old != path_of(directory, best):
            _discard(old)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def save_model(directory: Path, model, tokenizer) -> None:
    """Model and tokenizer as `from_pretrained` reads them; of an adapted model, its adapter."""
    # transformers draws a bar of its own per call, which would cut the training bar in two.
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        if lora.is_adapted(model):
            lora.save_adapter(model, directory)
        else:
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


def read_state(path: Path) -> dict[str, Any]:
    """What `save` was given as `extra`, with `step`."""
    return json.loads((path / _STATE_JSON).read_text())


def restore_model(path: Path, model) -> None:
    """Load the weights, or the adapter, of a checkpoint into `model`, in place."""
    if lora.is_adapted(model):
        lora.load_adapter(model, path)
        return
    saved = type(model).from_pretrained(path, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())


def moments(trained: TrainedModel) -> dict[str, torch.Tensor]:
    """State of AdamW by parameter name, whole, on the CPU. Every process must call it.

    Under FSDP2 one parameter's state at a time is put together, and kept by process 0 alone.
    """
    tensors = {}
    for name, parameter in _parameters(trained):
        for field, value in sorted(trained.optimizer.state[parameter].items()):
            whole = gather(value)
            if trained.processes.is_main:
                tensors[f"adamw.{name}.{field}"] = whole.cpu().contiguous()
    return tensors


def restore_moments(path: Path, trained: TrainedModel) -> None:
    """Load AdamW's state, which process 0 reads. Every process must call it.

    Raises ValueError if the checkpoint belongs to a model with other parameters.
    """
    tensors: dict[str, torch.Tensor] = {}
    wanted = [f"adamw.{name}.exp_avg" for name, _ in _parameters(trained)]

    def read() -> None:
        tensors.update(load_file(path / _STATE_TENSORS))
        odd = sorted(set(wanted) ^ {key for key in tensors if key.endswith(".exp_avg")})
        if odd:
            raise ValueError(
                f"{path} does not belong to this model: optimizer state differs at {odd[0]}"
            )

    trained.processes.on_main(read)
    for name, parameter in _parameters(trained):
        state = trained.optimizer.state[parameter]
        for field in ("exp_avg", "exp_avg_sq"):
            whole = tensors.get(f"adamw.{name}.{field}")
            state[field] = trained.processes.scatter(whole, parameter.detach())
        count = torch.zeros((), device=parameter.device)
        state["step"] = trained.processes.scatter(tensors.get(f"adamw.{name}.step"), count)


def _parameters(trained: TrainedModel):
    return [(name, p) for name, p in trained.model.named_parameters() if p.requires_grad]


def _discard(path: Path) -> None:
    """Delete a checkpoint so that no half-deleted one is ever listed."""
    doomed = path.with_name(f".deleting-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def sync_tree(directory: Path) -> None:
    """Flush every file of `directory`, and the directory, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        sync_path(path)
