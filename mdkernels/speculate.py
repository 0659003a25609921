"""Speculative decoding of the mixture, drafted by one of its own memories.

A memory reads every token anyway, so it can as well read ahead: it draws G tokens on its own, the
base sees all of them in one pass, and `mix_verify` keeps those that the mixture could have drawn.
What is emitted is distributed as if drawn from the mixture token by token (ops/mix_verify/README).

Rows accept different numbers of tokens. What a row rejected stays in the cache as long as another
row's kept tokens lie behind it, masked out; positions are counted per row. One row leaves nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decode_loop import Decoded, DecodeStats, finish, start
from .decode_rows import Request, forward
from .draft_length import DraftLength


def speculate(request: Request) -> Decoded:
    """Decode with `request.draft_tokens` drafted tokens per pass of the base."""
    models = request.mixture.models
    drafting = 1 + draft_memory(request)
    others = [model for i, model in enumerate(models) if i != drafting]
    length = DraftLength(request.draft_tokens, models[drafting], others, len(request.input_ids))
    stats = DecodeStats()
    draft_and_verify, slots, rows = _prepare(request, drafting)
    text = _Text(request, rows.next_ids.tolist())
    while not text.ended:
        left = text.left()
        drafted = length.next(max(left) - 1)
        accepted, tokens = draft_and_verify(drafted, [min(drafted, max(n - 1, 0)) for n in left])
        counts, active = accepted.tolist(), text.active()
        kept = max(counts[row] for row in active)
        request.cache.crop(kept - drafted)
        slots.keep(drafted + 1, [1 + count for count in counts], 1 + kept)
        text.append(tokens.tolist(), counts)

        tested = sum(min(counts[row] + 1, drafted, left[row] - 1) for row in active)
        agreed = sum(counts[row] for row in active)
        length.learn(tested, agreed)
        stats.base_passes += 1
        stats.drafted += sum(min(drafted, left[row] - 1) for row in active)
        stats.verified += len(active)
        stats.tested += tested
        stats.accepted += agreed
    text.write(rows.tokens)
    sequences, lengths = finish(request, rows.tokens)
    stats.new_tokens = int(lengths.sum())
    if len(sequences) > 1:
        return Decoded(sequences, None, stats)
    request.cache.crop(min(0, stats.new_tokens - 1 - stats.verified - stats.accepted))
    return Decoded(sequences, request.cache, stats)


def draft_memory(request: Request) -> int:
    """The memory of the largest share, the first of equals."""
    weights = request.mix_weight
    shares = request.mixture.mix_weight if weights is None else weights.float().mean(0).tolist()
    return max(range(len(shares)), key=lambda i: shares[i])


def _prepare(request: Request, drafting: int):
    """Reads the prompt. Returns (draft_and_verify, slots, rows); the first runs one pass."""
    rows, slots, picker = start(request)
    views, models = request.cache.views, request.mixture.models
    # A row that has ended reads on, at places that every model has.
    last = int(rows.positions.max()) + request.max_new_tokens - 2

    def draft_and_verify(drafted: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """(num_accepted, tokens) of `mix_verify`, with no more than lengths[row] accepted."""
        options: dict[str, Any] = {"draft_memory": drafting - 1}
        steps = torch.arange(drafted + 1, device=rows.positions.device)
        positions = (rows.positions + steps).clamp(max=last)
        fed, logits = [rows.next_ids], []
        for i in range(drafted + 1):
            at = positions[:, i : i + 1]
            mask = slots.extend(1)
            logits.append(forward(models[drafting], fed[i], mask, at, views[drafting])[:, 0])
            if i < drafted:
                fed.append(picker.draft(logits[i], rows.offsets + i)[:, None])
        inputs = torch.cat(fed, 1)
        every = [
            torch.stack(logits, 1)
            if i == drafting
            else forward(model, inputs, slots.mask, positions, view, drafted + 1)
            for i, (model, view) in enumerate(zip(models, views, strict=True))
        ]
        if min(lengths) < drafted:  # a row then draws what it would draw alone
            options["draft_lengths"] = torch.tensor(lengths, device=inputs.device)
        accepted, tokens = picker.verify(every, inputs[:, 1:], offsets=rows.offsets, **options)
        rows.next_ids.copy_(tokens.gather(1, accepted[:, None]).clamp(min=0))
        rows.positions += 1 + accepted[:, None]
        rows.offsets += 1 + accepted
        return accepted, tokens

    return draft_and_verify, slots, rows


class _Text:
    """The new tokens of each row on the host, cut at their end."""

    def __init__(self, request: Request, first: list[list[int]]):
        self.request = request
        self.rows: list[list[int]] = [[] for _ in first]
        self.done = [False] * len(first)
        self.shown = 0
        self.append(first, [0] * len(first))

    def append(self, tokens: list[list[int]], counts: list[int]) -> None:
        """Of each row of `tokens` the first counts[row] and the one that follows."""
        for row in self.active():
            for token in tokens[row][: counts[row] + 1]:
                self.rows[row].append(token)
                full = len(self.rows[row]) == self.request.max_new_tokens
                if full or token in self.request.eos:
                    self.done[row] = True
                    break
        self._emit()

    def active(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, done in enumerate(self.done) if not done]

    @property
    def ended(self) -> bool:
        return all(self.done)

    def left(self) -> list[int]:
        """Tokens that each row may still get; 0 for one that has ended."""
        most = self.request.max_new_tokens
        return [
            0 if done else most - len(new) for new, done in zip(self.rows, self.done, strict=True)
        ]

    def _emit(self) -> None:
        if self.request.emit is None:
            return
        behind = self.active()
        ready = min(len(self.rows[i]) for i in behind) if behind else max(map(len, self.rows))
        for place in range(self.shown, ready):
            column = [new[place] if place < len(new) else self.request.pad for new in self.rows]
            self.request.emit(torch.tensor(column))
        self.shown = max(self.shown, ready)

    def write(self, tokens: Tensor) -> None:
        """Into (B, T + max_new_tokens); what is behind the end of a row stays padding."""
        first = tokens.shape[1] - self.request.max_new_tokens
        pad = self.request.pad
        width = self.request.max_new_tokens
        padded = [new + [pad] * (width - len(new)) for new in self.rows]
        tokens[:, first:] = torch.tensor(padded, device=tokens.device)
