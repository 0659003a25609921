"""Draws tokens from the mixture of a base model with memory models. Derivation: README.md."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..logit_mix.arguments import SCHEMA, canonical, plain, unrecorded
from ..mix_argmax import forward as greedy
from .arguments import filtered, plain_streams, sampling, streams

MODES = ("mixture", "component")


class MixSampleOutput(NamedTuple):
    """Tokens and their unfiltered log-probabilities in nats."""

    tokens: Tensor  # (N,) int64
    logprobs: Tensor  # (N,) under the mixture
    base_logprobs: Tensor  # (N,) under the base; -inf for an id that it does not have
    memory_logprobs: Tensor  # (N,) under the memory; (N, memories) if memory_logits was a list


def _fake_logprobs(base_logits, memory_logits, *args):
    wide = torch.float64 if base_logits.dtype == torch.float64 else torch.float32
    return base_logits.new_empty((base_logits.shape[0], 2 + len(memory_logits)), dtype=wide)


_forward = dispatch.define(
    "mix_sample",
    "forward",
    f"({SCHEMA}, float temperature, int top_k, float top_p, float min_p, Tensor seeds, "
    "Tensor offsets, str backend) -> Tensor",
    lambda base_logits, *args: base_logits.new_empty(base_logits.shape[0], dtype=torch.int64),
)
_choose = dispatch.define(
    "mix_sample",
    "choose",
    f"({SCHEMA}, Tensor seeds, Tensor offsets, str backend) -> Tensor",
    lambda base_logits, memory_logits, *args: base_logits.new_empty(
        (base_logits.shape[0], len(memory_logits)), dtype=torch.float32
    ),
)
_logprobs = dispatch.define(
    "mix_sample", "logprobs", f"({SCHEMA}, Tensor tokens, str backend) -> Tensor", _fake_logprobs
)


def mix_sample(
    base_logits: Tensor,
    memory_logits: Tensor | Sequence[Tensor],
    mix_weight: float | Tensor | Sequence[float | Tensor],
    *,
    seeds: int | Tensor,
    offsets: int | Tensor | None = None,
    memory_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    mode: str = "mixture",
    return_logprobs: bool = False,
    backend: str = "auto",
) -> Tensor | MixSampleOutput:
    """One token per row, drawn from the mixture that `logit_mix` describes.

    In distribution equivalent to applying, in the order of Hugging Face, temperature, top-k, top-p
    and min-p to ``logit_mix(...)`` and calling ``torch.multinomial`` on its softmax. The draw
    itself is a function of (logits, seed, offset) of its row and of `mode`, and of nothing else:
    the same request gives the same token in any batch, at any slot, with any number of threads, on
    any backend (up to rounding of the logits' arithmetic).

    Args:
        base_logits, memory_logits, mix_weight, memory_temperature: as `logit_mix`.
        seeds: (N,) int64, the random stream of each row. An int is a shorthand for rows that are
            not requests of their own: row i gets the i-th seed derived from it, which takes longer
            than a small draw.
        offsets: (N,) int64 or int, the position within the stream: count one up per token drawn,
            or draws repeat. None is 0.
        temperature: divides the log-probabilities of the mixture; 0 is greedy, `mix_argmax`.
        top_k: keep the k best and what ties with the k-th; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches it; 1 keeps all. The
            best token always stays, and equal tokens are ranked by id.
        min_p: keep tokens of at least this share of the best one's probability; 0 keeps all.
        mode: "mixture", or "component" to draw a model according to the weights and then a token
            from that model alone: the same distribution, though not the same tokens, and only one
            model's row is looked at. For temperature 1 without filters only.
        return_logprobs: also return log-probabilities, before temperature and filters.
        backend: see `mdkernels.backends`.

    Returns:
        (N,) int64 tokens, or MixSampleOutput. Not differentiable.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value outside the above; on the CPU, a row
            that `logit_mix` makes NaN (elsewhere and at temperature 0 its token is -1, its
            log-probabilities are NaN).
        BackendUnavailable: the named backend cannot run here.
    """
    temperature, top_k, top_p, min_p = filters = sampling(temperature, top_k, top_p, min_p)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if mode == "component" and (temperature != 1.0 or filtered(top_k, top_p, min_p)):
        raise ValueError(
            "mode: 'component' is exact only for temperature 1 without top_k, top_p and min_p; use "
            "mode='mixture'"
        )
    given = (base_logits, memory_logits, mix_weight, memory_temperature)
    quick = None
    if mode == "mixture" and not return_logprobs and plain_streams(seeds, offsets):
        op = "mix_argmax" if temperature == 0.0 else "mix_sample"
        quick = plain(op, *given, backend)
    module, arguments = quick or (None, canonical(*given))
    base = arguments[0]
    seeds, offsets = streams(seeds, offsets, base.shape[0], base.device, temperature > 0.0)
    if module is not None:
        drawn = () if temperature == 0.0 else (*filters, seeds, offsets)
        return module.forward(*arguments, *drawn)
    with unrecorded(arguments):
        if temperature == 0.0:
            tokens = greedy(*arguments, backend)
        else:
            drawn_from = arguments
            if mode == "component":
                chosen = _choose(*arguments, seeds, offsets, backend)
                drawn_from = (*arguments[:2], chosen, [], arguments[4])
            tokens = _forward(*drawn_from, *filters, seeds, offsets, backend)
        if not return_logprobs:
            return tokens
        table = _logprobs(*arguments, tokens, backend)
    memory = table[:, 2] if isinstance(memory_logits, Tensor) else table[:, 2:]
    return MixSampleOutput(tokens, table[:, 0], table[:, 1], memory)
