"""Gold log-probabilities: what a model, or a datastore, gives the right token at every position.

One fp32 number per row is all that evaluation keeps; logits live one chunk at a time in a reused
buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .batches import WindowBatches
from .corpus import Corpus, open_corpus, windows
from .models import lm_head, model_id
from .ops.knn_targets import knn_targets
from .ops.token_logprobs import token_logprobs

# One chunk of logits; larger ones fall out of the last-level cache of a CPU.
_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


@torch.inference_mode()
def gold_logprobs(
    model,
    corpus: Corpus | str | os.PathLike,
    *,
    block: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    rows: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    label: str = "evaluate",
) -> Tensor:
    """fp32 (stop - start,) on the CPU: log p(token r+1 | its window) for the rows r of a corpus.

    Equivalent, for each window of `block` inputs, to `model(input_ids).logits.log_softmax(-1)`
    gathered at the last `stride` labels. Every row is scored once.

    Args:
        model: a live Hugging Face causal LM; runs on its device, in its dtype.
        block: tokens a window reads; `stride`: how many it scores (None: block // 2).
        batch_size: windows per forward pass.
        rows: (start, stop) to score only these; their contexts are those of the whole corpus.
        autocast: run the trunk under autocast to this dtype (logits are then of that dtype too).
        compile: torch.compile the trunk first; pays from some 10^5 tokens on.
        label: name on the progress bar.

    Raises ValueError when the model cannot score this corpus: context, vocabulary, kind of head.
    """
    corpus = open_corpus(corpus)
    stride = max(1, block // 2) if stride is None else stride
    check_scorable(model, corpus, block)
    start, stop = (0, corpus.num_rows) if rows is None else rows
    if not 0 <= start < stop <= corpus.num_rows:
        raise ValueError(f"rows: ({start}, {stop}) is no range within [0, {corpus.num_rows}]")
    spans = np.asarray(windows(corpus.num_rows, block, stride), dtype=np.int64)
    spans = spans[(spans[:, 1] > start) & (spans[:, 0] < stop)]
    data = WindowBatches(corpus.token_ids, spans, block, seed=0)

    device = model.device
    trunk = torch.compile(model.base_model, dynamic=False) if compile else model.base_model
    head = ChunkedHead(lm_head(model), autocast)
    was_training = model.training
    model.eval()
    pieces = []
    bar = tqdm(total=stop - start, desc=label, unit="tok", unit_scale=True, disable=None)
    with bar, unpadded(model):
        for i in range(0, len(spans), batch_size):
            picked = spans[i : i + batch_size]
            batch = data.gather(picked, batch_size if compile else len(picked)).to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                hidden = trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            pieces.append(head.logprobs(batch.select(hidden), batch.labels).cpu())
            bar.update(len(pieces[-1]))
    model.train(was_training)
    first = int(spans[0, 0])
    return torch.cat(pieces)[start - first : stop - first]


class ChunkedHead:
    """Logits of hidden states, chunk by chunk through one reused buffer; `vocab`: of the first ids
    only, None: of all."""

    def __init__(
        self, head: torch.nn.Linear, dtype: torch.dtype | None = None, vocab: int | None = None
    ):
        dtype = head.weight.dtype if dtype is None else dtype
        self.weight = head.weight.detach()[:vocab].to(dtype)
        self.bias = None if head.bias is None else head.bias.detach()[:vocab].to(dtype)
        bytes_per_row = len(self.weight) * self.weight.element_size()
        budget = _LOGITS_BYTES.get(self.weight.device.type, 512 << 20)
        self.chunk = max(16, budget // bytes_per_row)
        self.buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Of at most `chunk` hidden states, (rows, vocab); overwritten by the next call."""
        hidden = hidden.to(self.weight.dtype)
        if self.buffer is None or len(self.buffer) < len(hidden):
            self.buffer = hidden.new_empty(len(hidden), len(self.weight))
        logits = self.buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=logits)
        return torch.addmm(self.bias, hidden, self.weight.T, out=logits)

    def logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        out = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(labels), self.chunk):
            rows = slice(i, i + self.chunk)
            out[rows] = token_logprobs(self.logits(hidden[rows]), labels[rows])
        return out


@contextmanager
def unpadded(model) -> Iterator[None]:
    """Within the context, inputs are known to have no padding; may be nested.

    GPT-2 would search every batch for it, which waits for the device, and warn about eos tokens.
    """
    attributes = vars(model.base_model)
    name = "warn_if_padding_and_no_attention_mask"
    outer = attributes.get(name)
    attributes[name] = lambda *_: None
    try:
        yield
    finally:
        attributes.pop(name)
        if outer is not None:
            attributes[name] = outer


def check_scorable(model, corpus: Corpus, block: int) -> None:
    """Raise ValueError unless `lm_head(hidden states)` are the model's logits for such windows."""
    name = model_id(model)
    head = lm_head(model)
    if head.weight.shape[0] < corpus.vocab_size:
        raise ValueError(
            f"model {name}: its LM head has {head.weight.shape[0]} tokens, the corpus at "
            f"{corpus.path} has a vocabulary of {corpus.vocab_size}; use a model of that tokenizer"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    length = min(block, corpus.num_rows)
    if context is not None and length > context:
        raise ValueError(
            f"block: {block} tokens do not fit the context of model {name}, {context}; use a "
            "smaller block"
        )
    check_head(model, torch.from_numpy(np.array(corpus.token_ids[:8], dtype=np.int64)))


def check_head(model, token_ids: Tensor) -> None:
    """Raise ValueError unless `lm_head(hidden states)` are the model's logits, probed on a few
    tokens: some families scale or cap their logits behind the head."""
    name, head = model_id(model), lm_head(model)
    probe = token_ids[None].to(model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), unpadded(model):
        expected = model(input_ids=probe, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        found = head(hidden).float()
    model.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"model {name} ({model.config.model_type}) changes its logits after the LM head, which "
            "scoring through the head alone would miss; use a family that does not"
        )


def knn_logprobs(
    index,
    datastore,
    queries: Tensor,
    labels: Tensor,
    *,
    num_neighbors: int,
    knn_temperature: float,
    exclude_ids: Tensor | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """fp32 (n,): log p_kNN(label) of kNN-LM (paper eq. 2); -inf where no neighbour has the label.

    Equivalent to softmax(-d / knn_temperature) over the `num_neighbors` nearest keys, summed over
    those whose value is the label. `knn_temperature` is in squared key units.

    Args:
        index, datastore: as built by the stages of those names.
        queries: (n, D) keys of the positions to score; labels: (n,) their next tokens.
        exclude_ids: (n,) the datastore row of each query, left out; only for the corpus of the
            datastore itself.
    """
    values = torch.from_numpy(np.array(datastore.values))
    labels = labels.to(torch.int32)
    out = torch.empty(len(labels), dtype=torch.float32)
    for i in tqdm(range(0, len(labels), batch_size), desc="kNN", unit="batch", disable=None):
        part = slice(i, i + batch_size)
        query = queries[part].float()
        distances, ids = index.search(query, num_neighbors)
        targets = knn_targets(
            torch.as_tensor(distances),
            torch.as_tensor(ids),
            values,
            temperature=knn_temperature,
            exclude_ids=None if exclude_ids is None else exclude_ids[part],
        )
        owner = targets.row_ids()
        hit = targets.token_ids == labels[part][owner]
        mass = torch.zeros(len(query)).index_add_(0, owner[hit], targets.probs[hit].float())
        out[part] = mass.log()
    return out
