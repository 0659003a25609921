"""Settings checked by value: ValueError with the name, what came, and what was expected."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        span = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be an integer {span}, got {value!r}")


def check_path(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {value!r:.60}")


def check_range(name: str, value: Any) -> tuple[int, int]:
    """(start, stop), whatever the numbers are."""
    pair = tuple(value) if isinstance(value, Iterable) else ()
    if len(pair) != 2 or not all(isinstance(one, Integral) for one in pair):
        raise TypeError(f"{name}: expected (start, stop), two integers, got {value!r:.60}")
    return int(pair[0]), int(pair[1])


def check_seconds(name: str, value: Any) -> None:
    if not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name} must be a number of seconds >= 0 (inf: never), got {value!r}")


def check_sizes(block: int, stride: int | None, batch_size: int) -> None:
    """Raise ValueError unless windows can be cut so."""
    check_integer("block", block, 1)
    if stride is not None:
        check_integer("stride", stride, 1, block)
    check_integer("batch_size", batch_size, 1)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (least <= value <= most and above < value < below):
        low = f"> {above}" if above > -math.inf else f">= {least}"
        high = f" and < {below}" if below < math.inf else ""
        high = f" and <= {most}" if most < math.inf else high
        if number and not math.isfinite(value):
            low = f"that is finite and {low}"
        raise ValueError(f"{name} must be a number {low}{high}, got {value!r}")
