"""The decoding loop, one token of every row per step. The step is eager, or a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode_rows import Picker, Request, Rows, Slots, forward, passes
from .mixture_cache import MixtureCache

_RUN_AHEAD = ("cuda",)  # devices that the host does not wait for


@dataclass
class DecodeStats:
    """What decoding cost, without the prompt."""

    new_tokens: int = 0
    """Of all rows, up to their end."""
    base_passes: int = 0
    """Of the whole batch."""
    drafted: int = 0
    """Tokens that a memory drafted, in rows that had not ended."""
    tested: int = 0
    """Of those, the ones up to and including the first that was rejected."""
    accepted: int = 0
    verified: int = 0
    """Passes times rows that had not ended."""

    @property
    def acceptance(self) -> float:
        """Share of the tested tokens that stayed; nan if none was drafted."""
        return self.accepted / self.tested if self.tested else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per base pass and row, before an end cuts them off."""
        return (self.accepted + self.verified) / self.verified if self.verified else float("nan")


@dataclass
class Decoded:
    sequences: Tensor
    """(B, T + n) int64."""
    cache: MixtureCache | None
    """Of all tokens but the last; None where rows of different lengths share it."""
    stats: DecodeStats


@torch.no_grad()
def run(request: Request) -> Decoded:
    """Decode. Everything was checked."""
    # inference_mode(False) would turn gradients on.
    mode = contextlib.nullcontext() if request.updates_cache else torch.inference_mode()
    with mode, _current(request.input_ids.device):
        if request.draft_tokens:
            from .speculate import speculate

            decoded = speculate(request)
        else:
            decoded = _plain(request)
    decoded.sequences = decoded.sequences.clone()
    if decoded.cache is not None and request.keeps_cache:
        _leave_inference_mode(decoded.cache)
    return decoded


def _current(device: torch.device):
    """Makes a GPU the current one: streams, events and captures are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _leave_inference_mode(cache: MixtureCache) -> None:
    """Tensors made in inference mode could not be updated outside of it."""
    for layer in cache.layers:
        states = [one for one in vars(layer).values() if isinstance(one, dict)]
        for values in (vars(layer), *states):
            for name, value in list(values.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    values[name] = value.clone()


def _plain(request: Request) -> Decoded:
    rows, slots, picker = start(request)
    together, as_graph = machinery(request)
    step = as_graph(_step(request, rows, slots, picker, together))
    watch = _watch(request, rows)
    stats = DecodeStats()
    first = request.input_ids.shape[1]
    for done in range(1, request.max_new_tokens):
        if watch(rows.tokens[:, first + done - 1]):
            break
        step()
        stats.base_passes += 1
    else:
        watch(rows.tokens[:, -1])
    watch.close()
    request.cache.count(stats.base_passes)
    sequences, lengths = finish(request, rows.tokens)
    read_too_far = stats.base_passes - (sequences.shape[1] - first - 1)
    if read_too_far and request.keeps_cache:
        request.cache.crop(-read_too_far)
    stats.new_tokens = int(lengths.sum())
    stats.verified = stats.base_passes * len(lengths)
    return Decoded(sequences, request.cache, stats)


def start(request: Request) -> tuple[Rows, Slots, Picker]:
    """Read the prompt and pick the first token. No logits but the last position's are computed."""
    past = int(request.cache.get_seq_length())
    fresh = request.input_ids[:, request.input_ids.shape[1] - request.fresh :]
    held = past + request.fresh
    slots = Slots(request, held + request.max_new_tokens)
    if request.mask is None:
        positions = torch.arange(past, held, device=fresh.device)[None]
    else:
        # Counted from each row's first token, or a padded row would be rotated differently.
        positions = (request.mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    pieces = passes(request)
    for ids, at in zip(fresh.split(pieces, 1), positions.split(pieces, 1), strict=True):
        mask = slots.extend(ids.shape[1])
        logits = [
            forward(model, ids, mask, at, view)[:, -1]
            for model, view in zip(request.mixture.models, request.cache.views, strict=True)
        ]
    request.cache.count(request.fresh)
    rows = Rows(request, positions)
    picker = Picker(request, logits)
    rows.append(picker.pick(logits, rows.offsets))
    return rows, slots, picker


def machinery(request: Request):
    """(together, as_graph): what runs functions side by side and returns their results, and what
    makes a function without arguments fast to call again."""
    fixed = request.cache.is_static and not any(request.cache.is_sliding)
    if request.input_ids.device.type != "cuda" or not fixed:
        return lambda calls: [call() for call in calls], lambda function: function
    from .cuda_graph import Captured, Streams

    together = Streams(len(request.mixture.models), request.input_ids.device)
    if not request.cuda_graph:
        return together, lambda function: function
    return together, functools.partial(Captured, pool=torch.cuda.graph_pool_handle())


def _step(request, rows: Rows, slots: Slots, picker: Picker, together) -> Callable[[], None]:
    """A function that reads `rows.next_ids` with every model and appends the next tokens."""
    parts = list(zip(request.mixture.models, request.cache.views, strict=True))

    def step() -> None:
        mask = slots.extend(1)

        def read(model, view):
            return lambda: forward(model, rows.next_ids, mask, rows.positions, view)[:, -1]

        rows.append(picker.pick(together([read(*part) for part in parts]), rows.offsets))

    return step


class Watch:
    """Shows the newest tokens to whoever streams, and tells if all rows have ended."""

    def __init__(self, ended: Tensor, eos: Tensor | None, emit):
        self.ended, self.emit = ended, emit
        self.can_end = eos is not None

    def __call__(self, newest: Tensor) -> bool:
        """`newest`: (B,). Whether to stop."""
        if self.emit is not None:
            self.emit(newest)
        return self.can_end and bool(self.ended.all())

    def close(self) -> None:
        """Nothing is left to show."""


def _watch(request: Request, rows: Rows):
    # What was read too far cannot be taken out of a state, nor put back into a window.
    cache = request.cache
    stays = request.keeps_cache and (any(cache.is_stateful) or any(cache.is_sliding))
    if stays or rows.ended.device.type not in _RUN_AHEAD:
        return Watch(rows.ended, rows.eos, request.emit)
    from .cuda_graph import LateWatch

    return LateWatch(rows.ended, rows.eos, request.emit)


def finish(request: Request, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(sequences, (B,) new tokens of each row): cut where the last row ended."""
    first = request.input_ids.shape[1]
    new = tokens[:, first:]
    if bool((new < 0).any()):
        raise ValueError(
            "base, memory: their logits hold NaN, +inf or nothing but -inf somewhere, so there is "
            "no distribution to draw from"
        )
    lengths = torch.full((len(new),), request.max_new_tokens, device=new.device)
    if request.eos:
        ends = torch.isin(new, torch.tensor(request.eos, device=new.device))
        lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, lengths)
    return tokens[:, : first + int(lengths.max())], lengths
