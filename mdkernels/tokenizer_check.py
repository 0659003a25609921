"""One tokenizer for all: token ids of one vocabulary mean nothing to a model of another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .artifact import META, read_artifact
from .models import load_tokenizer, tokenizer_hash


def check_tokenizers(models: Sequence[Any], corpora: Sequence[Any] = ()) -> None:
    """Raise ValueError unless all models and corpora use one tokenizer, compared by content.

    Model directories that `mdkernels train` wrote are first compared with their checksums.

    `models` are directories or hub ids, whose tokenizer is loaded, or live models, which carry none
    and are skipped. The message names both hashes and, between two models, the first differing
    token.
    """
    seen: list[tuple[str, str, PreTrainedTokenizerBase | None]] = []
    for source in models:
        if not isinstance(source, nn.Module):
            check_trained(source)
            tokenizer = load_tokenizer(source)
            seen.append((f"model {source}", tokenizer_hash(tokenizer), tokenizer))
    seen += [(f"corpus {c.path}", c.tokenizer_hash, None) for c in corpora]
    for name, found, tokenizer in seen[1:]:
        first_name, expected, first = seen[0]
        if found != expected:
            difference = first_difference(first, tokenizer)
            raise ValueError(
                f"tokenizers differ: {first_name} has {expected}, {name} has {found}{difference}. "
                "Base, memory and corpora must share one tokenizer"
            )


def check_trained(source: Any) -> None:
    """Raise ArtifactError if `source` is the directory of a damaged training run.

    Hub ids, other directories and objects pass.
    """
    if isinstance(source, (str, os.PathLike)) and (Path(source) / META).is_file():
        read_artifact(source, "train", verify=True)


def first_difference(
    left: PreTrainedTokenizerBase | None, right: PreTrainedTokenizerBase | None
) -> str:
    """ ", the first differing token is ..." or "" where only one vocabulary is known."""
    if left is None or right is None:
        return ""
    by_id = [{i: token for token, i in t.get_vocab().items()} for t in (left, right)]
    for i in range(max(max(ids) for ids in by_id) + 1):
        pair = [ids.get(i) for ids in by_id]
        if pair[0] != pair[1]:
            shown = ["nothing" if token is None else repr(token) for token in pair]
            return f"; id {i} is {shown[0]} in the first and {shown[1]} in the second"
    return "; their vocabularies are equal but merges, added tokens or normalisation are not"
