"""The pipeline's corpus and targets as a torch dataset, and the batches other trainers take.

Examples use the names of Hugging Face: `labels` are not yet shifted (labels[t] is input_ids[t], or
-100), `shift_labels` are (shift_labels[t] is the token after position t). Position t is scored
where its next token is not -100, and `targets` has one row per scored position, in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..corpus import Corpus, open_corpus
from ..ops.sparse_targets import SparseTargets
from ..targets import open_targets
from ..value_checks import check_integer
from .topk import from_topk_logprobs

IGNORE_INDEX = -100
_VECTORS = ("input_ids", "labels", "shift_labels", "attention_mask")
_TOPK = ("target_token_ids", "target_logprobs", "target_mask")
_KNOWN = {*_VECTORS, "targets", *_TOPK}


class WindowDataset(Dataset):
    """The windows of a corpus (see `corpus.windows`) with their kNN targets.

    Item i is a dict:
        input_ids: (T,) int64, T = min(block, rows of the corpus).
        shift_labels: (T,) int64 next tokens; -100 where this window only reads and another scores.
        targets: SparseTargets with one row per scored position: views of the memory-mapped file,
            which must not be written to. Absent without `targets`, as for validation text.

    Copies to other processes carry the paths of artefacts, not their data.

    Args:
        corpus: an artefact of that stage, opened or as a directory.
        targets: likewise, or whatever else `open_targets` takes.
        block: tokens a window reads; `stride`: how many it scores (None: block // 2).

    Raises ArtifactError when the targets are not those of the corpus.
    """

    def __init__(
        self,
        corpus: Corpus | str | os.PathLike,
        targets: Any = None,
        *,
        block: int = 1024,
        stride: int | None = None,
    ):
        self.corpus = open_corpus(corpus)
        self.targets = None if targets is None else open_targets(targets)
        if self.targets is not None:
            self.targets.check_corpus(self.corpus)
        check_integer("block", block, 1)
        if stride is not None:
            check_integer("stride", stride, 1, block)
        self.block, self.stride = block, max(1, block // 2) if stride is None else stride
        self.spans = self.corpus.windows(self.block, self.stride)
        self.length = min(block, self.corpus.num_rows)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = map(int, self.spans[index])
        first = stop - self.length
        tokens = torch.from_numpy(self.corpus.token_ids[first : stop + 1].astype(np.int64))
        shift_labels = tokens[1:].clone()
        shift_labels[: start - first] = IGNORE_INDEX
        item = {"input_ids": tokens[:-1], "shift_labels": shift_labels}
        if self.targets is not None:
            item["targets"] = self.targets.rows(start, stop)
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.path,
            "targets": getattr(self.targets, "path", self.targets),
            "block": self.block,
            "stride": self.stride,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


@dataclass(frozen=True)
class SparseTargetsCollator:
    """Examples to one batch, targets joined and never padded or dense.

    An example is a mapping of input_ids (T,), `labels` or `shift_labels` (T,), optionally
    `attention_mask` (T,), and `targets`: SparseTargets on the CPU with a row per scored position.
    Lists do as vectors. Either all examples have targets or none.

    In place of `targets`, an example may have the columns that axolotl prepares, (T, K) each and as
    `from_topk_logprobs` takes them: target_token_ids, target_logprobs, perhaps target_mask. Row t
    is the teacher's distribution of the token that labels[t], or shift_labels[t], names.

    Returns a dict of new tensors, B examples padded on the right to T, n scored positions:
        input_ids: (B, T) int64.
        shift_labels, labels: (B, T) int64 next tokens, padded with -100; one and the same tensor.
            The Trainer asks for `labels`, and both it and Hugging Face losses prefer
            `shift_labels` where they would have shifted `labels`.
        scored: (n,) int64, the scored positions within the flattened B * T.
        attention_mask: (B, T) int64, only if some example has one or is shorter than the others.
        targets: SparseTargets of n rows; it has .to(device), .pin_memory() and can be pickled.

    Args:
        pad_token_id: what input_ids are padded with.
        renormalize: make the rows of target_logprobs sum to 1.

    Raises ValueError naming the example that is not as described.
    """

    pad_token_id: int = 0
    renormalize: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("examples: got none, expected one or more")
        parts = [
            _check(number, example, self.renormalize) for number, example in enumerate(examples)
        ]
        shift_labels = _pad([part["shift_labels"] for part in parts], IGNORE_INDEX)
        batch = {
            "input_ids": _pad([part["input_ids"] for part in parts], self.pad_token_id),
            "labels": shift_labels,
            "shift_labels": shift_labels,
            "scored": (shift_labels.view(-1) != IGNORE_INDEX).nonzero().squeeze(1),
        }
        lengths = {len(part["input_ids"]) for part in parts}
        if len(lengths) > 1 or any("attention_mask" in part for part in parts):
            masks = [
                part.get("attention_mask", torch.ones_like(part["input_ids"])) for part in parts
            ]
            batch["attention_mask"] = _pad(masks, 0)
        given = ["targets" in part for part in parts]
        if any(given):
            if not all(given):
                raise ValueError(
                    f"examples: number {given.index(False)} has no targets, but others have; use "
                    "SparseTargets.empty(n) for n scored positions without any"
                )
            batch["targets"] = SparseTargets.cat([part["targets"] for part in parts])
        return batch


def _check(number: int, example: Mapping[str, Any], renormalize: bool) -> dict[str, Any]:
    """The example with tensors, its labels shifted, and SparseTargets if it has any targets."""
    if not isinstance(example, Mapping):
        raise ValueError(
            f"examples: number {number} is {type(example).__name__}, expected a mapping"
        )
    unknown = sorted(set(example) - _KNOWN)
    if unknown:
        raise ValueError(
            f"examples: number {number} has {unknown}, expected only {sorted(_KNOWN)}; remove the "
            "other columns from the dataset"
        )
    if "input_ids" not in example or ("labels" in example) == ("shift_labels" in example):
        raise ValueError(
            f"examples: number {number} has {sorted(example)}; expected input_ids, and labels "
            "(labels[t] is input_ids[t]) or shift_labels (shift_labels[t] comes after position t)"
        )
    part = {name: _vector(number, name, example[name]) for name in _VECTORS if name in example}
    if "labels" in part:
        labels = part.pop("labels")
        part["shift_labels"] = torch.cat([labels[1:], labels.new_full((1,), IGNORE_INDEX)])
    shapes = {name: tuple(value.shape) for name, value in part.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(
            f"examples: number {number} has shapes {shapes}, expected vectors of one length"
        )
    targets = example.get("targets")
    if not example.keys().isdisjoint(_TOPK):
        if targets is not None:
            raise ValueError(
                f"examples: number {number} has {sorted(example)}; expected targets or {_TOPK}"
            )
        targets = _topk(number, example, part["shift_labels"] != IGNORE_INDEX, renormalize)
    if targets is not None:
        if not isinstance(targets, SparseTargets):
            raise ValueError(
                f"examples: number {number} has targets of type {type(targets).__name__}, expected "
                "SparseTargets"
            )
        scored = int((part["shift_labels"] != IGNORE_INDEX).sum())
        if targets.num_rows != scored:
            raise ValueError(
                f"examples: number {number} has {targets.num_rows} rows of targets for {scored} "
                "scored positions; pick them with targets.select(mask)"
            )
        part["targets"] = targets
    return part


def _topk(
    number: int, example: Mapping[str, Any], scored: Tensor, renormalize: bool
) -> SparseTargets:
    """The targets of the scored positions from the top-k columns of an example."""
    columns = []
    for name in _TOPK:
        if name == "target_mask" and name not in example:
            continue
        try:
            column = torch.as_tensor(example.get(name))
        except (TypeError, ValueError, RuntimeError):
            column = None
        if column is None or column.ndim != 2 or len(column) != len(scored):
            found = type(example.get(name)).__name__ if column is None else tuple(column.shape)
            raise ValueError(
                f"examples: {name} of number {number} is {found}, expected numbers of shape "
                f"({len(scored)}, k)"
            )
        columns.append((column.roll(-1, 0) if "labels" in example else column)[scored])
    try:
        return from_topk_logprobs(*columns, renormalize=renormalize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"examples: number {number}: {error}") from error


def _vector(number: int, name: str, value: Any) -> Tensor:
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        vector = None
    # An empty list becomes floats.
    if vector is None or vector.ndim != 1 or (vector.is_floating_point() and len(vector)):
        found = type(value).__name__
        if vector is not None:
            found = f"{vector.dtype} {tuple(vector.shape)}"
        raise ValueError(
            f"examples: {name} of number {number} is {found}, expected a vector of integers"
        )
    return vector.long()


def _pad(vectors: list[Tensor], value: int) -> Tensor:
    return pad_sequence(vectors, batch_first=True, padding_value=value)
