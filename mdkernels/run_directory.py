"""The directory of a training run: what process 0 alone reads and writes.

<out>.partial/run.json          config and inputs, compared before a run is continued
              metrics.jsonl
              checkpoints/      see checkpoint.py
              tracking/         e.g. the event files of TensorBoard
<out>/                          the same with the finished model, once it is complete
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoint, metrics, preflight
from .artifact import FILE_NAME, PARTIAL, ArtifactError
from .artifact_writer import ArtifactWriter
from .seal import find_damage
from .train_config import TrainConfig


@dataclass(frozen=True)
class Start:
    """Where a run begins; JSON-able through and through, so that every process can have it."""

    step: int = 0
    """Optimizer steps already done."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What metrics.jsonl held at that step."""
    best: dict[str, Any] | None = None
    """State of `BestStep`."""


class RunDirectory:
    """`<out>.partial` of one run, locked from `open` on."""

    def __init__(self, config: TrainConfig, header: dict[str, Any], tokenizer):
        self.config, self.header, self.tokenizer = config, header, tokenizer
        self.out = Path(os.path.realpath(config.out))
        self.work = self.out.with_name(self.out.name + PARTIAL)

    def open(self, stack: ExitStack, model) -> Start:
        """Lock the directory until `stack` ends; put the weights of its last checkpoint into
        `model`, or clear what an unwanted run left."""
        if self.config.resume:
            preflight.refuse_other_config(self.out, self.header)
        self.writer = stack.enter_context(
            ArtifactWriter(self.out, "train", self.header, overwrite=self.config.overwrite)
        )
        self.metrics = self.work / metrics.METRICS
        start = Start()
        step = self.writer.state.get("step", 0) if self.config.resume else 0
        if step:
            path = preflight.usable_checkpoint(self.checkpoints, step)
            state = checkpoint.read_state(path)
            checkpoint.restore_model(path, model)
            rows = metrics.cut(self.metrics, state["metrics_bytes"])
            best = state["best"]
            if best and best["step"] and not self.checkpoint(best["step"]).exists():
                best = None  # its weights are gone: the best of the later steps is kept
            start = Start(state["step"], rows, best)
        else:
            if self.writer.state:  # a kill from here on must not find a step without a checkpoint
                self.writer.checkpoint(step=0)
            shutil.rmtree(self.work / "checkpoints", ignore_errors=True)
            self.metrics.unlink(missing_ok=True)
        (self.work / preflight.RUN).write_text(json.dumps(self.header), encoding="utf-8")
        return start

    def open_metrics(self, rows: list[dict[str, Any]]) -> metrics.Metrics:
        """The log of this run, which has `rows` already, and its trackers."""
        start = max((row["step"] for row in rows), default=0)
        trackers = metrics.start_trackers(
            self.config.track or (), self.work / "tracking", self.config.identity(), start
        )
        return metrics.Metrics(rows, self.metrics, trackers)

    def checkpoint(self, step: int) -> Path:
        return checkpoint.path_of(self.checkpoints, step)

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    def save(self, step: int, model, moments, best: dict[str, Any] | None, size: int) -> None:
        """Write the checkpoint of `step`, when metrics.jsonl had `size` bytes on the disk."""
        extra = {"metrics_bytes": size, "best": best}
        directory = self.checkpoints
        if not self.writer.state:  # a directory with checkpoints always says whose they are
            self.writer.checkpoint(step=0)
        checkpoint.save(directory, step, model, self.tokenizer, moments, extra)
        # Older checkpoints go only after the record of progress points at the new one.
        self.writer.checkpoint(step=step)
        checkpoint.prune(directory, self.config.keep, best and best["step"])

    def load(self, step: int, model) -> None:
        """Put the weights of the checkpoint of `step` into `model`. Raises ArtifactError if its
        files are not as they were written."""
        path = self.checkpoint(step)
        damage = find_damage(path)
        if damage is not None:
            raise ArtifactError(
                f"checkpoint {path}, the best step, is damaged ({damage}). Put back a copy and "
                "repeat the command"
            )
        checkpoint.restore_model(path, model)

    def commit(self, model, **fields: Any) -> None:
        """Model, tokenizer and metrics become the artefact at `out`, described by `fields`."""
        checkpoint.clear_leftovers(self.checkpoints)
        staging = self.work / "model"
        shutil.rmtree(staging, ignore_errors=True)
        with checkpoint.writing(self.out):
            checkpoint.save_model(staging, model, self.tokenizer)
        names = [metrics.METRICS]
        for path in sorted(staging.iterdir()):
            target = self.work / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
            names.append(path.name)
        staging.rmdir()
        for name in names:
            # A tokenizer may write what it likes; other names are kept, without a checksum.
            if (self.work / name).is_file() and FILE_NAME.fullmatch(name):
                self.writer.file(name)
        artifact = self.writer.commit(**fields)
        (artifact.path / preflight.RUN).unlink(missing_ok=True)
