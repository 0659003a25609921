"""The demo's text: docstrings of the installed Python packages, with nothing to download.

General text is what the base model learns: the standard library, numpy, sympy and networkx (the
last two come with torch). Domain text is torch itself, split by file into train, valid and test.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from .docstrings import parse_files

GENERAL_PACKAGES = ("stdlib", "numpy", "sympy", "networkx")
DOMAIN_PACKAGE = "torch"
SPLITS = ("train", "valid", "test")

NGRAM_WORDS = 8
MAX_SEEN = 0.5
"""A docstring is dropped if more than this share of its word n-grams was seen before."""
HELD_OUT = {"valid": 0.09, "test": 0.11}
"""Share of the domain's files; the rest is train."""
MAX_HELD_OUT_CHARS = 0.03
"""A file with more than this share of the domain text goes to train: none may dominate a score."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class File:
    """The docstrings of one source file; `name` is its path below the package, '/' separated."""

    name: str
    docstrings: tuple[str, ...]

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.docstrings))


@dataclass(frozen=True)
class Harvest:
    """Near-duplicates removed. `splits` maps train, valid and test to the domain's files."""

    general: list[File]
    splits: dict[str, list[File]]
    dropped: dict[str, int]
    """Docstrings dropped as near-duplicates, of the general and of the domain text."""


def harvest(
    general: Iterable[str] = GENERAL_PACKAGES,
    domain: str = DOMAIN_PACKAGE,
    *,
    processes: int | None = None,
) -> Harvest:
    """Harvest the named packages. Same installed packages, same result, in the same order.

    General text is deduplicated first, so domain docstrings that copy it are dropped too.
    ValueError names a package that is not installed.
    """
    roots = [package_root(name) for name in (*general, domain)]
    sources = [source_files(root) for root in roots]
    parsed = parse_files([path for paths in sources for path in paths], processes)

    def files(root: Path, paths: list[Path]) -> list[File]:
        names = {path: f"{root.name}/{path.relative_to(root).as_posix()}" for path in paths}
        return [File(names[path], tuple(parsed[path])) for path in paths if path in parsed]

    harvested = [files(root, paths) for root, paths in zip(roots, sources, strict=True)]
    seen: set[int] = set()
    kept_general, dropped_general = drop_near_duplicates(list(chain(*harvested[:-1])), seen)
    kept_domain, dropped_domain = drop_near_duplicates(harvested[-1], seen)
    dropped = {"general": dropped_general, "domain": dropped_domain}
    return Harvest(shuffled(kept_general), split_files(kept_domain), dropped)


def package_root(name: str) -> Path:
    """Folder of an installed package, found without importing it; `stdlib` names Python's own."""
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"package {name!r} is not installed here: `pip install {name}` provides it"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(root: Path) -> list[Path]:
    """Python files below `root` in path order, without test folders and other packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def drop_near_duplicates(files: list[File], seen: set[int]) -> tuple[list[File], int]:
    """The files with the docstrings that are new, and how many docstrings were dropped.

    A docstring is dropped if more than `MAX_SEEN` of its distinct word `NGRAM_WORDS`-grams are in
    `seen` (hashes). `seen` grows by the n-grams of every docstring, kept or dropped.
    """
    kept, dropped = [], 0
    for file in files:
        fresh = []
        for text in file.docstrings:
            grams = _ngrams(text)
            known = len(grams & seen)
            seen |= grams
            if known > MAX_SEEN * len(grams):
                dropped += 1
            else:
                fresh.append(text)
        if fresh:
            kept.append(File(file.name, tuple(fresh)))
    return kept, dropped


def split_files(files: list[File]) -> dict[str, list[File]]:
    """Files to train, valid and test by the hash of their name, whatever other files there are."""
    limit = MAX_HELD_OUT_CHARS * sum(file.num_chars for file in files)
    splits: dict[str, list[File]] = {split: [] for split in SPLITS}
    for file in shuffled(files):
        position = _name_hash("split/" + file.name) / 2**64
        split = "train"
        if file.num_chars <= limit and position < HELD_OUT["valid"] + HELD_OUT["test"]:
            split = "valid" if position < HELD_OUT["valid"] else "test"
        splits[split].append(file)
    return splits


def shuffled(files: list[File]) -> list[File]:
    """By the hash of the name, so that a prefix of the result samples the whole package."""
    return sorted(files, key=lambda file: _name_hash(file.name))


def _ngrams(text: str) -> set[int]:
    words = text.split()
    last = max(1, len(words) - NGRAM_WORDS + 1)  # a shorter text is one n-gram
    return {hash(tuple(words[i : i + NGRAM_WORDS])) for i in range(last)}


def _name_hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big")
