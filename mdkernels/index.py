"""Stage 3: datastore -> a searchable index over its keys, by squared L2 distance.

Reads: a datastore.
Writes: for "exact" the centre of the keys, for a faiss factory string the faiss index.

"exact" is plain torch and needs nothing; see exact_search.py. Any other factory string goes to
faiss, where it is installed: "IVF4096,PQ64" is the paper's setting. The ids a search returns are
datastore rows.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifact import Artifact, ArtifactError, read_artifact
from .artifact_writer import ArtifactWriter
from .datastore import Datastore, open_datastore
from .exact_search import exact_search
from .faiss_build import ADD_ROWS, build_faiss, import_faiss
from .train_config import resolve_device
from .value_checks import check_integer

EXACT = "exact"
_FILE = "index.faiss"


class Index:
    """An opened index over the keys of one datastore. Made by `open_index`."""

    kind = "index"

    def __init__(self, artifact: Artifact, datastore: Datastore, device: torch.device):
        artifact.expect(
            str(datastore.artifact),
            inputs={Datastore.kind: datastore.content_id},
            tokenizer_hash=datastore.tokenizer_hash,
        )
        self.artifact, self.path, self.meta = artifact, artifact.path, artifact.meta
        self.content_id = artifact.content_id
        self.factory: str = self.meta["config"]["factory"]
        self.num_rows, self.dim = datastore.num_rows, datastore.dim
        self.device = device
        self.nprobe: int | None = None
        """Cells an IVF index visits per query; None for indexes without cells."""

    def search(
        self, queries: Tensor | np.ndarray, num_neighbors: int, *, in_order: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The `num_neighbors` nearest keys of each query.

        Args:
            queries: (n, D) fp32, finite, a tensor on any device or an array.
            in_order: False leaves each row in any order, which is cheaper.

        Returns:
            distances (n, num_neighbors) fp32 squared L2 and ids (n, num_neighbors) int64, on the
            device of the queries, ascending by distance; +inf and -1 where none was found.
            Distances of a compressed faiss index are those to the compressed keys.
        """
        if isinstance(queries, np.ndarray):
            queries = torch.from_numpy(np.array(queries))  # a copy: it may be a read-only map
        if queries.dtype != torch.float32 or queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"queries: expected float32 (n, {self.dim}), got {queries.dtype} "
                f"{tuple(queries.shape)}"
            )
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors: must be at least 1, got {num_neighbors}")
        distances, ids = self._search(queries, num_neighbors, in_order)
        return distances.to(queries.device), ids.to(queries.device)


class ExactIndex(Index):
    """Exhaustive search; every key is compared with every query."""

    def __init__(self, artifact: Artifact, datastore: Datastore, device: torch.device):
        super().__init__(artifact, datastore, device)
        artifact.require(center=("float32", 1))
        self._center = torch.from_numpy(np.array(artifact.array("center")))
        self._keys: np.ndarray | Tensor = datastore.keys
        # Sending the keys to a GPU on each search would cost more than the search itself.
        if device.type == "cuda" and self._keys.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            self._keys = torch.from_numpy(np.array(self._keys)).to(device)

    def _search(self, queries: Tensor, num_neighbors: int, in_order: bool):
        return exact_search(
            queries.to(self.device),
            self._keys,
            num_neighbors,
            center=self._center,
            in_order=in_order,
        )


class FaissIndex(Index):
    """Approximate search by faiss, as its factory string says."""

    def __init__(
        self, artifact: Artifact, datastore: Datastore, device: torch.device, nprobe: int | None
    ):
        super().__init__(artifact, datastore, device)
        faiss = import_faiss(self.factory)
        try:
            index = faiss.read_index(str(artifact.file(_FILE)))
        except RuntimeError as error:
            raise ArtifactError(f"{artifact}: faiss cannot read {_FILE}: {error}") from error
        found = (index.d, index.ntotal, index.metric_type)
        wanted = (self.dim, self.num_rows, faiss.METRIC_L2)
        if found != wanted:
            raise ArtifactError(
                f"{artifact}: (dimension, rows, metric) is {found} in {_FILE}, expected {wanted}"
            )
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            wanted = self.meta["config"]["nprobe"] if nprobe is None else nprobe
            self.nprobe = ivf.nprobe = min(wanted, ivf.nlist)
        if device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0:
            self._resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, index)
        self._index = index

    def _search(self, queries: Tensor, num_neighbors: int, in_order: bool):
        contiguous = np.ascontiguousarray(queries.detach().cpu().numpy())
        found, labels = self._index.search(contiguous, num_neighbors)
        distances, ids = torch.from_numpy(found), torch.from_numpy(labels)
        distances.clamp_(min=0).masked_fill_(ids < 0, torch.inf)
        # faiss sorts, except where it was built with cuVS.
        if in_order and bool((distances[:, 1:] < distances[:, :-1]).any()):
            distances, order = distances.sort(1)
            ids = ids.gather(1, order)
        return distances, ids


