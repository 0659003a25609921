"""What a mixture refuses, and why, before any compute."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, WatermarkingConfig

from .mix_weight import check_weights
from .mixture_cache import CACHE, MixtureCache, holds_state, restarts
from .mixture_config import context_length
from .models import merge_hint, model_id
from .ops.logit_mix.arguments import WEIGHT_SLACK, weight_matrix

NO_CONTINUOUS_BATCHING = (
    "a mixture has no continuous batching: its paged cache is built from one configuration, with "
    "heads of one shape, and base and memory have each their own. Pass a left-padded batch to "
    "generate()"
)

_ONE_MODEL = "ask one of mixture.models for it"
# Generation options that would do nothing here, or something else than they say.
_REFUSED = {
    "inputs_embeds": "each model embeds tokens in its own space; pass input_ids",
    "token_type_ids": "a mixture has none",
    "labels": "call the mixture itself for a loss",
    "output_attentions": _ONE_MODEL,
    "output_hidden_states": _ONE_MODEL,
    "output_logprobs": "pass output_logits=True and return_dict_in_generate=True, or call forward",
    "output_component_logprobs": "call forward on the generated sequence",
    "assistant_early_exit": "a mixture has no layer to leave at",
    "use_mtp": "a mixture has no multi-token heads",
    "speculation_type": "its drafts need the hidden states of one model",
    "dola_layers": "a mixture has no layers of its own to contrast",
    "penalty_alpha": "contrastive search needs the hidden states of one model",
}
_OF_ASSISTANT = "would be ignored; set it in assistant_model.generation_config, where it is read"
# Options that transformers looks at nowhere, or only beside another one.
_IGNORED = {
    "assistant_confidence_threshold": _OF_ASSISTANT,
    "assistant_lookbehind": _OF_ASSISTANT,
    "low_memory": "would be ignored; beams run in one batch",
    "num_assistant_tokens": _OF_ASSISTANT,
    "num_assistant_tokens_schedule": _OF_ASSISTANT,
    "target_lookbehind": _OF_ASSISTANT,
}
_NEEDS = {
    "assistant_ensemble_weight": "assistant_model",
    "cache_config": "cache_implementation",
    "diversity_penalty": "num_beam_groups",
    "max_cache_len": "cache_implementation",
    "max_matching_ngram_size": "prompt_lookup_num_tokens",
    "negative_prompt_attention_mask": "negative_prompt_ids",
    "negative_prompt_ids": "guidance_scale",
}


def check_config_alone(config, memory: Any) -> None:
    if memory is not None:
        raise TypeError(
            "memory: a MemoryMixtureConfig already describes the memories; leave it out"
        )
    if config.base is None:
        raise ValueError(
            "base: this is not the configuration of a saved mixture; "
            "MemoryMixture.from_pretrained(base, memory) mixes plain models"
        )


def check_models(models: Sequence[Any]) -> list[PreTrainedModel]:
    """Live causal LMs on one device."""
    base = models[0]
    for i, model in enumerate(models):
        name = "base" if i == 0 else "memory"
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"{name}: expected a live Hugging Face model, got {type(model).__name__}; "
                "MemoryMixture.from_pretrained loads directories and hub ids" + merge_hint(model)
            )
        if hasattr(model, "mix_weight"):
            raise TypeError(
                f"{name}: is a mixture itself; mix its models instead, memory=[...] takes several"
            )
        if model.config.is_encoder_decoder or not model.can_generate():
            raise TypeError(f"{name}: {type(model).__name__} is no causal language model")
        known = inspect.signature(model.forward).parameters  # of a wrapper: nothing by name
        if "input_ids" in known and CACHE not in known:
            raise TypeError(
                f"{name}: {type(model).__name__} takes no {CACHE}, so it would forget what it read "
                "between two tokens; use a family that does (RWKV does not)"
            )
        if not model._supports_default_dynamic_cache():
            raise TypeError(
                f"{name}: {type(model).__name__} keeps what it read in a cache of its own kind, "
                "which generate() cannot reorder or reset beside others; use a family with the "
                "caches of transformers (xLSTM and the first MiniMax have others)"
            )
        if model.device != base.device:
            raise ValueError(
                f"memory {model_id(model)} is on {model.device}, base {model_id(base)} on "
                f"{base.device}; move them to one device"
            )
    return list(models)


def check_input_ids(models: Sequence[PreTrainedModel], input_ids: Tensor) -> None:
    """(B, T) int64 of ids that every model can read. Looks at the values: synchronises a GPU."""
    _check_tensor(input_ids)
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(
            f"input_ids: expected (batch, length) int64, got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}"
        )
    if input_ids.numel() == 0:
        raise ValueError("input_ids: the prompt is empty; give at least one token per row")
    low, high = int(input_ids.min()), int(input_ids.max())
    for model in models:
        rows = model.get_input_embeddings().weight.shape[0]
        if low < 0 or high >= rows:
            raise ValueError(
                f"input_ids: values span [{low}, {high}], model {model_id(model)} knows [0, {rows})"
            )


def _check_tensor(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids: expected a tensor, got {type(input_ids).__name__}; pass what a tokenizer "
            'returns with return_tensors="pt" as generate(**batch)'
        )


def check_forward(mixture, input_ids: Tensor, labels: Tensor | None, keep: int | Tensor) -> None:
    """Of shapes only: this runs in a compiled step."""
    _check_tensor(input_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected (batch, length), got {tuple(input_ids.shape)}")
    context = mixture.config.max_position_embeddings
    if context is not None and input_ids.shape[1] > context:
        raise ValueError(
            f"input_ids: {input_ids.shape[1]} tokens do not fit the shortest context of base and "
            f"memories, {context}"
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor as input_ids, got {type(labels).__name__}")
    if labels is not None and (labels.shape != input_ids.shape or not _is_zero(keep)):
        raise ValueError(
            f"labels: expected {tuple(input_ids.shape)} as input_ids, with logits_to_keep=0, got "
            f"{tuple(labels.shape)}"
        )


def _is_zero(keep: int | Tensor) -> bool:
    return isinstance(keep, int) and keep == 0


def check_cache(cache: Any, models: Sequence[PreTrainedModel]) -> MixtureCache | None:
    if cache is not None and (
        not isinstance(cache, MixtureCache) or len(cache.views) != len(models)
    ):
        raise TypeError(
            f"cache: expected a MixtureCache over {len(models)} models, got "
            f"{type(cache).__name__}; mixture.new_cache() makes one, "
            "mixture.new_cache(max_cache_len) a static one"
        )
    return cache


def check_restarts(models: Sequence[PreTrainedModel], views: Sequence[Any], count: int) -> None:
    """Raise ValueError where a pass over `count` tokens would forget what the cache holds."""
    if count == 1:
        return
    for model, view in zip(models, views, strict=True):
        if restarts(model) and view is not None and holds_state(view):
            raise ValueError(
                f"cache: model {model_id(model)} ({model.config.model_type}) reads {count} tokens "
                "at once as if nothing had come before them; pass custom_generate=fast_decode to "
                "generate(), or the whole text without a cache and without prefill_chunk_size"
            )


def weights_of_rows(mixture, mix_weight: Any, batch: int, kept: int) -> list[float] | Tensor:
    """`mix_weight` of one forward as `logit_mix` takes it for (batch * kept) rows."""
    if mix_weight is None:
        return list(mixture.config.mix_weight)
    if not isinstance(mix_weight, Tensor):
        return list(check_weights(mix_weight, len(mixture.config.memories)))
    weights = weight_matrix(mix_weight, len(mixture.config.memories), batch, mix_weight.device)
    return weights[:, None].expand(-1, kept, -1).flatten(0, 1)


def check_generate(
    mixture, inputs: Tensor | None, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`kwargs` for `GenerationMixin.generate`, with mix_weight as a (B, memories) tensor."""
    asked = {name: getattr(config, name, None) for name in (*_REFUSED, "cache_implementation")}
    asked |= {name: value for name, value in kwargs.items() if value is not None}
    if asked["cache_implementation"] == "paged":
        raise ValueError(NO_CONTINUOUS_BATCHING)
    for name, reason in _REFUSED.items():
        if asked[name] is not None and asked[name] is not False:
            raise ValueError(f"{name}: {reason}")
    _check_ignored(mixture, config, kwargs)
    caches = [kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}
    if caches:
        cache = kwargs[CACHE] = check_cache(caches[0], mixture.models)
        if cache.only_states and cache.read and kwargs.get("custom_generate") is None:
            raise ValueError(
                f"cache: none of its models counts what it has read ({cache.read} tokens), and "
                "generate() would read them again; pass custom_generate=fast_decode, or no cache"
            )
    prompt = kwargs.get("input_ids") if inputs is None else inputs
    if prompt is not None:
        check_input_ids(mixture.models, prompt)
        _check_mask(prompt, kwargs.get("attention_mask"), bool(caches))
    if kwargs.get("mix_weight") is None:
        return kwargs
    if getattr(config, "guidance_scale", None) or kwargs.get("guidance_scale"):
        raise ValueError(
            "mix_weight: the unconditional pass of guidance_scale would not see it; assign "
            "mixture.mix_weight instead"
        )
    batch = 1 if prompt is None else len(prompt)
    weight = kwargs["mix_weight"]
    if not isinstance(weight, Tensor):
        weight = torch.tensor(check_weights(weight, len(mixture.memories)))
    weight = weight_matrix(weight.to(mixture.device), len(mixture.memories), batch, mixture.device)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(f"mix_weight must be in [0, 1], got {weight.tolist()}")
    if bool((weight.double().sum(1) > 1 + WEIGHT_SLACK).any()):
        raise ValueError(f"mix_weight: a row of {weight.tolist()} sums to more than 1")
    return {**kwargs, "mix_weight": weight}


