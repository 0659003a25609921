"""Stage 4: datastore and index -> the kNN distribution of every row, for the memory to imitate.

Reads: a datastore and its index.
Writes: row_offsets (R + 1,) int64, token_ids (nnz,) int32, probs (nnz,) fp32 or fp16.

Row r is softmax(-d / knn_temperature) over the neighbours of key r, d being squared L2, with row r
itself left out by its id, merged by the neighbours' next tokens (arXiv 2508.09874, eq. 2).
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .artifact import Artifact, ArtifactError, read_artifact
from .artifact_writer import ArtifactWriter
from .corpus import Corpus
from .datastore import Datastore, open_datastore
from .index import Index, open_index
from .ops.checks import number
from .ops.knn_targets import knn_targets
from .ops.sparse_targets import SparseTargets
from .target_rows import LabelledTargets, TargetRows
from .value_checks import check_integer, check_seconds

DEFAULT_RELATIVE_TEMPERATURE = 0.05
_STATS_ROWS = 1 << 18


class TargetStore(TargetRows):
    """An opened targets artefact: R sparse rows in the order of the corpus, each summing to 1."""

    kind = "targets"

    def __init__(self, artifact: Artifact):
        probs_dtypes = ("float32", "float16")
        artifact.require(row_offsets=("int64", 1), token_ids=("int32", 1), probs=(probs_dtypes, 1))
        self.artifact, self.path, self.meta = artifact, artifact.path, artifact.meta
        self.content_id = artifact.content_id
        self.tokenizer_hash: str = self.meta["tokenizer_hash"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.knn_temperature: float | None = self.meta["config"]["knn_temperature"]
        """None where the targets were imported."""
        arrays = [artifact.array(name) for name in ("row_offsets", "token_ids", "probs")]
        offsets, ids, probs = arrays
        if len(offsets) < 2 or len(ids) != len(probs) or (offsets[0], offsets[-1]) != (0, len(ids)):
            raise ArtifactError(
                f"{artifact}: {len(offsets)} row_offsets, {len(ids)} token_ids and {len(probs)} "
                "probs do not make sparse rows"
            )
        with warnings.catch_warnings():
            # Maps are read-only and torch warns that its tensors do not know that.
            warnings.simplefilter("ignore")
            targets = SparseTargets(*map(torch.from_numpy, arrays))
        super().__init__(targets, normalize=targets.probs.dtype == torch.float16)
        if artifact.verified:
            try:
                self._all.validate(self.vocab_size)
            except ValueError as error:
                raise ArtifactError(f"{artifact}: {error}") from error

    def check_corpus(self, corpus: Corpus) -> None:
        """Raise ArtifactError unless these are the targets of exactly this corpus."""
        self.artifact.expect(
            str(corpus.artifact),
            inputs={Corpus.kind: corpus.content_id},
            tokenizer_hash=corpus.tokenizer_hash,
            vocab_size=corpus.vocab_size,
        )
        if self.num_rows != corpus.num_rows:
            raise ArtifactError(
                f"{self.artifact}: has {self.num_rows} rows, {corpus.artifact} {corpus.num_rows}"
            )


def open_targets(targets: Any, *, verify: bool = False) -> TargetStore | LabelledTargets:
    """Open the targets of a training run.

    Args:
        targets: a targets directory; an `.arrow` file of the authors' code, which is read into
            memory (`mdkernels import-targets` makes a directory of one); a pair (SparseTargets,
            labels); or an opened one, which is returned as it is.
        verify: see `read_artifact`.
    """
    if isinstance(targets, TargetStore | LabelledTargets):
        return targets
    if isinstance(targets, tuple | list):
        if len(targets) != 2:
            raise TypeError(
                f"targets: expected a pair (SparseTargets, labels), got {len(targets)} values"
            )
        return LabelledTargets(*targets)
    if isinstance(targets, (str, os.PathLike)) and Path(targets).suffix == ".arrow":
        from .integrations.official import read_targets

        return LabelledTargets(*read_targets(targets))
    return TargetStore(read_artifact(targets, TargetStore.kind, verify=verify))


def build_targets(
    datastore: Datastore | str | os.PathLike,
    index: Index | str | os.PathLike,
    out: str | os.PathLike,
    *,
    num_neighbors: int = 1024,
    knn_temperature: float | None = None,
    relative_temperature: float | None = None,
    probs_dtype: str = "float32",
    batch_size: int = 4096,
    device: str = "auto",
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
) -> TargetStore:
    """Search every datastore row and write its kNN distribution to `out`.

    A killed run leaves `<out>.partial` and continues from its last checkpoint when it is called
    again with the same inputs and settings.

    Args:
        num_neighbors: neighbours searched per row. The row itself is among them, so the paper's
            1024 leaves 1023.
        knn_temperature: divides the squared L2 distances, in squared key units (paper: 16).
        relative_temperature: the same as a multiple of the mean squared distance of two random
            keys, which carries over between models. Give one of the two; without either, 0.05.
        probs_dtype: "float32", or "float16" for 6 instead of 8 bytes per entry.
        batch_size: rows searched at once; each takes 12 bytes per neighbour.
        device: where to search, if `index` is a path.
        checkpoint_seconds: at most this much work is repeated after a kill.

    meta.json gets both temperatures, the mean squared distance and `stats`: nnz per row (mean, p50,
    p99), and means over rows of the top probability, the entropy (nats) and the probability of the
    row's own next token, which is what the targets know without having seen it.

    Raises ValueError for settings that make no distribution, ArtifactError for inputs of two runs.
    """
    datastore = open_datastore(datastore)
    index = open_index(index, datastore, device=device)
    index.artifact.expect(str(datastore.artifact), inputs={Datastore.kind: datastore.content_id})
    config = _config(
        datastore, index, num_neighbors, knn_temperature, relative_temperature, probs_dtype
    )
    check_integer("batch_size", batch_size, 1)
    check_seconds("checkpoint_seconds", checkpoint_seconds)
    header = {
        "tokenizer_hash": datastore.tokenizer_hash,
        "vocab_size": datastore.vocab_size,
        "config": config,
        "inputs": index.meta["inputs"] | {Index.kind: index.content_id},
    }
    values = torch.from_numpy(np.array(datastore.values)).to(index.device)
    num_rows = datastore.num_rows
    with ArtifactWriter(out, TargetStore.kind, header, overwrite=overwrite) as writer:
        offsets = writer.array("row_offsets", "int64")
        token_ids = writer.array("token_ids", "int32")
        probs = writer.array("probs", probs_dtype)
        if not offsets.rows:
            offsets.append(np.zeros(1, np.int64))
        sums = writer.state.get("sums", {"top_prob": 0.0, "entropy": 0.0, "own_token_prob": 0.0})
        done = offsets.rows - 1
        saved = time.monotonic()
        with tqdm(
            desc="targets", total=num_rows, initial=done, unit="row", unit_scale=True, disable=None
        ) as progress:
            for start in range(done, num_rows, batch_size):
                stop = min(start + batch_size, num_rows)
                batch = _search(datastore, index, values, start, stop, config)
                for name, value in _batch_sums(batch, values[start:stop].cpu()).items():
                    sums[name] += value
                if probs_dtype == "float16":
                    batch = _to_half(batch)
                offsets.append(batch.row_offsets[1:].numpy() + token_ids.rows)
                token_ids.append(batch.token_ids.numpy())
                probs.append(batch.probs.numpy())
                progress.update(stop - start)
                if time.monotonic() - saved >= checkpoint_seconds:
                    writer.checkpoint(sums=sums)
                    saved = time.monotonic()
        writer.checkpoint(sums=sums)
        return TargetStore(writer.commit(stats=_stats(writer.work / "row_offsets.bin", sums)))


def _config(
    datastore: Datastore,
    index: Index,
    num_neighbors: int,
    absolute: float | None,
    relative: float | None,
    probs_dtype: str,
) -> dict[str, Any]:
    check_integer("num_neighbors", num_neighbors, 1)
    if num_neighbors < 2:
        raise ValueError(
            f"num_neighbors: must be at least 2, the row itself being one, got {num_neighbors}"
        )
    if probs_dtype not in ("float32", "float16"):
        raise ValueError(f'probs_dtype: must be "float32" or "float16", got {probs_dtype!r}')
    if absolute is not None and relative is not None:
        raise ValueError(
            "knn_temperature, relative_temperature: give one of them, got "
            f"{absolute} and {relative}"
        )
    if absolute is not None:
        absolute = number("knn_temperature", absolute)
    if relative is not None:
        relative = number("relative_temperature", relative)
    scale = datastore.mean_squared_distance()
    if absolute is None:
        relative = DEFAULT_RELATIVE_TEMPERATURE if relative is None else relative
        absolute = relative * scale
    if not 0 < absolute < float("inf"):
        raise ValueError(
            f"knn_temperature: must be positive and finite, got {absolute} (relative_temperature "
            f"{relative}, mean squared key distance {scale}); pass an absolute knn_temperature"
        )
    return {
        "num_neighbors": num_neighbors,
        "knn_temperature": absolute,
        "relative_temperature": absolute / scale if scale else None,
        "mean_squared_distance": scale,
        "probs_dtype": probs_dtype,
        "factory": index.factory,
        "nprobe": index.nprobe,
    }


def _search(
    datastore: Datastore,
    index: Index,
    values: Tensor,
    start: int,
    stop: int,
    config: dict[str, Any],
) -> SparseTargets:
    queries = torch.from_numpy(np.array(datastore.keys[start:stop])).to(index.device).float()
    # The order within a row does not matter to knn_targets, and sorting is not free.
    count = min(config["num_neighbors"], datastore.num_rows)
    distances, ids = index.search(queries, count, in_order=False)
    return knn_targets(
        distances,
        ids,
        values,
        temperature=config["knn_temperature"],
        exclude_ids=torch.arange(start, stop, device=index.device),
    ).to("cpu")


def _to_half(targets: SparseTargets) -> SparseTargets:
    """probs in fp16, without the entries that fp16 cannot tell from 0."""
    half = targets.probs.half()
    kept = half > 0
    counts = torch.bincount(targets.row_ids()[kept], minlength=targets.num_rows)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparseTargets(offsets, targets.token_ids[kept], half[kept])


def _batch_sums(targets: SparseTargets, own_tokens: Tensor) -> dict[str, float]:
    probs, owner = targets.probs.double(), targets.row_ids()
    filled = targets.row_offsets.diff() > 0
    return {
        # Entries are sorted by descending probability.
        "top_prob": float(probs[targets.row_offsets[:-1][filled]].sum()),
        "entropy": -float(torch.xlogy(probs, probs).sum()),
        "own_token_prob": float(probs[targets.token_ids == own_tokens[owner]].sum()),
    }


def _stats(offsets_file: os.PathLike, sums: dict[str, float]) -> dict[str, Any]:
    """Of rows whose offsets may be a large part of memory: they are read a piece at a time."""
    offsets = np.memmap(offsets_file, np.dtype("<i8"), "r")
    rows, counts = len(offsets) - 1, np.zeros(1, np.int64)  # counts[n]: rows of n entries
    for start in range(0, rows, _STATS_ROWS):
        more = np.bincount(np.diff(offsets[start : start + _STATS_ROWS + 1]))
        longest = max(len(counts), len(more))
        counts = np.pad(counts, (0, longest - len(counts)))
        counts[: len(more)] += more
    return {
        "nnz_mean": float(offsets[-1] - offsets[0]) / rows,
        "nnz_p50": _percentile(counts, 50),
        "nnz_p99": _percentile(counts, 99),
        "empty_rows": int(counts[0]),
        **{name: total / rows for name, total in sums.items()},
    }


def _percentile(counts: np.ndarray, percent: float) -> float:
    """`np.percentile` of counts[n] times n."""
    ranks = counts.cumsum()
    place = (ranks[-1] - 1) * percent / 100
    low, high = np.searchsorted(ranks, [np.floor(place), np.ceil(place)], side="right")
    return float(low + (high - low) * (place % 1))
