"""Stage 2: token ids -> keys and values.

Reads: a corpus, a key model.
Writes: keys (R, D) fp16, values (R,) int32.

Row r is the pair (key, value) of corpus position r: the key is the hidden state there, taken at the
input of the last block's MLP (after its norm), and the value is the next token, token_ids[r + 1].
Distances between keys are squared L2 throughout the pipeline.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .artifact import Artifact, ArtifactError, read_artifact
from .artifact_writer import ArtifactWriter
from .corpus import Corpus, open_corpus, windows
from .models import capture_keys, check_source, evaluating, load_model, model_hash, model_id
from .tokenizer_check import check_tokenizers
from .train_config import resolve_device
from .value_checks import check_seconds, check_sizes

_SAMPLE_ROWS = 1 << 16


class Datastore:
    """An opened datastore artefact."""

    kind = "datastore"

    def __init__(self, artifact: Artifact):
        artifact.require(keys=("float16", 2), values=("int32", 1))
        self.artifact, self.path, self.meta = artifact, artifact.path, artifact.meta
        self.content_id = artifact.content_id
        self.tokenizer_hash: str = self.meta["tokenizer_hash"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.num_rows, self.dim = self.keys.shape
        if len(self.values) != self.num_rows or not self.num_rows or not self.dim:
            raise ArtifactError(
                f"{artifact}: keys {self.keys.shape} and values {self.values.shape} must have the "
                "same number of rows, 1 or more"
            )
        if artifact.verified and not 0 <= self.values.min() <= self.values.max() < self.vocab_size:
            raise ArtifactError(f"{artifact}: a value is outside [0, {self.vocab_size})")

    @property
    def keys(self) -> np.ndarray:
        """(R, D) fp16 read-only map; finite."""
        return self.artifact.array("keys")

    @property
    def values(self) -> np.ndarray:
        """(R,) int32 read-only map: the token after position r."""
        return self.artifact.array("values")

    def mean_squared_distance(self) -> float:
        """Mean squared L2 distance of two different keys: the natural unit of `knn_temperature`.

        Exact over all pairs of up to 65536 evenly spaced rows, in fp64:
        2 n / (n - 1) * (mean ||k||^2 - ||mean k||^2). Deterministic. 0 for a single row.
        """
        rows = np.linspace(0, self.num_rows - 1, min(self.num_rows, _SAMPLE_ROWS)).astype(np.int64)
        total, squares = np.zeros(self.dim), 0.0
        for part in np.array_split(rows, max(1, len(rows) // 4096)):
            keys = self.keys[part].astype(np.float64)
            total += keys.sum(0)
            squares += np.square(keys).sum()
        n = len(rows)
        variance = squares / n - np.square(total / n).sum()
        return float(max(0.0, 2 * n / (n - 1) * variance)) if n > 1 else 0.0


def open_datastore(datastore: Datastore | str | os.PathLike, *, verify: bool = False) -> Datastore:
    """Open a datastore directory; an opened one is returned as it is. See `read_artifact`."""
    if isinstance(datastore, Datastore):
        return datastore
    return Datastore(read_artifact(datastore, Datastore.kind, verify=verify))


def build_datastore(
    corpus: Corpus | str | os.PathLike,
    model: PreTrainedModel | str | os.PathLike,
    out: str | os.PathLike,
    *,
    block: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | str = "auto",
    device: str = "auto",
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
) -> Datastore:
    """Write the keys and values of every row of `corpus` to `out`.

    A killed run leaves `<out>.partial` and continues from its last checkpoint when it is called
    again with the same corpus, weights, `block`, `stride` and dtype.

    Args:
        model: live (used where it is, as it is), or a directory or hub id, loaded as `dtype` on
            `device`. Families: see `models.key_module`.
        block, stride: the windows, see `corpus.windows`. `stride=None` is block // 2.
        batch_size: windows per forward pass.
        checkpoint_seconds: at most this much work is repeated after a kill.

    Raises ValueError for a model of another tokenizer, a window longer than its context, or a key
    that fp16 cannot hold: it is never clipped, which would move neighbours without a word.
    """
    corpus = open_corpus(corpus)
    check_source("model", model)
    if not isinstance(model, PreTrainedModel):
        check_tokenizers([model], [corpus])
        model = load_model(model, dtype=dtype, device=resolve_device(device))
    check_sizes(block, stride, batch_size)
    check_seconds("checkpoint_seconds", checkpoint_seconds)
    stride = max(1, block // 2) if stride is None else stride
    spans = windows(corpus.num_rows, block, stride)
    _check_model(model, corpus, min(block, corpus.num_rows))
    header = {
        "tokenizer_hash": corpus.tokenizer_hash,
        "vocab_size": corpus.vocab_size,
        "config": {"block": block, "stride": stride, "dtype": str(model.dtype)},
        "model": {"hash": model_hash(model)},
        "inputs": {Corpus.kind: corpus.content_id},
    }
    with ArtifactWriter(out, Datastore.kind, header, overwrite=overwrite) as writer:
        done = writer.state.get("windows", 0)
        first = int(spans[done, 0]) if done < len(spans) else corpus.num_rows
        keys = writer.array("keys", "float16", (model.config.hidden_size,))
        values = writer.array("values", "int32")
        progress = tqdm(
            desc="datastore", total=corpus.num_rows, initial=first, unit="tok", disable=None
        )
        with progress:
            saved = time.monotonic()
            stream = compute_keys(model, corpus.token_ids, spans[done:], block, batch_size)
            for start, batch in stream:
                stop = start + len(batch)
                keys.append(_to_half(batch, start))
                values.append(corpus.token_ids[start + 1 : stop + 1].astype(np.int32))
                progress.update(len(batch))
                done = min(done + batch_size, len(spans))
                if time.monotonic() - saved >= checkpoint_seconds:
                    writer.checkpoint(windows=done)
                    saved = time.monotonic()
        model_entry = header["model"] | {"id": model_id(model)}
        return Datastore(writer.commit(model=model_entry))


@torch.inference_mode()
def compute_keys(
    model: PreTrainedModel, token_ids: np.ndarray, spans: np.ndarray, block: int, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, keys (n, D)) for consecutive rows, in the model's dtype and device.

    `spans` is a run of consecutive windows of `corpus.windows`. The LM head does not run;
    `model.training` is restored at the end.
    """
    with evaluating(model), capture_keys(model) as latest:
        for i in range(0, len(spans), batch_size):
            group = spans[i : i + batch_size]
            inputs = [token_ids[max(0, stop - block) : stop] for _, stop in group]
            input_ids = torch.from_numpy(np.stack(inputs).astype(np.int64)).to(model.device)
            # Eos tokens look like padding to some families, which warn unless they get a mask.
            mask = torch.ones_like(input_ids)
            model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            states = latest()
            tails = zip(states, group[:, 1] - group[:, 0], strict=True)
            yield int(group[0, 0]), torch.cat([state[-count:] for state, count in tails])


def _to_half(keys: Tensor, first_row: int) -> np.ndarray:
    half = keys.to(torch.float16).cpu()
    if not torch.isfinite(half).all():
        row = int(torch.isfinite(half).all(1).logical_not().nonzero()[0, 0])
        worst = keys[row].float().abs().max().item()
        raise ValueError(
            f"model: the key of row {first_row + row} reaches {worst}, fp16 keys hold up to 65504; "
            "load the model as float32 or bfloat16 if it computes in float16, else choose another "
            "key model"
        )
    return half.numpy()


def _check_model(model: PreTrainedModel, corpus: Corpus, length: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < corpus.vocab_size:
        raise ValueError(
            f"model: {model_id(model)} embeds {rows} tokens, the corpus at {corpus.path} has a "
            f"vocabulary of {corpus.vocab_size}; use a model of that tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"block: windows of {length} tokens do not fit the context of {model_id(model)}, "
            f"{context}; use a smaller block"
        )
