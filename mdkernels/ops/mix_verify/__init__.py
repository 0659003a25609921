"""Accepts or replaces tokens that a memory drafted, so that the mixture is what is drawn from.
Derivation: README.md."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, dispatch
from ..logit_mix.arguments import SCHEMA, TEMPERATURE_RANGE, canonical, unrecorded
from ..mix_sample.arguments import sampling, streams


class MixVerifyOutput(NamedTuple):
    """What a step of speculative decoding emits."""

    num_accepted: Tensor  # (B,) int64, drafted tokens that stay
    tokens: Tensor  # (B, G + 1) int64: those, the token that follows them, then -1


_forward = dispatch.define(
    "mix_verify",
    "forward",
    f"({SCHEMA}, Tensor draft_ids, Tensor draft_lengths, int draft_memory, "
    "float draft_temperature, float temperature, int top_k, float top_p, float min_p, "
    "Tensor seeds, Tensor offsets, str backend) -> (Tensor, Tensor)",
    lambda *args: (
        torch.empty_like(args[6]),
        args[5].new_empty((args[5].shape[0], args[5].shape[1] + 1)),
    ),
)


def mix_verify(
    base_logits: Tensor,
    memory_logits: Tensor | Sequence[Tensor],
    mix_weight: float | Tensor | Sequence[float | Tensor],
    draft_ids: Tensor,
    *,
    seeds: int | Tensor,
    offsets: int | Tensor | None = None,
    draft_lengths: Tensor | None = None,
    draft_memory: int = 0,
    memory_temperature: float = 1.0,
    draft_temperature: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str = "auto",
) -> MixVerifyOutput:
    """One step of speculative decoding of the mixture, with a memory as the draft model.

    With v the distribution that `mix_sample` draws from (mixture, temperature, filters) and q' that
    of the draft, ``softmax(memory_logits[draft_memory] / draft_temperature)``, in plain torch for
    one request whose tokens x were drawn from q'::

        n = 0
        while n < length and torch.rand(()) < v[n, x[n]] / q[n, x[n]]:
            n += 1
        rest = (v[n] - q[n]).clamp(min=0) if n < length else v[n]
        tokens = [*x[:n], torch.multinomial(rest, 1)]

    The emitted tokens are then distributed as if each had been drawn from v (Leviathan et al. 2023,
    Chen et al. 2023), whatever q' is, as long as the draft was drawn from it. At temperature 1
    without filters, 1 - (1 - w) TV(p, q) >= w of the tokens are accepted. With temperature 0,
    tokens stay as long as each is the mixture's most probable one, which follows them.

    The random numbers are a function of (seed, offset + place) of a request: it gets the same
    tokens at any batch slot. They are other ones than those `mix_sample` drew the draft with; a
    request without draft gets the token of `mix_sample` with the same seed and offset.

    Args:
        base_logits: (B, G + 1, V_base), after the context and after each drafted token.
        memory_logits: (B, G + 1, V_memory) at the same places, or a list. The last place is looked
            at only where the memory has a weight. Like the base's, copied unless B and G + 1 can
            be flattened.
        mix_weight, memory_temperature: as `logit_mix`; weights per row are those of a request,
            (B,) or (B, memories).
        draft_ids: (B, G) int64. Behind the length of a row they may be anything. A token of draft
            probability 0 is accepted unless the mixture gives it 0 as well.
        seeds, offsets: as `mix_sample`; the offset is that of the first drafted token.
        draft_lengths: (B,) int64 in [0, G], how many tokens of each row were drafted. None: all.
        draft_memory: which memory drafted.
        draft_temperature: what its logits were divided by. None is memory_temperature *
            temperature, as ``mix_sample(m, m, 0.0, temperature=...)`` drafts at memory temperature
            1. Not used if temperature is 0.
        temperature, top_k, top_p, min_p: as `mix_sample`.
        backend: see `mdkernels.backends`.

    Returns:
        MixVerifyOutput. Not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value outside the above; on the CPU, ids
            outside the mixture's vocabulary, lengths outside [0, G], and a place that is reached
            without a distribution there. Elsewhere such an id is rejected, the length is clipped,
            and the row ends with -1 there.
        BackendUnavailable: the named backend cannot run here.
    """
    batch, places, memories = _places(base_logits, memory_logits)
    first = [memory[:, 0] for memory in memories]
    base, _, row_weights, weights, memory_temperature = canonical(
        base_logits[:, 0],
        first[0] if isinstance(memory_logits, Tensor) else first,
        mix_weight,
        memory_temperature,
    )
    filters = sampling(temperature, top_k, top_p, min_p)
    checks.integer("draft_memory", draft_memory)
    if not 0 <= draft_memory < len(memories):
        raise ValueError(f"draft_memory: expected 0 to {len(memories) - 1}, got {draft_memory}")
    if draft_temperature is None:
        draft_temperature = memory_temperature * (filters[0] or 1.0)
    draft_temperature = checks.number("draft_temperature", draft_temperature)
    low, high = TEMPERATURE_RANGE
    if not low <= draft_temperature <= high:
        raise ValueError(
            f"draft_temperature: expected a number in [{low:g}, {high:g}], got {draft_temperature}"
        )
    _draft_ids(draft_ids, batch, places, base.device)
    if draft_lengths is None:
        draft_lengths = draft_ids.new_full((batch,), places - 1)
    else:
        checks.integer_vector("draft_lengths", draft_lengths, batch, base.device, of="base_logits")
    seeds, offsets = streams(seeds, offsets, batch, base.device, filters[0] > 0.0)
    if row_weights is not None:
        row_weights = row_weights.repeat_interleave(places, 0)
    with unrecorded((base_logits, memories, row_weights)):
        return MixVerifyOutput(
            *_forward(
                base_logits.flatten(0, 1).to(base.dtype),
                [memory.flatten(0, 1) for memory in memories],
                row_weights,
                weights,
                memory_temperature,
                draft_ids,
                draft_lengths,
                draft_memory,
                draft_temperature,
                *filters,
                seeds,
                offsets,
                backend,
            )
        )


def _places(base_logits, memory_logits) -> tuple[int, int, list[Tensor]]:
    """(B, G + 1, memories), the tensors' ranks and common sizes checked."""
    several = isinstance(memory_logits, (list, tuple))
    memories = list(memory_logits) if several else [memory_logits]
    if not memories:
        raise TypeError("memory_logits: expected a tensor or a non-empty list, got an empty one")
    names = [f"memory_logits[{k}]" if several else "memory_logits" for k in range(len(memories))]
    for name, x in zip(["base_logits", *names], [base_logits, *memories], strict=True):
        checks.plain_tensor(name, x)
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(
                f"{name}: expected shape (batch, drafted + 1, vocab), got {tuple(x.shape)}"
            )
        if x.shape[:2] != base_logits.shape[:2]:
            raise ValueError(
                f"{name}: (batch, drafted + 1) is {tuple(x.shape[:2])}, that of base_logits "
                f"{tuple(base_logits.shape[:2])}"
            )
    return base_logits.shape[0], base_logits.shape[1], memories


def _draft_ids(draft_ids, batch: int, places: int, device) -> None:
    checks.plain_tensor("draft_ids", draft_ids)
    if draft_ids.dtype != torch.int64:
        raise TypeError(f"draft_ids: expected int64, got {draft_ids.dtype}; convert with .long()")
    if tuple(draft_ids.shape) != (batch, places - 1):
        raise ValueError(
            f"draft_ids: expected shape {(batch, places - 1)}, one less per row than base_logits "
            f"has places, got {tuple(draft_ids.shape)}"
        )
    if draft_ids.device != device:
        raise ValueError(
            f"draft_ids: expected device {device} as base_logits, got {draft_ids.device}"
        )
