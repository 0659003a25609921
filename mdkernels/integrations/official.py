"""The Arrow files of the authors' Memory Decoder code: kNN targets and datastores.

Both are Arrow IPC streams, one record batch per step of the script that wrote them:

    targets    id_cnt int32, token_id list<int32>, prob list<float16>, label int32
    datastore  keys fixed_size_list<float16>[dim], vals int32

One row per scored position, in the order of the corpus; label and vals are the next token. The
probabilities were rounded to fp16 after they summed to 1, so a row may hold zeros and its sum is
off. Needs pyarrow: ``pip install 'mdkernels[official]'``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..artifact import ArtifactError
from ..artifact_writer import ArtifactWriter
from ..corpus import Corpus, open_corpus
from ..ops.sparse_targets import SparseTargets
from ..target_rows import check_labels, check_num_rows
from ..targets import TargetStore
from ..value_checks import check_path
from .arrow_stream import arrow, read_batches, write_batches

_BATCH_ROWS = 1 << 14
_TOKEN_LIMIT = 1 << 31
_TARGETS = {
    "id_cnt": "int32",
    "token_id": "list<int32>",
    "prob": "list<halffloat>",
    "label": "int32",
}
_DATASTORE = {"keys": "fixed_size_list<halffloat>", "vals": "int32"}


def read_targets(path: str | os.PathLike) -> tuple[SparseTargets, Tensor]:
    """Read a ``knn_*.arrow`` file of the authors' code into memory.

    Entries with probability 0 are dropped and each row is divided by its sum (in fp64), as the
    authors' loss does on every step; the entries of a row keep their order, probability
    descending. 8 bytes per entry and 16 per row.

    Returns:
        targets: N rows, fp32 probabilities that sum to 1. A row whose entries are all 0 is empty.
        labels: (N,) int64, the next token of each row.

    Raises:
        ArtifactError: the file is missing, truncated, altered, of another schema, or holds a token
            or label outside [0, 2**31), a negative or non-finite probability.
        ImportError: pyarrow is not installed.
    """
    lengths, ids, probs, labels = [], [], [], []
    for targets, following in iter_targets(path):
        columns = (targets.row_offsets.diff(), targets.token_ids, targets.probs, following)
        for parts, column in zip((lengths, ids, probs, labels), columns, strict=True):
            parts.append(column)
    offsets = torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return SparseTargets(offsets, torch.cat(ids), torch.cat(probs)), torch.cat(labels)


def iter_targets(path: str | os.PathLike) -> Iterator[tuple[SparseTargets, Tensor]]:
    """The record batches of a ``knn_*.arrow`` file, each as `read_targets` gives the whole.

    A file without rows yields one empty pair. Raises as `read_targets`.
    """
    path = Path(path)
    row = 0
    for batch in read_batches(path, _TARGETS):
        lengths, *columns = _targets_columns(path, batch, row)
        ids, probs, labels = map(torch.from_numpy, columns)
        row += batch.num_rows
        yield SparseTargets(torch.from_numpy(_offsets(lengths)), ids, probs), labels


def import_targets(
    path: str | os.PathLike,
    corpus: Corpus | str | os.PathLike,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> TargetStore:
    """Write a ``knn_*.arrow`` file as the targets artefact `out` of `corpus`.

    A training run maps the artefact, where it would read the file into memory; one record batch is
    held at a time here. Every label is compared with the corpus, so that the artefact belongs to
    it like one of `mdkernels.targets.build_targets`. The neighbour search behind the file is
    unknown: `knn_temperature` is None.

    Raises:
        ArtifactError: as `read_targets`; the rows are not those of the corpus, naming the first
            that differs; a token is not below the corpus' vocab_size; `out` is taken.
        ImportError: pyarrow is not installed.
    """
    corpus = open_corpus(corpus)
    header = {
        "tokenizer_hash": corpus.tokenizer_hash,
        "vocab_size": corpus.vocab_size,
        "config": {"knn_temperature": None, "source": Path(path).name},
        "inputs": {Corpus.kind: corpus.content_id},
    }
    bar = tqdm(desc="import", total=corpus.num_rows, unit="row", unit_scale=True, disable=None)
    with ArtifactWriter(out, TargetStore.kind, header, overwrite=overwrite) as writer, bar:
        offsets = writer.array("row_offsets", "int64")
        token_ids, probs = writer.array("token_ids", "int32"), writer.array("probs", "float32")
        offsets.append(np.zeros(1, np.int64))
        for targets, labels in iter_targets(path):
            start = offsets.rows - 1
            check_labels(labels, corpus, start)
            beyond = targets.token_ids >= corpus.vocab_size
            if bool(beyond.any()):
                row = start + int(targets.row_ids()[beyond][0])
                raise ArtifactError(
                    f"{path}: row {row} has token {int(targets.token_ids[beyond][0])}, not below "
                    f"vocab_size {corpus.vocab_size} of {corpus.artifact}"
                )
            offsets.append(targets.row_offsets[1:].numpy() + token_ids.rows)
            token_ids.append(targets.token_ids.numpy())
            probs.append(targets.probs.numpy())
            bar.update(len(labels))
        check_num_rows(offsets.rows - 1, corpus)
        return TargetStore(writer.commit())


def write_targets(
    path: str | os.PathLike, targets: SparseTargets, labels: Tensor, *, overwrite: bool = False
) -> None:
    """Write targets so that the authors' training script reads them.

    Rows are divided by their sum and rounded to fp16; entries that round to 0 (below 3e-8) are left
    out. The entries of a row keep their order, which the authors' reader ignores; theirs, and that
    of `mdkernels.knn_targets`, is by descending probability. Their trainer stops at a row without
    entries. The file appears under its name only once it is complete.

    Args:
        targets: N rows; no token may occur twice in a row, since their reader keeps only one.
        labels: (N,) int64 next tokens.
        overwrite: replace an existing file.

    Raises:
        ValueError: labels that do not fit, a repeated token, bad values in `targets`.
        FileExistsError: `path` exists and `overwrite` is False.
        ImportError: pyarrow is not installed.
    """
    check_path("path", path)
    if not isinstance(targets, SparseTargets):
        raise TypeError(f"targets: expected SparseTargets, got {type(targets).__name__}")
    pa = arrow()
    lists = {"token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16())}
    schema = pa.schema([(name, lists.get(name, pa.int32())) for name in _TARGETS])
    targets, labels = targets.to("cpu").validate(_TOKEN_LIMIT - 1), labels.cpu()
    if labels.dtype != torch.int64 or tuple(labels.shape) != (targets.num_rows,):
        raise ValueError(
            f"labels: expected int64 ({targets.num_rows},), one per row of targets, got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    bad = ((labels < 0) | (labels >= _TOKEN_LIMIT)).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"labels: row {row} has {int(labels[row])}, outside [0, 2**31); the format has no "
            "ignored rows, leave them out with targets.select(mask)"
        )
    write_batches(Path(path), schema, _targets_batches(targets, labels, schema), overwrite)


def read_datastore(path: str | os.PathLike) -> tuple[Tensor, Tensor]:
    """Read a ``dstore_*.arrow`` file of the authors' code into memory.

    Returns:
        keys: (R, D) fp16, finite.
        values: (R,) int32 in [0, 2**31), the next token of each row, as `mdkernels.knn_targets`
            takes it.

    A datastore larger than memory is read with `iter_datastore`.

    Raises:
        ArtifactError: the file is missing, truncated, altered, of another schema, or holds a value
            outside the above.
        ImportError: pyarrow is not installed.
    """
    parts = list(iter_datastore(path))
    keys = np.concatenate([keys for keys, _ in parts])
    return torch.from_numpy(keys), torch.from_numpy(np.concatenate([v for _, v in parts]))


def iter_datastore(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The record batches of a ``dstore_*.arrow`` file as read-only (keys, values) maps.

    Nothing is copied: keys (n, D) fp16 and values (n,) int32 point into the memory-mapped file. A
    file without rows yields one empty pair, so that D is known. Raises as `read_datastore`.
    """
    path = Path(path)
    row = 0
    for batch in read_batches(path, _DATASTORE):
        lists, values = batch.columns
        flat, values = lists.flatten().to_numpy(), values.to_numpy()
        keys = flat.reshape(batch.num_rows, lists.type.list_size)
        each = np.arange(batch.num_rows + 1)
        _refuse(path, "vals", values < 0, values, row, each)
        _refuse(path, "keys", ~np.isfinite(flat), flat, row, each * keys.shape[1])
        row += batch.num_rows
        yield keys, values


