"""Runs each stage of the demo once: a second call opens what the first one left.

A stage is identified by its settings and, through their keys, by everything that went into its
inputs. Its record lies beside its result and is written last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def _print(line: str) -> None:
    print(line, flush=True)  # as it happens, also into a file or pipe


class Stages:
    """The stages below `work`, in the order they were asked for.

    `seconds`, `reused` and `notes` describe each of them; of a reused stage, `seconds` is what it
    took when it ran, and `notes` what it said then.
    """

    def __init__(self, work: Path, say: Callable[[str], None] = _print):
        self.work = work
        self.say = say
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.reused: dict[str, bool] = {}
        self.notes: dict[str, str] = {}
        work.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        make: Callable[[Path], str],
        open_result: Callable[[Path], Result],
        *,
        settings: Any,
        after: Sequence[str] = (),
    ) -> Result:
        """`open_result(work / name)`, after `make` wrote it unless a usable one is there.

        `make` replaces what lies at the path and returns a short note. `settings` is JSON-able;
        `after` names the stages whose results `make` reads. A result that no longer opens (it was
        altered, or a file is gone) is made again.
        """
        path, record = self.work / name, self.work / f"{name}.json"
        inputs = {stage: self.keys[stage] for stage in after}
        text = json.dumps([name, settings, inputs], sort_keys=True)
        key = self.keys[name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        found = _read(record)
        if found.get("key") == key:
            try:
                result = open_result(path)
            except (OSError, ValueError, KeyError) as error:
                self.say(f"{name}: made again, the earlier result cannot be used ({error})")
            else:
                self._note(name, found["seconds"], found["note"], reused=True)
                return result
        record.unlink(missing_ok=True)
        began = time.perf_counter()
        note = make(path)
        result = open_result(path)
        seconds = time.perf_counter() - began
        record.write_text(json.dumps({"key": key, "seconds": seconds, "note": note}) + "\n")
        self._note(name, seconds, note, reused=False)
        return result

    def _note(self, name: str, seconds: float, note: str, *, reused: bool) -> None:
        self.seconds[name], self.notes[name], self.reused[name] = seconds, note, reused
        took = "reused" if reused else f"{seconds:.1f} s"
        self.say(f"{name:12}{took:>9}  {note}")


def _read(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    complete = isinstance(found, dict) and {"key", "seconds", "note"} <= found.keys()
    return found if complete else {}
