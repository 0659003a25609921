"""The parts of a decoding loop: what was asked, where each row is, and how a token is picked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .mixture import MemoryMixture
from .mixture_cache import CACHE, MixtureCache, readable, restarts
from .ops.mix_argmax import mix_argmax
from .ops.mix_sample import mix_sample
from .ops.mix_verify import MixVerifyOutput, mix_verify


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the mixture; see `mix_sample`."""

    seeds: Tensor
    """(B,) int64, the random stream of each row."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def filters(self) -> dict:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
        }


@dataclass
class Request:
    """One batch to decode, checked. A cache that holds tokens already is continued."""

    mixture: MemoryMixture
    input_ids: Tensor
    """(B, T) int64."""
    fresh: int
    """How many of the last of these the cache does not hold."""
    mask: Tensor | None
    """(B, tokens in the cache + fresh) int64, 0 on padding; None: no padding."""
    cache: MixtureCache
    max_new_tokens: int
    sampling: Sampling | None
    """None: greedy."""
    mix_weight: Tensor | None = None
    """(B, memories); None: the mixture's own."""
    eos: tuple[int, ...] = ()
    pad: int = 0
    prefill_chunk_size: int | None = None
    draft_tokens: int | Literal["auto"] = 0
    emit: Callable[[Tensor], None] | None = None
    """Called with each (B,) of new tokens, in order."""
    cuda_graph: bool = True
    """On a GPU with a static cache: replay a step as one graph."""
    keeps_cache: bool = True
    """Whether anyone looks at the cache afterwards."""
    updates_cache: bool = False
    """Whether the cache came from the caller, so that its tensors are not made here."""


def passes(request: Request) -> list[int]:
    """How many tokens each pass over the new part of the prompt reads."""
    fresh = request.fresh
    size = request.prefill_chunk_size or fresh
    found = [min(size, fresh - start) for start in range(0, fresh, size)]
    if any(map(restarts, request.mixture.models)):
        first = [] if int(request.cache.get_seq_length()) else found[:1]
        found = first + [1] * (fresh - sum(first))
    return found


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache,
    keep: int = 1,
) -> Tensor:
    """(B, keep, V) logits behind the last `keep` tokens; `cache` grows by `input_ids`."""
    output = model(
        input_ids=input_ids,
        attention_mask=readable(mask, cache, input_ids.shape[1]),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=keep,
        **{CACHE: cache},
    )
    return output.logits


