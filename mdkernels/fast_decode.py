"""The fast loop behind `generate()`: `mixture.generate(..., custom_generate=fast_decode)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria_module
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decode import check_draft, check_mixture, decoding_cache, stream_seeds
from .decode_loop import DecodeStats, run
from .decode_rows import Request, Sampling, passes
from .mixture import MemoryMixture
from .mixture_cache import CACHE, attends, states

_WITHOUT = "; generate() without custom_generate does that"
# What a processor that the fused op replaces is called there, in the order it applies them.
_FUSED = {
    processors.TemperatureLogitsWarper: "temperature",
    processors.TopKLogitsWarper: "top_k",
    processors.TopPLogitsWarper: "top_p",
    processors.MinPLogitsWarper: "min_p",
}
_REFUSED = {
    "output_scores": "the mixture's scores are never written" + _WITHOUT,
    "output_logits": "the mixture's logits are never written" + _WITHOUT,
    "prompt_lookup_num_tokens": "drafts come from the memory; pass draft_tokens instead",
    "compile_config": "nothing is compiled by torch.compile here" + _WITHOUT,
}


@dataclass
class FastDecodeOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with what decoding cost. Its cache is None after speculation
    with several rows, whose lengths differ on the way."""

    stats: DecodeStats | None = None


def fast_decode(
    model: MemoryMixture,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer=None,
    assistant_model=None,
    seed: int | Tensor | None = None,
    draft_tokens: int | Literal["auto"] = 0,
    cuda_graph: bool = True,
    **model_kwargs: Any,
) -> FastDecodeOutput | Tensor:
    """A decoding method for `generate()` of a mixture, greedy or sampling with temperature, top-k,
    top-p and min-p: ``mixture.generate(ids, custom_generate=fast_decode, ...)``.

    The tokens of one step come from one fused op over the logits of all models; nothing of shape
    (B, T, V) and no log-softmax is written. In distribution equal to `generate()` without it, and
    greedily equal token by token, up to rounding.

    Options of `generate()` that only this method knows:
        seed: an int, from which each row gets a random stream by its place in the batch, or (B,)
            int64, one stream per row: it then draws the same tokens in any batch. None: from
            torch's global generator.
        draft_tokens: how many tokens the memory of the largest weight drafts for one pass of the
            base, "auto" to follow what is accepted, 0 for none. Lossless: the distribution is that
            of the mixture whatever is drafted, and greedy tokens stay the same (see `mix_verify`).
        cuda_graph: on a GPU, with the static cache that is the default there, a step of all models
            is one graph, with base and memories on streams of their own. The host waits for none.
            Drafts for several rows, sliding windows and a dynamic `cache` decode without graphs.

    Returns as `generate()`: (B, T + n) int64, or with return_dict_in_generate a FastDecodeOutput.

    Raises ValueError, before any compute, for anything that would be ignored: beams, other
    processors and criteria, scores as output.
    """
    _check(model, generation_config, synced_gpus, assistant_model, model_kwargs)
    eos, length = _ends(stopping_criteria)
    filters = _filters(logits_processor)
    sampling = None
    if generation_config.do_sample:
        if seed is None:
            seed = torch.randint(1 << 62, (len(input_ids),))
        sampling = Sampling(stream_seeds(seed, input_ids), **filters)
    elif filters or seed is not None:
        name = "seed" if seed is not None else next(iter(filters))
        raise ValueError(f"{name}: would be ignored by greedy decoding; pass do_sample=True")
    cache, mask = model_kwargs[CACHE], model_kwargs.get("attention_mask")
    fresh = input_ids.shape[1]
    read = getattr(generation_config, "_mask_length", fresh) if mask is None else mask.shape[1]
    if read == fresh:
        fresh -= int(cache.get_seq_length())
    _check_positions(model_kwargs.get("position_ids"), mask, fresh, cache)
    own = getattr(cache, "_is_user_defined", False)
    pad = generation_config._pad_token_tensor
    request = Request(
        mixture=model,
        input_ids=input_ids,
        fresh=fresh,
        mask=None if mask is None or bool(mask.all()) else mask.long(),
        cache=cache,
        max_new_tokens=length - input_ids.shape[1],
        sampling=sampling,
        mix_weight=model_kwargs.get("mix_weight"),
        eos=eos,
        pad=0 if pad is None else int(pad),
        prefill_chunk_size=generation_config.prefill_chunk_size,
        draft_tokens=draft_tokens,
        emit=None if streamer is None else lambda tokens: streamer.put(tokens.cpu()),
        keeps_cache=own or bool(generation_config.return_dict_in_generate),
        updates_cache=own,
        cuda_graph=cuda_graph,
    )
    if draft_tokens and len(input_ids) > 1 and own:
        raise ValueError(
            "cache: drafts would leave it with rows of different lengths; pass draft_tokens=0 to "
            "continue a batch"
        )
    check_draft(request)
    if any(cache.is_stateful) and request.mask is not None:
        _check_padding(request)
    if not own and generation_config.cache_implementation is None:
        request.cache = decoding_cache(request)
    decoded = run(request)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return decoded.sequences
    return FastDecodeOutput(
        sequences=decoded.sequences, stats=decoded.stats, **{CACHE: decoded.cache}
    )


