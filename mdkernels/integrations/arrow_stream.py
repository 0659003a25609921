"""Arrow IPC stream files, read without trust and written atomically. Needs pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..artifact import PARTIAL, ArtifactError

# What a finished stream ends with; without it, a file cut between two batches would read as whole.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow():
    """The module pyarrow, or an ImportError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError(
            "the authors' files are Arrow streams, and pyarrow is not installed: "
            "pip install 'mdkernels[official]'"
        ) from error
    return pyarrow


def describe(data_type) -> str:
    """Arrow's name of a type without what does not matter: names of list items and list sizes."""
    types = arrow().types
    if types.is_list(data_type):
        return f"list<{data_type.value_type}>"
    if types.is_fixed_size_list(data_type):
        return f"fixed_size_list<{data_type.value_type}>"
    return str(data_type)


def read_batches(path: Path, columns: Mapping[str, str]) -> Iterator:
    """Yield the record batches of a stream file, reduced to `columns` in that order.

    `columns` maps names to types as `describe` writes them; further columns are ignored. Batches
    point into the memory-mapped file; their structure is validated and they hold no nulls. A file
    without batches yields one empty batch.

    Raises ArtifactError for a file that is missing, truncated, altered or of another schema.
    """
    pa = arrow()
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected an Arrow stream of the authors' code")
    damaged = f"{path}: is no finished Arrow stream; it is truncated or altered, write it again"
    if path.stat().st_size < len(END_OF_STREAM):
        raise ArtifactError(f"{damaged} (only {path.stat().st_size} bytes)")
    with pa.memory_map(str(path)) as source:
        source.seek(source.size() - len(END_OF_STREAM))
        if source.read() != END_OF_STREAM:
            raise ArtifactError(f"{damaged} (no end-of-stream mark)")
        source.seek(0)
        try:
            with pa.ipc.open_stream(source) as reader:
                order = _check_schema(path, reader.schema, columns)
                count = 0
                for batch in reader:
                    batch.validate(full=True)
                    count += 1
                    yield _without_nulls(path, batch.select(order), count)
                if count == 0:
                    arrays = [pa.array([], type=reader.schema.field(name).type) for name in order]
                    yield pa.record_batch(arrays, names=order)
            if source.tell() != source.size():
                raise ArtifactError(
                    f"{damaged} (ends after {source.tell()} of {source.size()} bytes)"
                )
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise ArtifactError(f"{damaged} ({error})") from error


def _check_schema(path: Path, schema, columns: Mapping[str, str]) -> list[str]:
    for name, wanted in columns.items():
        found = schema.get_all_field_indices(name)
        if len(found) != 1 or describe(schema.field(found[0]).type) != wanted:
            listed = ", ".join(f"{field.name}: {describe(field.type)}" for field in schema)
            raise ArtifactError(
                f"{path}: expected one column {name!r} of type {wanted}, found the columns "
                f"{listed or '(none)'}; is it the right file?"
            )
    return list(columns)


def _without_nulls(path: Path, batch, number: int):
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        inner = column.flatten() if hasattr(column, "flatten") else column
        if column.null_count or inner.null_count:
            raise ArtifactError(f"{path}: column {name!r} has a null in record batch {number}")
    return batch


def write_batches(path: Path, schema, batches: Iterable, overwrite: bool) -> None:
    """Write a stream file under a temporary name, flush it to disk and rename it."""
    pa = arrow()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as sink:
            with pa.ipc.new_stream(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
