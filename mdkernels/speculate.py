"""Speculative decoding of the mixture, drafted by one of its own memories.

A memory reads every token anyway, so it can as well read ahead: it draws G tokens on its own, the
base sees all of them in one pass, and `mix_verify` keeps those that the mixture could have drawn.
What is emitted is distributed as if drawn from the mixture token by token (ops/mix_verify/README).

Rows accept different numbers of tokens. What a row rejected stays in the cache as long as another
row's kept tokens lie behind it, masked out; positions are counted per row. One row leaves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .decode_loop import Decoded, DecodeStats, finish, machinery, start
from .decode_rows import Request, forward
from .draft_length import DraftLength


def speculate(request: Request) -> Decoded:
    """Decode with `request.draft_tokens` drafted tokens per pass of the base."""
    models = request.mixture.models
    drafting = 1 + draft_memory(request)
    others = [model for i, model in enumerate(models) if i != drafting]
    length = DraftLength(request.draft_tokens, models[drafting], others, len(request.input_ids))
    stats = DecodeStats()
    state = _Pass(request, drafting, length.next_most(request.max_new_tokens - 1))
    text = _Text(request, state.rows.next_ids.tolist())
    while not text.ended:
        left, active = text.left(), text.active()
        drafted = length.next(max(left) - 1)
        lengths = [min(drafted, max(n - 1, 0)) for n in left]
        tokens, counts = state.run(drafted, lengths)
        kept = max(counts[row] for row in active)
        if kept < drafted:
            request.cache.crop(kept - drafted)
        state.slots.keep(drafted + 1, [1 + count for count in counts], 1 + kept)
        text.append(tokens, counts)

        tested = sum(min(counts[row] + 1, lengths[row]) for row in active)
        agreed = sum(counts[row] for row in active)
        length.learn(tested, agreed)
        stats.base_passes += 1
        stats.drafted += sum(lengths[row] for row in active)
        stats.verified += len(active)
        stats.tested += tested
        stats.accepted += agreed
    text.write(state.rows.tokens)
    sequences, lengths = finish(request, state.rows.tokens)
    stats.new_tokens = int(lengths.sum())
    if len(sequences) > 1:
        return Decoded(sequences, None, stats)
    read_too_far = stats.verified + stats.accepted - (stats.new_tokens - 1)
    if read_too_far and request.keeps_cache:
        request.cache.crop(-read_too_far)
    return Decoded(sequences, request.cache, stats)


def draft_memory(request: Request) -> int:
    """The memory of the largest share, the first of equals."""
    weights = request.mix_weight
    shares = request.mixture.mix_weight if weights is None else weights.float().mean(0).tolist()
    return max(range(len(shares)), key=lambda i: shares[i])


class _Pass:
    """One draft and its verification, in tensors that are updated in place: each part can be a
    graph, one to draft a token and one per number of drafted tokens to verify."""

    def __init__(self, request: Request, drafting: int, most: int):
        self.request, self.drafting = request, drafting
        self.rows, self.slots, self.picker = start(request)
        self.together, self.as_graph = machinery(request)
        batch, device = len(request.input_ids), request.input_ids.device
        self.model = request.mixture.models[drafting]
        self.view = request.cache.views[drafting]
        # A row that has ended reads on, at places that every model has.
        self.last = int(self.rows.positions.max()) + request.max_new_tokens - 2
        self.steps = torch.arange(most + 1, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions, self.offsets = self.rows.positions.clone(), self.rows.offsets.clone()
        self.ids = self.rows.next_ids.clone()
        self.read_ids = self.ids.repeat(1, most + 1)
        """What was drawn last, then the draft."""
        shape = (batch, most + 1, self.picker.width)
        # Under autocast not that of the weights.
        self.logits = torch.empty(shape, dtype=self.picker.dtypes[drafting], device=device)
        self.tokens = torch.zeros((batch, most + 1), dtype=torch.int64, device=device)
        self.accepted = torch.zeros(batch, dtype=torch.int64, device=device)
        self.draft = self.as_graph(self._draft)
        self.verify: dict[int, Callable[[], None]] = {}

    def run(self, drafted: int, lengths: list[int]) -> tuple[list[list[int]], list[int]]:
        """(tokens, num_accepted) of `mix_verify`, with no more than lengths[row] accepted."""
        for _ in range(drafted):
            self.draft()
        if min(lengths) < drafted:  # a row then draws what it would draw alone
            self._verify(drafted, torch.tensor(lengths, device=self.ids.device))
        else:
            if drafted not in self.verify:
                self.verify[drafted] = self.as_graph(functools.partial(self._verify, drafted))
            self.verify[drafted]()
        return self.tokens[:, : drafted + 1].tolist(), self.accepted.tolist()

    def _draft(self) -> None:
        """Read one token with the memory, draw the next."""
        at = self.positions.clamp(max=self.last)
        logits = forward(self.model, self.ids, self.slots.extend(1), at, self.view)[:, 0]
        self.logits.index_copy_(1, self.place, logits[:, None, : self.picker.width])
        self.ids.copy_(self.picker.draft(logits, self.offsets)[:, None].clamp(min=0))
        for counter in (self.place, self.positions, self.offsets):
            counter += 1
        self.read_ids.index_copy_(1, self.place, self.ids)

    def _verify(self, drafted: int, lengths: Tensor | None = None) -> None:
        """Read the draft with the other models, its last token with the memory, and decide."""
        rows, ids = self.rows, self.read_ids[:, : drafted + 1]
        at = (rows.positions + self.steps[: drafted + 1]).clamp(max=self.last)
        mask = self.slots.extend(1)

        def read(i, model, view):
            places = slice(drafted, None) if i == self.drafting else slice(None)
            keep = 1 if i == self.drafting else drafted + 1
            return lambda: forward(model, ids[:, places], mask, at[:, places], view, keep)

        parts = zip(self.request.mixture.models, self.request.cache.views, strict=True)
        every = self.together([read(i, *part) for i, part in enumerate(parts)])
        self.logits[:, drafted] = every[self.drafting][:, 0, : self.picker.width]
        every[self.drafting] = self.logits[:, : drafted + 1]
        accepted, tokens = self.picker.verify(
            every,
            ids[:, 1:],
            offsets=rows.offsets,
            draft_memory=self.drafting - 1,
            draft_lengths=lengths,
        )
        self.accepted.copy_(accepted)
        self.tokens[:, : drafted + 1] = tokens
        rows.next_ids.copy_(tokens.gather(1, accepted[:, None]).clamp(min=0))
        rows.positions += 1 + accepted[:, None]
        rows.offsets += 1 + accepted
        self._rewind()

    def _rewind(self) -> None:
        """The next draft begins behind what was drawn last."""
        self.ids.copy_(self.rows.next_ids)
        self.read_ids[:, :1] = self.rows.next_ids
        self.positions.copy_(self.rows.positions)
        self.offsets.copy_(self.rows.offsets)
        self.place.zero_()


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
