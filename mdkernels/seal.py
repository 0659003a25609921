"""Checksums beside the files of a directory, so that damage is found before it is trained on.

A safetensors file that lost its end says so when it is read; one with altered bytes does not.
"""

from __future__ import annotations

import json
from pathlib import Path

from .artifact import file_crc

NAME = "checksums.json"


def seal(directory: Path) -> None:
    """Record size and crc32 of every file below `directory`, which is complete."""
    entries = {
        path.relative_to(directory).as_posix(): [path.stat().st_size, file_crc(path)]
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / NAME).write_text(json.dumps(entries, indent=1))


def find_damage(directory: Path) -> str | None:
    """What first differs from what `seal` recorded, or None. Reads every file once."""
    try:
        entries = json.loads((directory / NAME).read_bytes())
        recorded = [(name, size, crc) for name, (size, crc) in entries.items()]
    except FileNotFoundError:
        return f"it has no {NAME}"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"
    for name, size, crc in recorded:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if file_crc(path) != crc:
            return f"{name} was altered, its checksum does not match"
    return None
