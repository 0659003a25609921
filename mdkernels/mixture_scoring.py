"""What a mixture makes of a continuation: its log-likelihood, and whether it is the greedy one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .mix_weight import mixture_logprobs
from .mixture import MemoryMixture
from .models import lm_head, model_id
from .ops.mix_argmax import mix_argmax
from .ops.token_logprobs import token_logprobs
from .scoring import head_is_last, unpadded

# One chunk of logits; larger ones fall out of the last-level cache of a CPU.
_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


class ContinuationScore(NamedTuple):
    logprob: float
    """log p(continuation | context), nats."""
    is_greedy: bool
    """Whether every token is the most probable one where it stands."""


class MixtureScorer:
    """Scores continuations by a mixture; nothing of shape (B, T, V) is written.

    Only scored positions reach the LM heads, and of their logits, chunk by chunk, two numbers per
    position are kept: the gold log-probability and the most probable token.

    The weights and the temperature are those that the mixture has at each call. Raises ValueError
    if a model's logits are not the output of its LM head alone.
    """

    def __init__(self, mixture: MemoryMixture):
        if not isinstance(mixture, MemoryMixture):
            raise TypeError(f"mixture: expected a MemoryMixture, got {type(mixture).__name__}")
        self.mixture, self.models = mixture, mixture.models
        self.context = mixture.config.max_position_embeddings
        # Ids that only some of the models have are padding rows, see MemoryMixture.
        vocab = min(lm_head(model).weight.shape[0] for model in self.models)
        self.heads = [_Head(lm_head(model), vocab) for model in self.models]
        self.chunk = min(head.chunk for head in self.heads)
        self.checked: set[int] = set()
        self._parts()

    def _parts(self) -> list[_Part]:
        """The models of positive weight, as the mixture stands. The others are not run."""
        weights = self.mixture.mix_weight
        parts = []
        for i, weight in enumerate([max(0.0, 1.0 - math.fsum(weights)), *weights]):
            if weight > 0.0:
                temperature = 1.0 if i == 0 else self.mixture.memory_temperature
                parts.append(_Part(self.models[i], self.heads[i], weight, temperature))
                self._check_head(i)
        return parts

    def _check_head(self, i: int) -> None:
        model = self.models[i]
        if i not in self.checked and not head_is_last(model, torch.arange(8)):
            raise ValueError(
                f"model {model_id(model)} ({model.config.model_type}) changes its logits after "
                "the LM head, which scoring through the head alone would miss; use a family "
                "that does not"
            )
        self.checked.add(i)

    @torch.inference_mode()
    def scores(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: bool = True,
    ) -> list[ContinuationScore]:
        """One score per (context, continuation), both non-empty lists of token ids.

        Equivalent, with ids = context + continuation of length n = len(continuation), to::

            logprobs = mixture(ids[None, :-1], output_logprobs=True).logprobs[0, -n:]
            logprobs.gather(1, continuation[:, None]).sum(), all(logprobs.argmax(1) == continuation)

        Args:
            batch_size: sequences per forward pass. Requests that read the same tokens, such as
                several one-token answers to one question, share a sequence.
            max_length: tokens a sequence may have; longer ones lose their beginning. None: the
                context of the mixture.

        Raises ValueError for an empty context or continuation, and for a continuation that is
        longer than `max_length`.
        """
        max_length, parts = self._check_length(max_length), self._parts()
        readers: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(requests):
            _check_request(i, context, continuation, max_length)
            ids = (*context, *continuation)[:-1]
            readers.setdefault(ids if max_length is None else ids[-max_length:], []).append(i)
        # Longest first: the batches pad little, and what does not fit into memory shows at once.
        sequences = sorted(readers, key=len, reverse=True)
        found: list[ContinuationScore | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="score", disable=None if progress else True) as bar:
            for start in range(0, len(sequences), batch_size):
                batch = sequences[start : start + batch_size]
                owners = [(row, i) for row, ids in enumerate(batch) for i in readers[ids]]
                continuations = [requests[i][1] for _, i in owners]
                rows = [row for row, _ in owners]
                scores = self._batch(parts, batch, rows, continuations)
                for (_, i), score in zip(owners, scores, strict=True):
                    found[i] = score
                bar.update(len(owners))
        return found

    def _check_length(self, max_length: int | None) -> int | None:
        if max_length is None:
            return self.context
        if max_length < 1 or (self.context is not None and max_length > self.context):
            raise ValueError(
                f"max_length: expected 1 to {self.context}, the shortest context of base and "
                f"memories, got {max_length}"
            )
        return max_length

    def _batch(
        self,
        parts: list[_Part],
        sequences: list[tuple[int, ...]],
        rows: list[int],
        continuations: list[Sequence[int]],
    ) -> list[ContinuationScore]:
        """Score continuation k at the end of sequences[rows[k]], whose last token is not in it."""
        device = self.models[0].device
        width = max(map(len, sequences))
        # Padded on the right, where causal attention hides it.
        input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences])
        counts = [len(continuation) for continuation in continuations]
        places = [
            row * width + len(sequences[row]) - count + k
            for row, count in zip(rows, counts, strict=True)
            for k in range(count)
        ]
        labels = torch.tensor([i for continuation in continuations for i in continuation])
        places, labels = torch.tensor(places).to(device), labels.to(device)
        hidden = []
        for part in parts:
            with unpadded(part.model):
                states = part.model.base_model(input_ids=input_ids.to(device), use_cache=False)
            hidden.append(states.last_hidden_state.flatten(0, 1)[places])
        logprobs, greedy = [], []
        for start in range(0, len(labels), self.chunk):
            chunk = slice(start, start + self.chunk)
            gold, best = _chunk(parts, [states[chunk] for states in hidden], labels[chunk])
            logprobs.append(gold)
            greedy.append(best == labels[chunk])
        sums = [float(one.sum()) for one in torch.cat(logprobs).cpu().split(counts)]
        matches = [bool(one.all()) for one in torch.cat(greedy).cpu().split(counts)]
        return [ContinuationScore(*pair) for pair in zip(sums, matches, strict=True)]


def _chunk(parts: list[_Part], hidden: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 log p(label) and the most probable token of each row."""
    logits = []
    for part, states in zip(parts, hidden, strict=True):
        own = part.head.logits(states)
        if part.temperature != 1.0:  # in 16 bits the quotient would be rounded
            own = own.to(torch.promote_types(own.dtype, torch.float32)) / part.temperature
        logits.append(own)
    first, *rest = [token_logprobs(one, labels) for one in logits]
    weights = [part.weight for part in parts[1:]]
    gold = mixture_logprobs(first, rest, weights)
    if not rest:
        return gold, logits[0].argmax(1)
    return gold, mix_argmax(logits[0], logits[1:], weights)


