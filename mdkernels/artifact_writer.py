"""Writes the artefacts that `artifact.py` reads: growing arrays, atomic commit, resume.

The work directory is `<out>.partial`; who writes it holds a lock on `<out>.partial.lock`. It is
renamed to `<out>` when everything is on disk, so `<out>` does not exist, or is the previous good
artefact, or the new one.
A killed stage leaves the .partial directory; the same stage with the same header resumes it from
its last `checkpoint`, another header clears it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from mdkernels.artifact import (
    ARRAY_NAME,
    DTYPES,
    FILE_NAME,
    FORMAT,
    META,
    PARTIAL,
    VERSION,
    Artifact,
    ArtifactError,
    canonical,
    digest,
    file_crc,
    read_artifact,
    read_kind,
)
from mdkernels.value_checks import check_path

PROGRESS = "progress.json"
# What the system says of a full disk, without the file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class ArrayWriter:
    """Appends rows to one array file. Made by `ArtifactWriter.array`."""

    def __init__(
        self, path: Path, dtype: str, row_shape: tuple[int, ...], state: Mapping[str, int]
    ):
        self.dtype, self.row_shape = np.dtype(dtype), row_shape
        self.rows, self.crc = state["rows"], state["crc"]
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed in close)
        # Rows written after the last checkpoint are dropped: the stage will produce them again.
        self._file.truncate(self.bytes)
        self._file.seek(self.bytes)

    @property
    def bytes(self) -> int:
        return self.rows * math.prod(self.row_shape) * self.dtype.itemsize

    def append(self, rows: np.ndarray) -> None:
        """Write rows of shape (n, *row_shape); the dtype must be the declared one."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.row_shape:
            raise ValueError(
                f"rows must be {self.dtype} (n, *{self.row_shape}), got {rows.dtype} {rows.shape}"
            )
        little = np.ascontiguousarray(rows, self.dtype.newbyteorder("<"))
        data = memoryview(little.reshape(-1).view(np.uint8))
        self._file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.rows += len(rows)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ArtifactWriter:
    """Builds an artefact in `<out>.partial`; a context manager that finishes nothing by itself.

        with ArtifactWriter(out, "datastore", header, overwrite=False) as writer:
            keys = writer.array("keys", "float16", (width,))
            start = writer.state.get("next", 0)         # where a killed run stopped
            ...  keys.append(rows); writer.checkpoint(next=...)
            writer.commit(stats=...)

    Args:
        out: the final directory. It must not exist, or hold an artefact of the same kind with
            `overwrite=True`, which stays readable until `commit`.
        kind: stage name, also the name of the CLI command.
        header: JSON fields for meta.json known at the start (config, inputs, tokenizer_hash, ...).
            A .partial directory is resumed only if its header is equal.

    Raises `ArtifactError` when `out` is taken or another process is writing it.
    """

    def __init__(
        self, out: str | os.PathLike, kind: str, header: Mapping[str, Any], *, overwrite=False
    ):
        check_path("out", out)
        self.out, self.kind = Path(os.path.realpath(out)), kind
        self.header = json.loads(canonical(header))
        _check_target(self.out, kind, overwrite)
        self.work = self.out.with_name(self.out.name + PARTIAL)
        self.work.parent.mkdir(parents=True, exist_ok=True)
        self._arrays: dict[str, ArrayWriter] = {}
        self._files: list[str] = []
        self._lock = _acquire_lock(self.work)
        with ExitStack() as unless_ready:
            unless_ready.callback(self.close)
            _check_target(self.out, kind, overwrite)  # another writer may have just finished
            self.work.mkdir(exist_ok=True)
            progress = self._load_progress()
            unless_ready.pop_all()
        self.state: dict[str, Any] = progress["state"]
        self._saved: dict[str, Any] = progress["arrays"]
        self.resumed = bool(self._saved)

    def array(self, name: str, dtype: str, row_shape: tuple[int, ...] = ()) -> ArrayWriter:
        """Open the growing array `name`, positioned behind the rows of the last checkpoint."""
        if not ARRAY_NAME.fullmatch(name) or dtype not in DTYPES:
            raise ValueError(f"array {name!r} of dtype {dtype!r}: the name or dtype is not allowed")
        saved = self._saved.get(name, {"rows": 0, "crc": 0})
        self._arrays[name] = ArrayWriter(self.work / f"{name}.bin", dtype, tuple(row_shape), saved)
        return self._arrays[name]

    def file(self, name: str) -> Path:
        """Register an opaque file; the caller writes it at the returned path before `commit`."""
        if (
            not FILE_NAME.fullmatch(name)
            or name in (META, PROGRESS)
            or name.endswith((".bin", ".tmp"))
        ):
            raise ValueError(f"file name {name!r} is not allowed")
        self._files.append(name)
        return self.work / name

    def checkpoint(self, **state: Any) -> None:
        """Make everything appended so far survive a kill, together with `state`."""
        for array in self._arrays.values():
            array.sync()
        arrays = {
            name: {"rows": a.rows, "bytes": a.bytes, "crc": a.crc}
            for name, a in self._arrays.items()
        }
        progress = {"header": digest(self.header), "arrays": arrays, "state": state}
        _write_synced(self.work / PROGRESS, canonical(progress))
        self.state = state

    def commit(self, **fields: Any) -> Artifact:
        """Finish: write meta.json (header and `fields`), sync, and rename into place."""
        arrays, files = {}, {}
        for name, array in self._arrays.items():
            array.sync()
            array.close()
            arrays[name] = {
                "dtype": array.dtype.name,
                "shape": [array.rows, *array.row_shape],
                "bytes": array.bytes,
                "checksum": array.crc,
            }
        for name in self._files:
            with open(self.work / name, "rb") as stream:
                os.fsync(stream.fileno())
            size = (self.work / name).stat().st_size
            files[name] = {"bytes": size, "checksum": file_crc(self.work / name)}
        meta = {"format": FORMAT, "version": VERSION, "kind": self.kind} | self.header | fields
        meta |= {"arrays": arrays, "files": files}
        meta = json.loads(canonical(meta))
        meta["checksum"] = digest(meta)
        _write_synced(self.work / META, json.dumps(meta, indent=1, sort_keys=True))
        _replace_directory(self.work, self.out)
        # Only now: had the rename not happened, a resumed run would still need it.
        (self.out / PROGRESS).unlink(missing_ok=True)
        self.close()
        return read_artifact(self.out, self.kind)

    def close(self) -> None:
        """Release the files and the lock; what is not committed stays in the .partial directory."""
        if self._lock.closed:  # another writer may have the lock by now
            return
        for array in self._arrays.values():
            with suppress(OSError):  # of a full disk; `checkpoint` and `commit` have their own sync
                array.close()
        with suppress(FileNotFoundError):  # somebody cleaned up
            os.unlink(self._lock.name)
        self._lock.close()

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A failure before the first checkpoint leaves nothing that a later run could use.
        useless = self.work.is_dir() and not (self.work / PROGRESS).exists()
        if exc_info[0] is not None and useless and not self._lock.closed:
            shutil.rmtree(self.work)
        self.close()
        error = exc_info[1]
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(self.work)

    def _load_progress(self) -> dict[str, Any]:
        progress = None
        try:
            progress = json.loads((self.work / PROGRESS).read_bytes())
            usable = progress["header"] == digest(self.header) and all(
                (self.work / f"{name}.bin").stat().st_size >= saved["bytes"]
                for name, saved in progress["arrays"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if usable:
            return progress
        if progress is not None:
            warnings.warn(
                f"{self.work}: an unfinished run with other settings or inputs, or a damaged one, "
                "was discarded",
                stacklevel=4,
            )
        for entry in self.work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return {"arrays": {}, "state": {}}


def _check_target(out: Path, kind: str, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ArtifactError(f"{out} exists: pass overwrite=True (--overwrite) or another out")
    if out.is_dir() and not any(out.iterdir()):
        return
    # overwrite deletes a directory, so it takes only what a former run of this stage wrote.
    if read_kind(out) != kind:
        raise ArtifactError(
            f"{out} exists and is no {kind} artefact: remove it yourself or choose another out"
        )


def _acquire_lock(work: Path) -> IO[str]:
    """An exclusive lock that the kernel drops with the process; raises if another writer has it.

    The file lies beside `work`, which is renamed while the lock has to hold. The holder deletes it
    before letting go, so what counts is a lock on the file that has the name.
    """
    path = work.with_name(work.name + ".lock")
    lock = open(path, "a")  # noqa: SIM115 (held until the writer closes)
    busy = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = not os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        busy = True
    except OSError as error:
        warnings.warn(f"{work} is not protected against a second writer: {error}", stacklevel=4)
    if busy:
        lock.close()
        raise ArtifactError(
            f"{work} is being written by another process: wait for it or choose another out"
        )
    return lock


def _write_synced(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(work: Path, out: Path) -> None:
    """Put `work` at `out`; what was there is deleted only after the new one is in place."""
    replaced = out.with_name(out.name + ".replaced")
    if not out.exists():
        os.rename(work, out)
    elif _exchange(work, out):
        shutil.rmtree(work)
    else:  # a file system without atomic exchange: for an instant `out` has another name
        if replaced.exists():  # a kill between the lines below left it
            shutil.rmtree(replaced)
        os.rename(out, replaced)
        os.rename(work, out)
    if replaced.exists():
        shutil.rmtree(replaced)
    sync_path(out.parent)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
