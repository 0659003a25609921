"""A corpus of random tokens with kNN-like targets, in our format and in that of the authors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import official_loop
import torch

from mdkernels import SparseTargets
from mdkernels.artifact import read_artifact
from mdkernels.artifact_writer import ArtifactWriter
from mdkernels.batches import WindowBatches
from mdkernels.integrations import official
from mdkernels.targets import TargetStore

_STEP = 7919  # a prime that no vocabulary here is a multiple of, so that ids of a row are distinct


@dataclass
class Data:
    """The same targets twice, memory-mapped, and batches of ours over them."""

    tokens: np.ndarray
    table: object
    batches: WindowBatches
    vocab: int
    block: int


def make(root: Path, *, rows: int, block: int, scored: int, vocab: int, mean: float = 65.0) -> Data:
    """`rows` rows of 1..1023 entries (lognormal, `mean` on average), window after window of
    `block` inputs whose last `scored` rows count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, rows + 1).astype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    spread = 1.05
    counts = rng.lognormal(np.log(mean) - spread**2 / 2, spread, rows)
    counts = np.clip(np.rint(counts), 1, min(1023, vocab)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    first = np.repeat(rng.integers(0, vocab, rows), counts)
    ids = ((first + place * _STEP) % vocab).astype(np.int32)
    probs = rng.exponential(size=offsets[-1])
    # Descending within a row, as all writers of these files have it.
    owner = np.repeat(np.arange(rows), counts)
    probs = probs[np.lexsort((-probs, owner))]
    probs /= np.repeat(np.add.reduceat(probs, offsets[:-1]), counts)

    targets = SparseTargets(
        torch.from_numpy(offsets), torch.from_numpy(ids), torch.from_numpy(probs.astype(np.float32))
    )
    labels = torch.from_numpy(tokens[1:].astype(np.int64))
    official.write_targets(root / "knn.arrow", targets, labels)
    header = {
        "tokenizer_hash": "none",
        "vocab_size": vocab,
        "config": {"knn_temperature": 1.0},
        "inputs": {},
    }
    with ArtifactWriter(root / "targets", TargetStore.kind, header) as writer:
        for name in ("row_offsets", "token_ids", "probs"):
            array = getattr(targets, name).numpy()
            writer.array(name, array.dtype.name).append(array)
        writer.commit()
    store = TargetStore(read_artifact(root / "targets", TargetStore.kind))
    # Windows that do not overlap in what they score, each with a whole block before its end.
    stops = np.arange(block, rows + 1, scored)
    spans = np.stack([stops - scored, stops], axis=1)
    batches = WindowBatches(tokens, spans, block, seed=0, targets=store)
    return Data(tokens, official_loop.open_table(root / "knn.arrow"), batches, vocab, block)
