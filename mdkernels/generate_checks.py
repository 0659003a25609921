"""What `generate` and `chat` refuse before they load a model or print a word."""

from __future__ import annotations

from typing import Any

import torch

from .decode import check_drafts, check_sampling
from .mix_weight import check_weights
from .mixture_cache import MixtureCache
from .mixture_config import MemoryMixtureConfig, check_temperature, context_length, is_mixture
from .models import load_config, model_id
from .train_config import DTYPES, resolve_device


def check_options(
    sources: list[Any],
    *,
    mix_weight: Any,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    memory_temperature: float | None = None,
    prompt_tokens: int = 1,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    draft_tokens: int | str = 0,
) -> torch.device:
    """Raise ValueError for what decoding `prompt_tokens` tokens would refuse or ignore.

    Args:
        sources: base, then memories: directories, hub ids or live models; only their
            configurations are read. Or a saved mixture alone.
        The others: see `generate`.

    Returns the device that `device` stands for.
    """
    named = [pair for source in sources for pair in _configs(source)]
    configs = [config for _, config in named]
    if mix_weight is None and len(sources) > 1:
        mix_weight = 0.5  # the default of MemoryMixture, for one memory
    if mix_weight is not None:
        check_weights(mix_weight, len(configs) - 1)
    if memory_temperature is not None:
        check_temperature(memory_temperature)
    check_sampling(temperature, top_k, top_p, min_p)
    if temperature == 0.0:
        for name, value, whole in (("top_k", top_k, 0), ("top_p", top_p, 1), ("min_p", min_p, 0)):
            if value != whole:
                raise ValueError(
                    f"{name}: got {value}, but temperature 0 is greedy decoding, which would "
                    f"ignore it; give a temperature (--temperature), or leave out {name}"
                )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place = resolve_device(device)
    check_drafts(draft_tokens, len(configs) - 1, MixtureCache.of(configs, None))
    for name, config in named:
        context = context_length(config)
        # The last new token is never read.
        if context is not None and prompt_tokens + max_new_tokens - 1 > context:
            raise ValueError(
                f"prompts: {prompt_tokens} prompt tokens and {max_new_tokens} new ones do not fit "
                f"the context of {name}, {context}; shorten the prompt or lower max_new_tokens"
            )
    return place


def model_sources(base: Any, memory: Any) -> list[Any]:
    """Base and memories in one list. Without a memory (None) `base` must be a saved mixture."""
    if memory is None:
        if isinstance(base, torch.nn.Module):
            raise ValueError(
                "memory: got none with a live base; give one, or as base the directory of a saved "
                "mixture"
            )
        if not is_mixture(base):
            raise ValueError(
                f"memory: got none, and {base} is not the directory of a saved mixture, which "
                "would bring its own; give a memory model (--memory), or as base a directory that "
                "MemoryMixture.save_pretrained wrote"
            )
        return [base]
    memories = list(memory) if isinstance(memory, (list, tuple)) else [memory]
    if None in memories:
        raise ValueError("memory: got None in a list of memories; leave it out")
    for name, source in [("base", base), *(("memory", one) for one in memories)]:
        if is_mixture(source):
            raise ValueError(
                f"{name}: {_name(source)} is a mixture itself, with its own memories; "
                + ("leave memory out" if name == "base" else "give a model of one network")
            )
    return [base, *memories]


def _name(source: Any) -> str:
    return model_id(source) if isinstance(source, torch.nn.Module) else str(source)


def _configs(source: Any) -> list[tuple[str, Any]]:
    """(name, configuration) of a model, or of each model of a saved mixture."""
    config = load_config(source)
    parts = config.models if isinstance(config, MemoryMixtureConfig) else [config]
    return [(_name(source), part) for part in parts]