class _Head:
    """Logits of the first `vocab` ids, a chunk of hidden states at a time, in one reused buffer."""

    def __init__(self, head: torch.nn.Linear, vocab: int):
        self.head, self.vocab = head, vocab
        bytes_per_row = vocab * head.weight.element_size()
        self.chunk = max(16, _LOGITS_BYTES.get(head.weight.device.type, 512 << 20) // bytes_per_row)
        self.buffer: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Of at most `chunk` hidden states, (rows, vocab); overwritten by the next call."""
        weight, bias = self.head.weight.detach()[: self.vocab], self.head.bias
        hidden, buffer = hidden.to(weight.dtype), self.buffer
        fits = buffer is not None and len(buffer) >= len(hidden)
        if not fits or buffer.dtype != hidden.dtype or buffer.device != hidden.device:
            self.buffer = hidden.new_empty(len(hidden), self.vocab)
        logits = self.buffer[: len(hidden)]
        if bias is None:
            return torch.mm(hidden, weight.T, out=logits)
        return torch.addmm(bias.detach()[: self.vocab], hidden, weight.T, out=logits)


class _Part(NamedTuple):
    model: PreTrainedModel
    head: _Head
    weight: float
    temperature: float


def _check_request(i: int, context: Sequence[int], continuation: Sequence[int], longest) -> None:
    for name, ids in (("context", context), ("continuation", continuation)):
        if len(ids) == 0:
            raise ValueError(
                f"requests: the {name} of request {i} is empty; give one token or more"
            )
    if longest is not None and len(continuation) > longest:
        raise ValueError(
            f"requests: the continuation of request {i} has {len(continuation)} tokens, at most "
            f"{longest} can be scored at once"
        )
