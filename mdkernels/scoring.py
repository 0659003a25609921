"""Gold log-probabilities: what a model, or a datastore, gives the right token at every position.

One fp32 number per row is all that evaluation keeps; logits live one chunk of scored rows at a
time.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Batch, WindowBatches
from .corpus import Corpus, open_corpus, windows
from .memory_loss import one_text_per_window
from .mixture_config import context_length
from .models import evaluating, lm_head, model_id, plain_model
from .ops.knn_targets import knn_targets
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.token_logprobs import token_logprobs
from .value_checks import check_range, check_sizes

# Of a model whose logits have to be taken whole; one window is taken in any case.
_LOGITS_BYTES = 512 << 20

# (n,) fp32 of the n scored rows of a batch, whose windows score at most so many rows each.
_Scorer = Callable[[Batch, int], Tensor]


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
    gathered at the last `stride` labels. Every row is scored once. A model that changes its logits
    behind a linear head (Gemma 2 caps them) gives them whole, of the scored positions; all others
    go through `linear_token_logprobs`.

    Args:
        model: a live Hugging Face causal LM, or one with adapters of peft; runs on its device, in
            its dtype.
        block: tokens a window reads; `stride`: how many it scores (None: block // 2).
        batch_size: windows per forward pass.
        rows: (start, stop) to score only these; their contexts are those of the whole corpus.
        autocast: run the trunk under autocast to this dtype (logits are then of that dtype too).
        compile: torch.compile the trunk first; pays from some 10^5 tokens on.
        label: name on the progress bar.

    Raises ValueError when the model cannot score this corpus: context, vocabulary, no linear head;
    FloatingPointError for NaN logits.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model: expected a live Hugging Face causal LM, got {type(model).__name__}; "
            "mdkernels.models.load_model loads one"
        )
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast: expected a torch.dtype or None, got {autocast!r:.60}")
    model, corpus = plain_model(model), open_corpus(corpus)
    check_sizes(block, stride, batch_size)
    stride = max(1, block // 2) if stride is None else stride
    _check_fits(model, corpus, block)
    start, stop = (0, corpus.num_rows) if rows is None else check_range("rows", rows)
    if not 0 <= start < stop <= corpus.num_rows:
        raise ValueError(f"rows: ({start}, {stop}) is no range within [0, {corpus.num_rows}]")
    spans = np.asarray(windows(corpus.num_rows, block, stride), dtype=np.int64)
    spans = spans[(spans[:, 1] > start) & (spans[:, 0] < stop)]
    data = WindowBatches(corpus.token_ids, spans, block, seed=0)
    counts = spans[:, 1] - spans[:, 0]
    if head_is_last(model, corpus.token_ids):
        scorer = _head_scorer(model, autocast, compile)
    else:
        scorer = _model_scorer(model, autocast, compile)
        window_bytes = int(counts.max()) * len(lm_head(model).weight) * 4
        batch_size = max(1, min(batch_size, _LOGITS_BYTES // window_bytes))

    device = model.device
    pin = device.type == "cuda"
    # On the device: reading each batch's scores would wait for it.
    scores = torch.empty(int(counts.sum()), dtype=torch.float32, device=device)
    row = 0
    bar = tqdm(total=stop - start, desc=label, unit="tok", unit_scale=True, disable=None)
    with bar, evaluating(model), unpadded(model), one_text_per_window():
        for i in range(0, len(spans), batch_size):
            picked = spans[i : i + batch_size]
            batch = data.gather(picked, batch_size if compile else len(picked), pin=pin)
            found = scorer(batch.to(device), int(counts[i : i + batch_size].max()))
            scores[row : row + len(found)] = found
            row += len(found)
            bar.update(len(found))
    first = int(spans[0, 0])
    found = scores[start - first : stop - first].cpu()
    if bool(found.isnan().any()):
        row = start + int(found.isnan().nonzero()[0, 0])
        raise FloatingPointError(
            f"model {model_id(model)}: its logits at row {row} of {corpus.path} hold NaN, so there "
            "is nothing to score; are its weights damaged, or its dtype too narrow?"
        )
    return found


def _head_scorer(model, autocast: torch.dtype | None, compile: bool) -> _Scorer:
    """Only scored positions reach the head, and their logits are never all there at once."""
    trunk = torch.compile(model.base_model, dynamic=False) if compile else model.base_model
    head, device = lm_head(model), model.device.type
    dtype = head.weight.dtype if autocast is None else autocast
    weight = head.weight.detach().to(dtype)  # once, where autocast would do so in every batch
    bias = None if head.bias is None else head.bias.detach().to(dtype)

    def score(batch: Batch, _: int) -> Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            hidden = trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        rows = batch.select(hidden).to(dtype)
        return linear_token_logprobs(rows, weight, batch.labels, bias=bias)

    return score


def _model_scorer(model, autocast: torch.dtype | None, compile: bool) -> _Scorer:
    """The logits of the last positions as the model's own forward gives them."""
    forward = torch.compile(model, dynamic=False) if compile else model
    keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(batch: Batch, most: int) -> Tensor:
        size, length = batch.input_ids.shape
        options = {"logits_to_keep": most} if keeps_some else {}
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            logits = forward(input_ids=batch.input_ids, use_cache=False, **options).logits
        logits = logits[:, -most:].flatten(0, 1)
        labels = batch.labels.new_full((len(logits),), -100)
        at = batch.scored
        if at is None:
            at = torch.arange(size * length, device=labels.device)
        at = at // length * most + at % length - (length - most)
        labels[at] = batch.labels
        return token_logprobs(logits, labels)[at]

    return score


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
    _check_fits(model, corpus, block)
    if not head_is_last(model, corpus.token_ids):
        raise ValueError(
            f"model {model_id(model)} ({model.config.model_type}) changes its logits after the LM "
            "head, which a loss through the head alone would miss; use a family that does not"
        )