class Picker:
    """Turns the logits of all models, base first, into tokens.

    Args:
        logits: (B, V) of each model behind the prompt. `width` is that of their common vocabulary:
            ids that only some models have are padding rows, and no input for the others.
    """

    def __init__(self, request: Request, logits: list[Tensor]):
        self.width = min(one.shape[1] for one in logits)
        self.dtypes = [one.dtype for one in logits]
        self.memory_temperature = request.mixture.memory_temperature
        self.sampling = request.sampling
        if not request.mixture.memories:
            self.weights: Tensor | list[float] = [0.0]
        elif request.mix_weight is None:
            self.weights = list(request.mixture.mix_weight)
        else:
            self.weights = request.mix_weight

    def pick(self, logits: list[Tensor], offsets: Tensor) -> Tensor:
        """(B,) tokens from (B, V) logits per model."""
        base, memories = self._common(logits)
        mix = {"memory_temperature": self.memory_temperature}
        if self.sampling is None:
            return mix_argmax(base, memories, self.weights, **mix)
        draw = {"seeds": self.sampling.seeds, "offsets": offsets, **self.sampling.filters}
        return mix_sample(base, memories, self.weights, **draw, **mix)

    def draft(self, logits: Tensor, offsets: Tensor) -> Tensor:
        """(B,) tokens from one memory alone, drawn as `verify` supposes."""
        logits = logits[:, : self.width]
        if self.sampling is None:
            return mix_argmax(logits, logits, 0.0)
        temperature = self.memory_temperature * self.sampling.temperature
        draw = {"seeds": self.sampling.seeds, "offsets": offsets, "temperature": temperature}
        return mix_sample(logits, logits, 0.0, **draw)

    def verify(self, logits: list[Tensor], draft_ids: Tensor, **options: Any) -> MixVerifyOutput:
        """From (B, G + 1, V) logits per model; `options` as of `mix_verify`."""
        base, memories = self._common(logits)
        options["memory_temperature"] = self.memory_temperature
        if self.sampling is None:
            options |= {"temperature": 0.0, "seeds": 0}
        else:
            options |= {"seeds": self.sampling.seeds, **self.sampling.filters}
        return mix_verify(base, memories, self.weights, draft_ids, **options)

    def _common(self, logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        base, *memories = [one[..., : self.width] for one in logits]
        return base, memories or [base]


class Slots:
    """Which places of the cache each row may read, kept without growing a tensor at every step.

    A static cache wants one mask of its own length: causality hides what is not written yet.
    """

    def __init__(self, request: Request, room: int):
        past = int(request.cache.get_seq_length())
        self.static = request.cache.is_static
        self.length = past
        self.device = request.input_ids.device
        self.table: Tensor | None = None
        if request.mask is not None:
            room = max(request.cache.get_max_length(), room) if self.static else room
            given = request.mask.long()
            self.table = torch.nn.functional.pad(given, (0, room - given.shape[1]), value=1)

    def extend(self, count: int) -> Tensor | None:
        """The mask of a forward over `count` more tokens."""
        self.length += count
        if self.table is not None and not self.static and self.length > self.table.shape[1]:
            self.table = torch.nn.functional.pad(self.table, (0, self.length), value=1)
        return self.mask

    def keep(self, fed: int, counts: list[int], kept: int) -> None:
        """Of the `fed` newest places keep `kept`, and of those the first counts[row] of each row.
        Places behind `length` are never masked, as what comes there can be read."""
        begin = self.length - fed
        self.length = begin + kept
        if all(count == kept for count in counts) or len(counts) == 1:
            return
        if self.table is None:
            self.table = torch.ones((len(counts), self.length), dtype=torch.int64)
            self.table = self.table.to(self.device)
        valid = torch.arange(kept) < torch.tensor(counts)[:, None]
        self.table[:, begin : self.length] = valid.to(self.device)

    @property
    def mask(self) -> Tensor | None:
        return self.table if self.table is None or self.static else self.table[:, : self.length]


class Rows:
    """Where each row is, in tensors that a step updates in place, so that a step can be a graph."""

    def __init__(self, request: Request, positions: Tensor):
        batch, given = request.input_ids.shape
        like = {"dtype": torch.int64, "device": request.input_ids.device}
        self.tokens = torch.full((batch, given + request.max_new_tokens), request.pad, **like)
        self.tokens[:, :given] = request.input_ids
        self.place = torch.full((1,), given, **like)
        """Column of the next token."""
        self.next_ids = torch.zeros((batch, 1), **like)
        """Drawn last, not read yet."""
        self.positions = positions[:, -1:].expand(batch, 1).contiguous()
        """Of what was read last."""
        self.offsets = torch.zeros(batch, **like)
        """Tokens drawn so far: the place in the random stream."""
        self.ended = torch.zeros(batch, dtype=torch.bool, device=request.input_ids.device)
        self.eos = torch.tensor(request.eos, **like) if request.eos else None
        self.pad = request.pad

    def append(self, picked: Tensor) -> None:
        """Write one more token of each row; rows that have ended get padding."""
        if self.eos is not None:
            picked = torch.where(self.ended, self.pad, picked)
            self.ended |= (picked[:, None] == self.eos).any(1)
        self.tokens.index_copy_(1, self.place, picked[:, None])
        # A GPU marks logits that are no distribution with -1, which no model can read.
        self.next_ids.copy_(picked[:, None].clamp(min=0))
        self.place += 1
        self.positions += 1
        self.offsets += 1