def _check(model, config: GenerationConfig, synced_gpus, assistant_model, model_kwargs) -> None:
    check_mixture("fast_decode", model)
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams: {config.num_beams} beams are no part of the fast loop{_WITHOUT}"
        )
    if assistant_model is not None:
        raise ValueError("assistant_model: drafts come from the memory; pass draft_tokens instead")
    if synced_gpus:
        raise ValueError(f"synced_gpus: the fast loop runs in one process{_WITHOUT}")
    if not config.use_cache:
        raise ValueError(f"use_cache: the fast loop needs the cache{_WITHOUT}")
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"{name}: {reason}")
    known = {CACHE, "attention_mask", "position_ids", "mix_weight", "use_cache", "logits_to_keep"}
    for name, value in model_kwargs.items():
        if name not in known and value is not None:
            raise ValueError(f"{name}: the fast loop has no use for it{_WITHOUT}")


def _check_positions(given: Tensor | None, mask: Tensor | None, fresh: int, cache) -> None:
    """generate() makes positions where the caller gives none; the loop counts the same ones."""
    if given is None:
        return
    past = int(cache.get_seq_length())
    counted = torch.arange(past, past + fresh, device=given.device)[None]
    if mask is not None:
        counted = (mask.long().cumsum(1) - 1)[:, past:]
    differs = given[:, -fresh:] != counted
    if mask is not None:
        differs &= mask[:, past:].bool()
    if bool(differs.any()):
        raise ValueError(
            f"position_ids: the fast loop counts positions from each row's first token{_WITHOUT}"
        )


def _check_padding(request: Request) -> None:
    """Of models that keep a state, which padding must not reach."""
    cache, mask = request.cache, request.mask
    if cache.is_static:
        raise ValueError(
            "cache: static, with padded rows and a model whose layers keep a state (Mamba, linear "
            "attention), which would not decode as they do alone; use the dynamic cache"
        )
    hybrid = any(attends(view) and states(view) for view in cache.views)
    sizes = torch.tensor(passes(request), device=mask.device)
    alone = mask[:, -request.fresh :][:, (sizes == 1).repeat_interleave(sizes)]
    # A pass over one token takes it for generated text, whatever the mask says.
    if hybrid and not bool(alone.all()):
        raise ValueError(
            "attention_mask: holds padding where a model whose layers keep a state reads one token "
            "at a time, which it would take for text; leave out prefill_chunk_size, or pass the "
            "whole text without a cache"
        )


def _filters(given: LogitsProcessorList) -> dict[str, Any]:
    """Arguments of `mix_sample` that do what the processors would."""
    order = list(_FUSED)
    found: dict[str, Any] = {}
    last = -1
    for one in given:
        if type(one) not in _FUSED:
            raise ValueError(
                f"logits_processor: {type(one).__name__} is not in the fused op, which knows "
                f"temperature, top_k, top_p and min_p{_WITHOUT}"
            )
        if order.index(type(one)) <= last:
            raise ValueError(
                f"logits_processor: {type(one).__name__} comes twice or out of order; the fused op "
                f"applies {', '.join(_FUSED.values())}{_WITHOUT}"
            )
        last = order.index(type(one))
        if getattr(one, "min_tokens_to_keep", 1) > 1:
            raise ValueError(
                f"logits_processor: {type(one).__name__} has min_tokens_to_keep="
                f"{one.min_tokens_to_keep}; the fused op keeps 1{_WITHOUT}"
            )
        found[_FUSED[type(one)]] = getattr(one, _FUSED[type(one)])
    return found


def _ends(given: StoppingCriteriaList) -> tuple[tuple[int, ...], int]:
    """(eos token ids, total length)."""
    eos: tuple[int, ...] = ()
    lengths = []
    for one in given:
        if type(one) is criteria_module.MaxLengthCriteria:
            lengths.append(one.max_length)
        elif type(one) is criteria_module.EosTokenCriteria:
            eos = tuple(one.eos_token_id.tolist())
        else:
            raise ValueError(
                f"stopping_criteria: {type(one).__name__} is no part of the fast loop, which ends "
                f"at eos_token_id and at a length{_WITHOUT}"
            )
    if not lengths:
        raise ValueError("max_new_tokens: the fast loop needs a length to end at")
    return eos, min(lengths)
