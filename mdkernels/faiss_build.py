"""Builds a faiss index over the keys of a datastore; what a kill cuts off goes on where it was.

Training, and adding 10^8 keys, take hours. The index so far is written beside the artefact's own
file from time to time, under a name of its own: the record of progress, which holds its checksum,
then always points at a whole one.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .artifact import file_crc
from .artifact_writer import ArtifactWriter

ADD_ROWS = 1 << 16


def import_faiss(factory: str):
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f'index {factory!r} needs faiss: pip install "mdkernels[faiss]" (or faiss-gpu), or use '
            'factory="exact", which needs nothing'
        ) from error
    return faiss


def build_faiss(
    writer: ArtifactWriter,
    file: str,
    keys: np.ndarray,
    factory: str,
    train_rows: int | None,
    seed: int,
    checkpoint_seconds: float,
) -> None:
    """Write the index of all `keys` as `file` of the artefact. Arguments as of `build_index`."""
    faiss, saved = import_faiss(factory), time.monotonic()
    writer.file(file)
    bar = tqdm(total=len(keys), unit="key", unit_scale=True, disable=None)
    with bar as progress:
        index = _resumed(faiss, writer)
        if index is None:
            index = _trained(faiss, keys, factory, train_rows, seed, progress)
            if time.monotonic() - saved >= checkpoint_seconds:
                _checkpoint(faiss, writer, index, f"added-{index.ntotal}.faiss")
                saved = time.monotonic()
        elif writer.state["file"] == file:  # whole: the commit was cut off
            return
        progress.set_description("index")
        progress.initial = progress.n = index.ntotal
        progress.unpause()  # the rate, and with it the time left, is that of adding alone
        for start in range(index.ntotal, len(keys), ADD_ROWS):
            block = keys[start : start + ADD_ROWS].astype(np.float32)
            index.add(block)
            progress.update(len(block))
            if time.monotonic() - saved >= checkpoint_seconds:
                _checkpoint(faiss, writer, index, f"added-{index.ntotal}.faiss")
                saved = time.monotonic()
    _checkpoint(faiss, writer, index, file)


def _trained(faiss, keys: np.ndarray, factory: str, train_rows: int | None, seed: int, progress):
    try:
        index = faiss.index_factory(keys.shape[1], factory, faiss.METRIC_L2)
        if not index.is_trained:
            ivf = faiss.try_extract_index_ivf(index)
            wanted = max(ADD_ROWS, 0 if ivf is None else 64 * ivf.nlist)
            count = min(len(keys), wanted if train_rows is None else train_rows)
            progress.set_description(f"index (training on {count:,} keys)")
            rows = np.random.default_rng(seed).choice(len(keys), count, replace=False)
            index.train(keys[np.sort(rows)].astype(np.float32))
    except RuntimeError as error:
        raise ValueError(
            f"factory: faiss cannot build {factory!r} for {keys.shape[0]} keys of dimension "
            f"{keys.shape[1]}: {error}"
        ) from error
    return index


def _checkpoint(faiss, writer: ArtifactWriter, index, name: str) -> None:
    path = writer.work / name
    _write(faiss, index, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    writer.checkpoint(file=name, crc=file_crc(path))
    _remove_others(writer, name)


def _resumed(faiss, writer: ArtifactWriter) -> Any:
    """The index of the last checkpoint; None if there is none, or it is damaged."""
    name = writer.state.get("file")
    if name is None:
        return None
    path = writer.work / name
    # faiss parses its file with few checks of its own, so it only gets bytes that were verified.
    if path.is_file() and file_crc(path) == writer.state["crc"]:
        return faiss.read_index(str(path))
    warnings.warn(f"{path} is missing or damaged: the index is built from the start", stacklevel=4)
    return None


def _remove_others(writer: ArtifactWriter, kept: str) -> None:
    for path in writer.work.glob("added-*.faiss"):
        if path.name != kept:
            path.unlink()


def _write(faiss, index, path: Path) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # a full disk
        raise OSError(f"{path} could not be written: {error}") from error
