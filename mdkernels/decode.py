"""A lean decoding loop over a mixture: only the last position's logits exist, and one fused op
turns those of all models into the next token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .mixture import MemoryMixture
from .mixture_cache import CACHE
from .mixture_checks import check_input_ids
from .mixture_config import context_length
from .models import model_id
from .ops.mix_argmax import mix_argmax
from .ops.mix_sample import mix_sample

TokenHook = Callable[[Tensor], None]


@torch.inference_mode()
def decode(
    mixture: MemoryMixture,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor = 0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    on_token: TokenHook | None = None,
) -> Tensor:
    """Continue each row of `input_ids` by at most `max_new_tokens` tokens.

    Args:
        input_ids: (B, T) int64, left-padded where rows differ in length.
        attention_mask: (B, T), 0 on padding; None: no padding. A padded row decodes exactly as it
            would alone.
        temperature: of the mixture; 0 is greedy decoding, which ignores the next four.
        top_k, top_p, min_p: truncate the mixture before sampling; 0, 1 and 0 leave it whole.
        seed: an int, from which each row gets a stream by its place in the batch, or (B,) int64
            seeds; a row with a seed of its own draws the same tokens in any batch.
        eos_token_id: ends a row; the end of the batch is the end of its last row.
        pad_token_id: fills rows that ended early; None: the eos token.
        on_token: called with each (B,) of new tokens.

    Returns (B, T + n) int64 with 1 <= n <= max_new_tokens. Raises ValueError, before any compute,
    for an empty prompt, right padding, or a prompt that with max_new_tokens exceeds a context.
    """
    mask = _check(mixture, input_ids, attention_mask, max_new_tokens)
    sampling = _check_sampling(temperature, top_k, top_p, min_p)
    pad = eos_token_id if pad_token_id is None else pad_token_id
    caches = [DynamicCache(config=model.config) for model in mixture.models]
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens, step_ids = input_ids, input_ids
    for step in range(max_new_tokens):
        logits = [
            _last_logits(model, step_ids, mask, cache)
            for model, cache in zip(mixture.models, caches, strict=True)
        ]
        picked = _pick(mixture, logits, sampling, seed, step)
        if eos_token_id is not None:
            picked = torch.where(ended, pad, picked)
            ended |= picked == eos_token_id
        tokens = torch.cat([tokens, picked[:, None]], dim=1)
        if on_token is not None:
            on_token(picked)
        if eos_token_id is not None and bool(ended.all()):
            break
        step_ids = picked[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return tokens


def _pick(
    mixture: MemoryMixture,
    logits: list[Tensor],
    sampling: dict | None,
    seed: int | Tensor,
    step: int,
) -> Tensor:
    # Ids that only the wider model has are padding rows, and no input for the other model.
    width = min(one.shape[1] for one in logits)
    base, *memories = [one[:, :width] for one in logits]
    weights = list(mixture.mix_weight)
    if not memories:
        memories, weights = [base], [0.0]
    mix = {"memory_temperature": mixture.memory_temperature}
    if sampling is None:
        return mix_argmax(base, memories, weights, **mix)
    return mix_sample(base, memories, weights, seeds=seed, offsets=step, **sampling, **mix)


def _last_logits(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, cache: DynamicCache
) -> Tensor:
    """(B, V) logits behind the last token; `cache` grows by `input_ids`."""
    positions = None
    if mask is not None:
        # Counted from each row's first real token, or a padded row would be rotated differently.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: cache},
    )
    return output.logits[:, -1]


def _check(
    mixture: MemoryMixture, input_ids: Tensor, attention_mask: Tensor | None, new: int
) -> Tensor | None:
    """The mask to use: None when nothing is padded, which lets attention skip it."""
    check_input_ids(mixture.models, input_ids)
    if not isinstance(new, int) or new < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {new!r}")
    for model in mixture.models:
        context = context_length(model.config)
        # The last new token is never read.
        if context is not None and input_ids.shape[1] + new - 1 > context:
            raise ValueError(
                f"input_ids: {input_ids.shape[1]} prompt tokens and {new} new ones do not fit "
                f"the context of {model_id(model)}, {context}; shorten one of them"
            )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected {tuple(input_ids.shape)} as input_ids, got "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask.to(torch.int64)
    if bool((mask[:, -1] == 0).any()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError(
            "attention_mask: a row ends in padding or has a hole; pad on the left "
            '(tokenizer.padding_side = "left"), and no row may be all padding'
        )
    return None if bool(mask.all()) else mask


def _check_sampling(temperature, top_k, top_p, min_p) -> dict | None:
    """Arguments of `mix_sample`, or None for greedy decoding."""
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer >= 0 (0: all), got {top_k!r}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    if temperature == 0.0:
        return None
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
