"""The configuration of a mixture: those of its models, the weights and the temperature."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .mix_weight import check_weights
from .models import load_config
from .ops.checks import number
from .ops.logit_mix.arguments import TEMPERATURE_RANGE


class MemoryMixtureConfig(PreTrainedConfig):
    """What `MemoryMixture.save_pretrained` writes as config.json.

    Args:
        base: the base model's configuration, or its dict; `memories`: one per memory.
        mix_weight: share of each memory, see `MemoryMixture`.
        memory_temperature: divides the memory logits before their softmax.

    Sub-configurations are kept as they are, never rebuilt: Hugging Face's own composite
    configurations reset the attention implementation of a live model's configuration.
    """

    model_type = "memory_mixture"
    has_no_defaults_at_init = True

    def __init__(
        self,
        base: PreTrainedConfig | dict | None = None,
        memories: Sequence[PreTrainedConfig | dict] = (),
        mix_weight: Sequence[float] = (),
        memory_temperature: float = 1.0,
        **kwargs: Any,
    ):
        self.base = _as_config(base)
        self.memories = [_as_config(memory) for memory in memories]
        self.mix_weight = list(check_weights(mix_weight, len(self.memories)))
        self.memory_temperature = check_temperature(memory_temperature)
        for derived in ("vocab_size", "max_position_embeddings"):
            kwargs.pop(derived, None)  # of a plain model's config.json; MemoryMixture refuses it
        super().__init__(**kwargs)

    @property
    def models(self) -> list[PreTrainedConfig]:
        """Base first."""
        return [self.base, *self.memories]

    @property
    def vocab_size(self) -> int:
        """Width of the mixture's logits: the base's."""
        return self.base.vocab_size

    @property
    def max_position_embeddings(self) -> int | None:
        """The shortest context of all models; None where none states one."""
        known = [length for length in map(context_length, self.models) if length is not None]
        return min(known, default=None)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's: the mixture's logits have its width and scale."""
        return self if self.base is None else self.base.get_text_config(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        plain = copy.copy(self)
        plain.base, plain.memories = None, []
        output = PreTrainedConfig.to_dict(plain)
        return {
            **output,
            "base": None if self.base is None else _as_dict(self.base),
            "memories": [_as_dict(memory) for memory in self.memories],
        }


def check_temperature(memory_temperature: float) -> float:
    low, high = TEMPERATURE_RANGE
    memory_temperature = number("memory_temperature", memory_temperature)
    if not low <= memory_temperature <= high:
        raise ValueError(
            f"memory_temperature must be > 0, within [{low:g}, {high:g}], got {memory_temperature}"
        )
    return memory_temperature


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model can read; None when its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def is_mixture(source: Any) -> bool:
    """Whether a directory, hub id or live model is a mixture. No weights are loaded."""
    return isinstance(load_config(source), MemoryMixtureConfig)


def _as_config(config: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
    if not isinstance(config, dict):
        return config
    fields = dict(config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _as_dict(config: PreTrainedConfig) -> dict[str, Any]:
    output = config.to_dict()
    output.pop("transformers_version", None)
    return output


AutoConfig.register(MemoryMixtureConfig.model_type, MemoryMixtureConfig, exist_ok=True)