def open_index(
    index: Index | str | os.PathLike,
    datastore: Datastore | str | os.PathLike,
    *,
    device: str = "auto",
    nprobe: int | None = None,
) -> Index:
    """Open an index directory together with its datastore; an opened index is returned as it is.

    Args:
        device: where to search, "auto" being a GPU if there is one.
        nprobe: cells visited per query by an IVF index; None is what the index was built with.

    Raises ArtifactError if the index is damaged or was built from another datastore.
    """
    if isinstance(index, Index):
        return index
    if nprobe is not None and nprobe < 1:
        raise ValueError(f"nprobe: must be at least 1, got {nprobe}")
    datastore = open_datastore(datastore)
    # faiss parses its file with few checks of its own, so it only gets bytes that were verified.
    artifact = read_artifact(index, Index.kind, verify=True)
    if artifact.meta["config"]["factory"] == EXACT:
        return ExactIndex(artifact, datastore, resolve_device(device))
    return FaissIndex(artifact, datastore, resolve_device(device), nprobe)


def build_index(
    datastore: Datastore | str | os.PathLike,
    out: str | os.PathLike,
    factory: str = EXACT,
    *,
    nprobe: int = 32,
    train_rows: int | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpoint_seconds: float = 300.0,
    overwrite: bool = False,
) -> Index:
    """Index the keys of `datastore` into the artefact `out` and open it.

    A killed faiss build leaves `<out>.partial` and continues from its last checkpoint when it is
    called again with the same datastore and settings.

    Args:
        factory: "exact", or a faiss factory string such as "IVF4096,PQ64" or "HNSW32".
        nprobe: default number of cells an IVF index visits per query; others ignore it.
        train_rows: random keys faiss trains on; None is 64 per IVF cell, at least 65536.
        seed: of that sample.
        device: where the returned index searches; faiss trains and adds on the CPU.
        checkpoint_seconds: training apart, about this much work is repeated after a kill. Each
            checkpoint writes the index so far: the disk needs room for it twice.

    Raises ImportError if faiss is needed and missing, ValueError for a factory string it refuses.
    """
    datastore = open_datastore(datastore)
    config: dict[str, Any] = {"factory": factory}
    if factory != EXACT:
        config |= {"nprobe": nprobe, "train_rows": train_rows, "seed": seed}
        import_faiss(factory)
        check_integer("nprobe", nprobe, 1)
        check_integer("seed", seed, 0)
        if train_rows is not None:
            check_integer("train_rows", train_rows, 1)
    header = {
        "tokenizer_hash": datastore.tokenizer_hash,
        "vocab_size": datastore.vocab_size,
        "config": config,
        "inputs": datastore.meta["inputs"] | {Datastore.kind: datastore.content_id},
    }
    with ArtifactWriter(out, Index.kind, header, overwrite=overwrite) as writer:
        if factory == EXACT:
            writer.array("center", "float32").append(_center(datastore.keys))
        else:
            build_faiss(
                writer, _FILE, datastore.keys, factory, train_rows, seed, checkpoint_seconds
            )
        artifact = writer.commit()
    return open_index(artifact.path, datastore, device=device)


def _center(keys: np.ndarray) -> np.ndarray:
    """Mean of up to 65536 evenly spaced keys; exact_search wants any point near the middle."""
    rows = np.linspace(0, len(keys) - 1, min(len(keys), ADD_ROWS)).astype(np.int64)
    return keys[rows].mean(0, dtype=np.float64).astype(np.float32)
