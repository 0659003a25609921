"""One key-value cache over all models of a mixture.

A Hugging Face cache is a list of layers, and whatever generation does with it (reorder for beams,
crop after a rejected draft, repeat, reset) it does to each layer. So the cache of a mixture is one
flat list, base first, and each model works on a cache of its own that holds the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name under which models take and return their cache; transformers 5.24 renamed it.
CACHE = "cache"
if CACHE not in {field.name for field in fields(CausalLMOutputWithPast)}:
    CACHE = "past_key_values"


class MixtureCache(Cache):
    """The concatenation of one cache per model, base first, sharing their layers.

    Args:
        caches: any kinds of `Cache` whose layers exist already, such as `DynamicCache(config=...)`
            or `StaticCache`; they stay the models' own caches, as `views`.
    """

    def __init__(self, caches: Sequence[Cache]):
        for i, cache in enumerate(caches):
            if not len(cache.layers):
                raise ValueError(
                    f"caches[{i}] has no layers yet; build it with config=model.config, or use "
                    "mixture.new_cache()"
                )
        super().__init__(layers=[layer for cache in caches for layer in cache.layers])
        self.views = tuple(caches)
        self.only_states = not attends(self)
        """Whether no layer counts the tokens it has read, so that this cache has to."""
        self.read = 0

    @classmethod
    def of(cls, configs: Sequence[PreTrainedConfig], max_cache_len: int | None) -> MixtureCache:
        """Empty caches for models with these configurations: dynamic, or static of that length."""
        if max_cache_len is None:
            return cls([DynamicCache(config=config) for config in configs])
        return cls([StaticCache(config=config, max_cache_len=max_cache_len) for config in configs])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens that every layer can hold; -1: no limit. A layer with a sliding window
        lets go of the oldest, so it sets none."""
        if layer_idx is not None:
            return super().get_max_length(layer_idx)
        layers = zip(self.layers, self.is_sliding, strict=True)
        lengths = [layer.get_max_length() for layer, slides in layers if not slides]
        return min((length for length in lengths if length != -1), default=-1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As of any cache."""
        return self.read if self.only_states else super().get_seq_length(layer_idx)

    def count(self, tokens: int) -> None:
        """Note that every model has read `tokens` more."""
        if self.only_states:  # otherwise a number that changes would compile a step anew
            self.read += tokens

    def reset(self) -> None:
        """As of any cache."""
        super().reset()
        self.read = 0

    @property
    def is_static(self) -> bool:
        """Whether masks have one length, that of the cache. (A state has no length at all.)"""
        return self.is_compileable and not self.only_states

    @property
    def is_stateful(self) -> list[bool]:
        """Of each layer, whether it keeps a state that every token changes (Mamba, linear
        attention, short convolutions), and so cannot go back."""
        kept = states(self)
        return [i in kept for i in range(len(self.layers))]

    def crop(self, tokens_to_remove: int) -> None:
        """As of any cache: take a negative number of tokens off the end."""
        for layer in self.layers:
            if hasattr(layer, "crop") or layer.is_sliding:
                layer.crop(tokens_to_remove)
            else:
                # A static layer before transformers 5.24: what comes next is written over the rest.
                layer.cumulative_length.sub_(abs(tokens_to_remove))


def readable(mask: Any, cache: Cache | None, count: int) -> Any:
    """Of `mask` over all tokens what a model reads with `count` new ones: only theirs, if none of
    its layers attends. (Mamba would multiply its inputs with all of it.)"""
    if cache is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return mask
    return mask if attends(cache) else mask[:, -count:]


def attends(cache: Cache) -> bool:
    """Whether a layer keeps keys and values, and so knows how many tokens it has read."""
    return any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def restarts(model: PreTrainedModel) -> bool:
    """Whether `model` reads several tokens at once as if nothing had come before them: in these
    families the scan over a pass starts from zero, whatever the cache holds."""
    return model.config.model_type in ("falcon_mamba", "jamba", "mamba", "zamba")


def states(cache: Cache) -> list[int]:
    """The layers that keep a state."""
    return [i for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")]


def holds_state(cache: Cache) -> bool:
    """Whether a layer has a state to go on from."""
    return any(map(cache.has_previous_state, states(cache)))