def _targets_columns(path: Path, batch, row: int) -> tuple[np.ndarray, ...]:
    """Of a batch that starts at `row`: lengths int64, token_ids int32, probs fp32, labels int64."""
    count, id_lists, prob_lists, labels = batch.columns
    lengths, ids = id_lists.value_lengths().to_numpy(), id_lists.flatten().to_numpy()
    probs, labels = prob_lists.flatten().to_numpy(), labels.to_numpy()
    count = count.to_numpy()
    for name, other in (("id_cnt", count), ("prob", prob_lists.value_lengths().to_numpy())):
        bad = np.flatnonzero(lengths != other)
        if len(bad):
            raise ArtifactError(
                f"{path}: row {row + bad[0]} has {lengths[bad[0]]} entries in token_id and "
                f"{other[bad[0]]} by {name}; the file was altered"
            )
    offsets = _offsets(lengths)
    _refuse(path, "token_id", ids < 0, ids, row, offsets)
    _refuse(path, "prob", ~((probs >= 0) & np.isfinite(probs)), probs, row, offsets)
    _refuse(path, "label", labels < 0, labels, row, np.arange(len(labels) + 1))
    kept = probs > 0
    offsets, ids, probs = _offsets(kept)[offsets], ids[kept], probs[kept].astype(np.float64)
    probs = _normalized(probs, offsets)
    return np.diff(offsets), ids, probs.astype(np.float32), labels.astype(np.int64)


