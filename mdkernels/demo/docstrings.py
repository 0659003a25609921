"""Docstrings of Python sources, read with `ast`: nothing is imported or executed.

Standard library only, so that it also runs as a script: `parse_files` starts copies of it that
neither import torch nor fork a process that already has threads.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

MIN_CHARS = 80
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def docstrings(source: bytes) -> list[str]:
    """Cleaned docstrings longer than `MIN_CHARS`, in source order.

    Raises SyntaxError or ValueError where `ast.parse` does.
    """
    if b'"""' not in source and b"'''" not in source:
        return []  # a one-line docstring in single quotes is hardly ever that long
    found = []
    pending = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text and len(text) > MIN_CHARS:
                # Escapes in a docstring can spell lone surrogates, which no UTF-8 file can hold.
                found.append(text.encode("utf-8", "replace").decode("utf-8"))
        # Only statements can hold a docstring; skipping expressions is most of the speed.
        children = [child for block in _BLOCKS for child in getattr(node, block, ())]
        pending.extend(reversed(children))
    return found


def _usable_cpus() -> int:
    # macOS has no affinities.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_files(paths: list[Path], processes: int | None = None) -> dict[Path, list[str]]:
    """Docstrings of each file, in the order of `paths`; files without any are left out.

    Unreadable and unparsable files count as files without docstrings: packages ship templates and
    sources for other Python versions. `processes` defaults to the CPUs this process may use.
    """
    processes = processes or _usable_cpus()
    shares: list[list[Path]] = [[] for _ in range(max(1, min(processes, len(paths))))]
    loads = [0] * len(shares)
    for path in sorted(paths, key=lambda path: -path.stat().st_size):
        lightest = loads.index(min(loads))
        shares[lightest].append(path)
        loads[lightest] += path.stat().st_size

    command = [sys.executable, "-I", __file__]
    pipe = subprocess.PIPE
    # Out of reach of the terminal's Ctrl-C, at which each would print a traceback.
    popen = partial(subprocess.Popen, command, stdin=pipe, stdout=pipe, start_new_session=True)
    workers = [popen() for _ in shares]
    found: dict[str, list[str]] = {}
    try:
        for worker, share in zip(workers, shares, strict=True):
            # A worker reads all its input before it writes, so no pipe can fill up on both sides.
            worker.stdin.write("\n".join(map(str, share)).encode(errors="surrogateescape"))
            worker.stdin.close()
        for worker in workers:
            found.update(json.load(worker.stdout))
        for worker in workers:
            if worker.wait() != 0:
                raise RuntimeError(f"docstring worker ended with status {worker.returncode}")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return {path: found[str(path)] for path in paths if str(path) in found}


def _serve() -> None:
    warnings.simplefilter("ignore")  # invalid escapes in other people's sources
    gc.disable()  # syntax trees are freed by reference counts; the collector would double the time
    found = {}
    for name in sys.stdin.buffer.read().decode(errors="surrogateescape").splitlines():
        try:
            texts = docstrings(Path(name).read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if texts:
            found[name] = texts
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _serve()
