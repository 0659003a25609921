"""Where the numbers of a training run go: metrics.jsonl, trackers, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artifact import ArtifactError, strict_json

METRICS = "metrics.jsonl"


class Metrics:
    """The rows of metrics.jsonl, kept in `rows`; process 0 (`path` given) also writes them.

    Rows are {"step", "epoch", "lr", "loss", "kl", "ce", "grad_norm", "tokens_per_s"} per optimizer
    step and {"step", "eval": {...}} per evaluation; null stands for a number that is not
    finite. Trackers get the numbers among them.
    """

    def __init__(
        self, rows: list[dict[str, Any]], path: Path | None = None, trackers: Sequence[Any] = ()
    ):
        self.rows, self.trackers = rows, trackers
        self._file = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        text = strict_json(row)
        self.rows.append(json.loads(text))  # as a resumed run reads it
        if self._file is not None:
            self._file.write(text + "\n")
            self._file.flush()
        numbers = {
            name: value
            for name, value in _flat(row).items()
            if name != "step" and isinstance(value, (int, float))
        }
        for tracker in self.trackers:
            tracker.log(numbers, step=row["step"])

    def sync(self) -> int:
        """Flush to the disk; bytes written so far, which `cut` takes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self.trackers:
            tracker.finish()


def cut(path: Path, size: int) -> list[dict[str, Any]]:
    """Drop what was written behind `size` bytes, a line that a kill cut short among it; the rest
    as rows, none if there is no file. Raises ArtifactError if it is damaged."""
    if not path.exists():
        return []
    with open(path, "r+b") as stream:
        try:
            rows = [json.loads(line) for line in stream.read(size).splitlines()]
            whole = stream.tell() == size and all(isinstance(row, dict) for row in rows)
        except ValueError:
            whole = False
        if not whole:
            raise ArtifactError(
                f"{path} is damaged: expected JSON lines of {size} bytes or more. Put back a copy, "
                "or delete it to go on without the rows until here"
            )
        stream.truncate(size)
    return rows


def check_finite(step: int, measures: Sequence[float]) -> None:
    """Raise FloatingPointError, naming the step, unless all its measures (loss first, gradient norm
    last) are finite."""
    if not all(map(math.isfinite, measures)):
        raise FloatingPointError(
            f"step {step}: loss is {measures[0]}, gradient norm {measures[-1]}; training stopped. "
            "Checkpoints are as they were; try a smaller lr, warmup_steps, or dtype float32"
        )


def start_trackers(
    names: Sequence[str], directory: Path, settings: Mapping[str, Any], start: int
) -> list[Any]:
    """accelerate's trackers, started; TensorBoard's files go to `directory`.

    `settings` are stored with the run. A TensorBoard of an interrupted run drops the steps behind
    `start`, which are written again; a W&B run goes on under its id, kept in `directory`.
    """
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # some trackers log through accelerate, which refuses to without it
    trackers = []
    for name in names:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": directory} if tracker_class.requires_logging_directory else {}
        more = {"purge_step": start + 1} if name == "tensorboard" and start else {}
        if name == "wandb":
            more = {"id": _wandb_id(directory, start), "resume": "allow"}
        tracker = tracker_class("mdkernels", **where, **more)
        tracker.start()
        if start == 0 or name != "tensorboard":  # TensorBoard would show them as one more run
            plain = (bool, int, float, str)
            tracker.store_init_configuration(
                {k: v if isinstance(v, plain) else str(v) for k, v in settings.items()}
            )
        trackers.append(tracker)
    return trackers


def _wandb_id(directory: Path, start: int) -> str:
    file = directory / "wandb-id"
    if start and file.exists():
        return file.read_text(encoding="utf-8")
    chosen = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(chosen, encoding="utf-8")
    return chosen


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown tracker, ImportError with the pip line for a missing one."""
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise ImportError(
            f"track: trackers need accelerate ({error}): pip install accelerate"
        ) from error
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"track: unknown tracker {name!r}, expected some of "
                f"{', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}"
            )
        if name not in map(str, get_available_trackers()):
            raise ImportError(f"track: {name} is not installed: pip install {name}")


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