def _check_mask(prompt: Tensor, mask: Any, continued: bool) -> None:
    if mask is not None and not isinstance(mask, (Tensor, dict)):
        raise TypeError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    # A continued prompt may be passed whole or in part; the mask covers all of it.
    fits = mask.shape[1] >= prompt.shape[1] if continued else mask.shape[1] == prompt.shape[1]
    if len(mask) != len(prompt) or not fits:
        raise ValueError(
            f"attention_mask: expected {tuple(prompt.shape)} as input_ids, got {tuple(mask.shape)}"
        )


def _check_ignored(mixture, config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what the caller set and the mode of generation would not look at, such
    as a temperature without do_sample. Defaults of the checkpoint do not count."""
    defaults = mixture.generation_config
    explicit = GenerationConfig()
    if config is not None:
        explicit = copy.deepcopy(config)
        for name, value in vars(defaults).items():
            if getattr(config, name, None) == value and name not in ("do_sample", "num_beams"):
                setattr(explicit, name, None)
    for name, value in kwargs.items():
        if name == "watermarking_config" and isinstance(value, dict):
            value = WatermarkingConfig.from_dict(value)
        if hasattr(explicit, name):
            setattr(explicit, name, value)
    given = {**vars(explicit), **kwargs}
    given = {name for name, value in given.items() if value is not None and value is not False}
    if "is_assistant" in given:  # called by transformers, which hands on all that it has
        given = set()
    for name in sorted(given & set(_IGNORED)):
        raise ValueError(f"{name}: {_IGNORED[name]}")
    for name in sorted(given & set(_NEEDS)):
        needed = _NEEDS[name]
        if needed not in given and getattr(defaults, needed, None) is None:
            raise ValueError(f"{name}: would be ignored without {needed}")
    for name in ("do_sample", "num_beams"):
        if getattr(explicit, name) is None:
            setattr(explicit, name, getattr(defaults, name))
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if getattr(explicit, new) is not None and getattr(explicit, whole) is not None:
            raise ValueError(f"{whole}: would be ignored beside {new}; give one of them")
    try:
        explicit.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"generate: {error}") from error


def check_prepared(mixture, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """The request as generate() understood it: padding, and room for what it may read."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "attention_mask: a row ends in padding; pad on the left "
            '(tokenizer.padding_side = "left"), and no row may be all padding'
        )
    cache = model_kwargs.get(CACHE)
    read = config.max_length - 1  # the last new token is never read
    if cache is not None:
        past, prompt = int(cache.get_seq_length()), config._prompt_length
        masked = mask.shape[1] if mask is not None else getattr(config, "_mask_length", 0)
        if masked != prompt:  # only the new part of the prompt was passed
            read += past
        elif past >= prompt:
            raise ValueError(
                f"cache: holds {past} tokens, input_ids {prompt}; pass the whole sequence, or its "
                "new part with an attention_mask over all of it"
            )
        room = cache.get_max_length()
        if room not in (-1, None) and read > room:
            raise ValueError(f"cache: has room for {room} tokens, the request may read {read}")
    for model in mixture.models:
        context = context_length(model.config)
        if context is not None and read > context:
            raise ValueError(
                f"input_ids: the prompt ({config._prompt_length} tokens) and what may be generated "
                f"need {read} positions, model {model_id(model)} has a context of {context}; "
                "shorten the prompt or lower max_new_tokens"
            )
