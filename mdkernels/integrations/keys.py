"""Datastore keys with their kNN targets: the data of a memory that reads hidden states.

MLP Memory (arXiv 2508.01832) is such a memory: an MLP from the base model's hidden state to the
next token, trained on the targets that a Memory Decoder is trained on.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..datastore import Datastore, open_datastore
from ..targets import TargetStore, open_targets
from ..value_checks import check_integer


class KeyDataset(Dataset):
    """Batches of consecutive datastore rows; `DataLoader(..., batch_size=None, shuffle=True)`
    shuffles the batches.

    Item i is a dict, n = batch_size rows or what is left of them:
        keys: (n, D) fp32, the base model's hidden states at the input of its last MLP.
        labels: (n,) int64 next tokens.
        targets: SparseTargets of n rows: views of the memory-mapped file, not to be written to.

    Copies to other processes carry the paths, not the data.

    Args:
        datastore, targets: artefacts of those stages, opened or as directories.

    Raises ArtifactError when the targets were not made from this datastore, TypeError for targets
    that do not say.
    """

    def __init__(
        self,
        datastore: Datastore | str | os.PathLike,
        targets: TargetStore | str | os.PathLike,
        *,
        batch_size: int = 512,
    ):
        self.datastore, self.targets = open_datastore(datastore), open_targets(targets)
        if not isinstance(self.targets, TargetStore):
            raise TypeError(
                "targets: expected an artefact of the targets stage, which says what datastore it "
                f"was made from, got {type(self.targets).__name__}"
            )
        check_integer("batch_size", batch_size, 1)
        self.targets.artifact.expect(
            str(self.datastore.artifact), inputs={Datastore.kind: self.datastore.content_id}
        )
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.datastore.num_rows // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: {index} is not within [0, {len(self)})")
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.datastore.num_rows)
        return {
            "keys": torch.from_numpy(self.datastore.keys[start:stop].astype(np.float32)),
            "labels": torch.from_numpy(self.datastore.values[start:stop].astype(np.int64)),
            "targets": self.targets.rows(start, stop),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {
            "datastore": self.datastore.path,
            "targets": self.targets.path,
            "batch_size": self.batch_size,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
