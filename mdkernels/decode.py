"""Decoding from a mixture without the ceremony of generate(): `decode` is the same loop as
`fast_decode`, called directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .decode_loop import run
from .decode_rows import Request, Sampling
from .growing_cache import growing_cache
from .mixture import MemoryMixture
from .mixture_cache import MixtureCache
from .mixture_checks import check_input_ids
from .mixture_config import context_length
from .models import model_id
from .ops.mix_sample.arguments import sampling as checked
from .ops.mix_sample.philox import row_seeds

TokenHook = Callable[[Tensor], None]


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
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    draft_tokens: int | Literal["auto"] = 0,
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
        eos_token_id: ends a row, or several that do; the end of the batch is that of its last row.
        pad_token_id: fills rows that ended early; None: the (first) eos token.
        draft_tokens: how many tokens a memory drafts for one pass of the base; "auto" follows what
            is accepted. Faster where the memory is much smaller; the distribution stays the same.
        on_token: called with each (B,) of new tokens.

    Returns (B, T + n) int64 with 1 <= n <= max_new_tokens. Raises ValueError, before any compute,
    for an empty prompt, right padding, or a prompt that with max_new_tokens exceeds a context.
    """
    mask = _check(mixture, input_ids, attention_mask, max_new_tokens)
    sampling = check_sampling(temperature, top_k, top_p, min_p)
    ends = () if eos_token_id is None else eos_token_id
    eos = (ends,) if isinstance(ends, int) else tuple(ends)
    for name, ids in (("eos_token_id", eos), ("pad_token_id", (pad_token_id or 0,))):
        if not all(isinstance(one, int) for one in ids):
            raise TypeError(f"{name}: expected an int (for eos also a list of them), got {ids!r}")
    request = Request(
        mixture=mixture,
        input_ids=input_ids,
        fresh=input_ids.shape[1],
        mask=mask,
        cache=mixture.new_cache(),
        max_new_tokens=max_new_tokens,
        sampling=None if sampling is None else Sampling(stream_seeds(seed, input_ids), **sampling),
        eos=eos,
        pad=next(iter(eos), 0) if pad_token_id is None else pad_token_id,
        draft_tokens=draft_tokens,
        emit=on_token,
        keeps_cache=False,
    )
    request.cache = decoding_cache(check_draft(request))
    return run(request).sequences


def decoding_cache(request: Request) -> MixtureCache:
    """The fastest empty cache: on a GPU a static one, for graphs, unless rows that reject drafts
    share it, a window slides or a layer keeps a state; else one that grows in place."""
    uneven = bool(request.draft_tokens) and len(request.input_ids) > 1
    odd = any(request.cache.is_sliding) or any(request.cache.is_stateful)
    if request.input_ids.device.type == "cuda" and not uneven and not odd:
        return request.mixture.new_cache(request.input_ids.shape[1] + request.max_new_tokens - 1)
    return MixtureCache([growing_cache(model.config) for model in request.mixture.models])


def check_mixture(name: str, mixture: Any) -> None:
    if not isinstance(mixture, MemoryMixture):
        raise TypeError(
            f"{name}: decodes a MemoryMixture, got {type(mixture).__name__}; for a base alone, "
            "MemoryMixture(base, [])"
        )


def stream_seeds(seed: int | Tensor, input_ids: Tensor) -> Tensor:
    """(B,) int64: `seed`, or from an int one stream for each row."""
    if isinstance(seed, int):
        return row_seeds(seed, len(input_ids), input_ids.device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected an int, or int64, one per row; got {seed!r}")
    if tuple(seed.shape) != (len(input_ids),) or seed.dtype != torch.int64:
        raise ValueError(
            f"seed: expected an int, or int64 of shape ({len(input_ids)},), one per row; got "
            f"{tuple(seed.shape)} {seed.dtype}"
        )
    return seed.to(input_ids.device)


def check_drafts(drafts: int | str, memories: int, cache: MixtureCache) -> None:
    if drafts != "auto" and (type(drafts) is not int or drafts < 0):
        raise ValueError(
            f'draft_tokens must be "auto" or an integer >= 0 (0: no drafts), got {drafts!r}'
        )
    if drafts and not memories:
        raise ValueError(f"draft_tokens: got {drafts!r}, but without a memory nothing could draft")
    if drafts and any(cache.is_stateful):
        raise ValueError(
            f"draft_tokens: got {drafts!r} with a model whose layers keep a state (Mamba, linear "
            "attention), which cannot go back; pass 0"
        )
    if drafts and any(cache.is_sliding):
        raise ValueError(
            f"draft_tokens: got {drafts!r} with a model that attends in a sliding window, whose "
            "cache cannot go back; pass 0"
        )


def check_draft(request: Request) -> Request:
    """`request`, if its drafts can be made."""
    drafts, cache = request.draft_tokens, request.cache
    check_drafts(drafts, len(request.mixture.memories), cache)
    if drafts and len(request.input_ids) > 1 and cache.is_compileable:
        raise ValueError(
            f"draft_tokens: got {drafts!r} with a static cache and {len(request.input_ids)} rows, "
            "which would need room for what each rejects; use the dynamic cache"
        )
    return request


def _check(
    mixture: MemoryMixture, input_ids: Tensor, attention_mask: Tensor | None, new: int
) -> Tensor | None:
    """The mask to use: None when nothing is padded, which lets attention skip it."""
    check_mixture("mixture", mixture)
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
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
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


def check_sampling(temperature, top_k, top_p, min_p) -> dict | None:
    """Arguments of `mix_sample`, or None for greedy decoding."""
    temperature, top_k, top_p, min_p = checked(temperature, top_k, top_p, min_p)
    if temperature == 0.0:
        return None
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