def _check_fits(model, corpus: Corpus, block: int) -> None:
    name = model_id(model)
    head = lm_head(model)
    if head.weight.shape[0] < corpus.vocab_size:
        raise ValueError(
            f"model {name}: its LM head has {head.weight.shape[0]} tokens, the corpus at "
            f"{corpus.path} has a vocabulary of {corpus.vocab_size}; use a model of that tokenizer"
        )
    check_context(model.config, name, corpus, block)


def check_context(config, name: str, corpus: Corpus, block: int) -> None:
    """Raise ValueError unless a model of this configuration can read windows of `block` tokens."""
    context, length = context_length(config), min(block, corpus.num_rows)
    if context is not None and length > context:
        raise ValueError(
            f"block: {block} tokens do not fit the context of model {name}, {context}; use a "
            "smaller block"
        )


def head_is_last(model, token_ids: np.ndarray | Tensor) -> bool:
    """Whether `lm_head(hidden states)` are the model's logits.

    Some families scale or cap them behind the head, which small logits hardly show: the first of
    `token_ids` are read, and what the head then answers is replaced by logits that would.
    """
    head = lm_head(model)
    probe = torch.from_numpy(np.array(token_ids[:8], dtype=np.int64))[None].to(model.device)
    heads: list[tuple[Tensor, Tensor, Tensor]] = []

    def answer(_module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        # Exact in every dtype; 0 shows an offset, large values show a factor or a limit.
        marks = (torch.arange(logits.numel(), device=logits.device) % 3 - 1) * 2.0**14
        heads.append((inputs[0], logits, marks.to(logits.dtype).view_as(logits)))
        return heads[-1][-1].clone()  # some families change them in place

    eager = torch.compiler.set_stance("force_eager")  # compiled code would not see the hook
    hooked = head.register_forward_hook(answer)
    with torch.inference_mode(), evaluating(model), unpadded(model), hooked, eager:
        found = model(input_ids=probe, use_cache=False).logits
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
    if len(heads) != 1:
        return False
    (states, logits, marks), hidden = heads[0], hidden.float()
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"model {model_id(model)}: gives logits that are not finite; has it diverged? Use "
            "another checkpoint"
        )
    same = states.shape == hidden.shape and found.shape == marks.shape
    tolerance = {"rtol": 1e-2, "atol": 1e-2 * float(hidden.abs().max())}
    return (
        same
        and torch.equal(found.float(), marks.float())
        and torch.allclose(states.float(), hidden, **tolerance)
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
        queries: (n, D) keys of the positions to score; labels: (n,) their next tokens. The search
            runs where the queries are; the result is on the CPU.
        exclude_ids: (n,) the datastore row of each query, left out; only for the corpus of the
            datastore itself.
    """
    device = queries.device
    values = torch.from_numpy(np.array(datastore.values)).to(device)
    labels = labels.to(device, torch.int32)
    out = torch.empty(len(labels), dtype=torch.float32)
    for i in tqdm(range(0, len(labels), batch_size), desc="kNN", unit="batch", disable=None):
        part = slice(i, i + batch_size)
        query = queries[part].float()
        distances, ids = index.search(query, num_neighbors)
        targets = knn_targets(
            torch.as_tensor(distances, device=device),
            torch.as_tensor(ids, device=device),
            values,
            temperature=knn_temperature,
            exclude_ids=None if exclude_ids is None else exclude_ids[part],
        )
        owner = targets.row_ids()
        hit = targets.token_ids == labels[part][owner]
        mass = torch.zeros(len(query), device=device)
        mass.index_add_(0, owner[hit], targets.probs[hit].float())
        out[part] = mass.log()
    return out