def _targets_batches(targets: SparseTargets, labels: Tensor, schema) -> Iterator:
    pa = arrow()
    for start in range(0, targets.num_rows, _BATCH_ROWS):
        part = targets.rows(start, min(start + _BATCH_ROWS, targets.num_rows))
        offsets, ids = part.row_offsets.numpy(), part.token_ids.numpy()
        keys = np.sort(part.row_ids().numpy() << 31 | ids)
        repeated = keys[1:][keys[1:] == keys[:-1]]
        if len(repeated):
            raise ValueError(
                f"targets: row {start + (repeated[0] >> 31)} has token "
                f"{repeated[0] & (_TOKEN_LIMIT - 1)} more than once; add its probabilities up first"
            )
        probs = _normalized(part.probs.double().numpy(), offsets).astype(np.float16)
        kept = probs > 0
        lengths = pa.array(_offsets(kept)[offsets].astype(np.int32))
        yield pa.record_batch(
            [
                pa.array(np.diff(lengths.to_numpy()), type=pa.int32()),
                pa.ListArray.from_arrays(lengths, pa.array(ids[kept])),
                pa.ListArray.from_arrays(lengths, pa.array(probs[kept])),
                pa.array(labels[start : start + part.num_rows].numpy().astype(np.int32)),
            ],
            schema=schema,
        )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: 0 and the running sums."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _normalized(probs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """fp64 probabilities, each row divided by its sum; a row of zeros stays."""
    sums = np.ones(len(offsets) - 1)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):  # reduceat sums from each start to the next one
        sums[filled] = np.add.reduceat(probs, offsets[filled])
    sums[sums == 0] = 1.0
    return probs / np.repeat(sums, np.diff(offsets))


def _refuse(
    path: Path, column: str, bad: np.ndarray, values: np.ndarray, row: int, offsets: np.ndarray
) -> None:
    """Raise for the first of `values` that is `bad`, in a batch of lists that starts at `row`."""
    where = np.flatnonzero(bad)
    if len(where):
        row += int(np.searchsorted(offsets, where[0], side="right")) - 1
        raise ArtifactError(
            f"{path}: row {row} has {values[where[0]]} in column {column!r}, which cannot be; the "
            "file was altered or is of another kind"
        )
