"""A base model and its memories as one Hugging Face causal LM (paper eq. 7).

    p(y | x) = (1 - sum_i w_i) p_base(y | x) + sum_i w_i p_memory_i(y | x)

Every model sees every token once and keeps its own keys and values; `mixture_cache` is the one
cache over all of them, `mixture_generation` adapts `generate`, `mixture_checks` says what is
refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from . import mixture_checks as checks
from .mix_weight import check_weights
from .mixture_cache import CACHE, MixtureCache, readable
from .mixture_config import MemoryMixtureConfig, check_temperature
from .mixture_generation import MixtureGenerationMixin, mask_of
from .models import cast_weights, load_model
from .ops.logit_mix import logit_mix
from .tokenizer_check import check_tokenizers

Weights = float | Sequence[float] | Tensor


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` of the mixture, and on request what it was mixed from."""

    logprobs: Tensor | None = None
    """(B, T', V) log p of the mixture, nats."""
    component_logprobs: tuple[Tensor, ...] | None = None
    """(B, T', V) log-probabilities of each model, base first, memories at their temperature."""


class MemoryMixture(PreTrainedModel, MixtureGenerationMixin):
    """The mixture of `base` and one or more memories; everything a causal LM does, generate first.

    Args:
        base, memory: live causal LMs on one device that share a tokenizer; `memory` may be a list,
            empty for the base alone. They are put into eval mode and shared, not copied. Padded
            vocabularies may differ in width: the mixture is over the ids that all models have, and
            logits have the base's width, -inf beyond. `base` may also be a `MemoryMixtureConfig`,
            then without a memory: random weights.
        mix_weight: the memory's share w in [0, 1] (paper's alpha); one per memory, summing to at
            most 1. Assignable: `mixture.mix_weight = 0.3`.
        memory_temperature: divides the memory logits before their softmax.

    Raises ValueError or TypeError naming what does not fit.
    """

    config_class = MemoryMixtureConfig
    base_model_prefix = "mixture"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        base: PreTrainedModel | MemoryMixtureConfig,
        memory: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
        mix_weight: float | Sequence[float] = 0.5,
        memory_temperature: float = 1.0,
    ):
        if isinstance(base, MemoryMixtureConfig):
            checks.check_config_alone(base, memory)
            config, models = base, None
        else:
            memories = list(memory) if isinstance(memory, (list, tuple)) else [memory]
            models = checks.check_models([base, *memories])
            weights = check_weights(mix_weight, len(memories)) if memories else ()
            config = MemoryMixtureConfig(
                models[0].config, [one.config for one in memories], weights, memory_temperature
            )
        attention = config._attn_implementation
        super().__init__(config)
        if models is None:
            options = {} if attention is None else {"attn_implementation": attention}
            build = AutoModelForCausalLM.from_config
            models = [build(one, **options) for one in config.models]
            config.base, *config.memories = [model.config for model in models]
        self.loss_type = "ForCausalLM"
        self.base = models[0]
        # Direct children: post_init collects tied weights from those only, not through a list.
        for i, one in enumerate(models[1:]):
            self.add_module(f"memory_{i}", one)
        # An assistant's rejected drafts cannot be taken back: generate() asks this.
        self._is_stateful = any(self.new_cache().is_stateful)
        # generate() asks the top configuration which attention runs.
        config._attn_implementation_internal = self.base.config._attn_implementation
        self.generation_config = copy.deepcopy(self.base.generation_config)
        self.post_init()
        self.eval()

    def init_weights(self) -> None:
        """Nothing: each model has initialised and tied its own, and a live one is not touched."""

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        memory: Any = None,
        *,
        mix_weight: float | Sequence[float] | None = None,
        memory_temperature: float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        **kwargs: Any,
    ) -> MemoryMixture:
        """Load base and memory, or one directory that `save_pretrained` of a mixture wrote.

        Args:
            base, memory: directories, hub ids or live models, `memory` possibly a list; their
                tokenizers are compared by content. Without a memory `base` is a saved mixture.
            mix_weight, memory_temperature: None: 0.5 and 1, or what the saved mixture has.
            device: where to put the models; None: loaded ones on the CPU, live ones stay.
            dtype: of the weights, "auto" as saved; live models keep theirs.
            kwargs: go to each model's `from_pretrained`.
        """
        chosen = {"mix_weight": mix_weight, "memory_temperature": memory_temperature}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if memory is None:
            mixture = super().from_pretrained(base, dtype=dtype, **kwargs)
            if dtype not in ("auto", None):  # each model was built in the dtype it was saved in
                cast_weights(
                    mixture, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
                )
            for name, value in chosen.items():
                setattr(mixture, name, value)
            return mixture if device is None else mixture.to(device)
        sources = [base, *(memory if isinstance(memory, (list, tuple)) else [memory])]
        check_tokenizers(sources)
        loaded = []
        for source in sources:
            stays = device is None and isinstance(source, PreTrainedModel)
            place = source.device if stays else device or "cpu"
            loaded.append(load_model(source, dtype=dtype, device=place, **kwargs))
        return cls(loaded[0], loaded[1:], **chosen)

    def save_pretrained(self, *args: Any, **kwargs: Any):
        """As of any model; `from_pretrained` and AutoModelForCausalLM load it. Each model keeps its
        dtype. AutoModelForCausalLM knows mixtures once mdkernels.mixture is imported."""
        for model in self.models:
            model.config.dtype = model.dtype
        return super().save_pretrained(*args, **kwargs)

    @property
    def models(self) -> list[PreTrainedModel]:
        """Base first."""
        return [self.base, *self.memories]

    @property
    def memories(self) -> list[PreTrainedModel]:
        return [getattr(self, f"memory_{i}") for i in range(len(self.config.memories))]

    @property
    def mix_weight(self) -> tuple[float, ...]:
        """One per memory; the base has the rest of 1."""
        return tuple(self.config.mix_weight)

    @mix_weight.setter
    def mix_weight(self, value: float | Sequence[float]) -> None:
        self.config.mix_weight = list(check_weights(value, len(self.memories)))

    @property
    def memory_temperature(self) -> float:
        return self.config.memory_temperature

    @memory_temperature.setter
    def memory_temperature(self, value: float) -> None:
        self.config.memory_temperature = check_temperature(value)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: no one matrix turns hidden states into the mixture's logits."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """Refused: resize base and memories each, before they are mixed."""
        raise ValueError("a mixture has no embeddings of its own: resize base and memories instead")

    def new_cache(self, max_cache_len: int | None = None) -> MixtureCache:
        """An empty cache over all models: dynamic, or static with room for `max_cache_len`."""
        return MixtureCache.of([model.config for model in self.models], max_cache_len)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: MixtureCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mix_weight: Weights | None = None,
        output_logprobs: bool = False,
        output_component_logprobs: bool = False,
        past_key_values: MixtureCache | None = None,
    ) -> MixtureOutput:
        """Logits of the mixture on the scale of the base's own: log p + lse(base logits).

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 0 on padding; positions count from a row's first token.
            cache: a `MixtureCache`, see `new_cache`; grows by T. `past_key_values` is its old name.
            labels: (B, T), -100 where there is none; shifted here, as Hugging Face models do.
            use_cache: None: as the base's configuration says.
            logits_to_keep: how many last positions T' to compute logits for, or which; 0: all.
            mix_weight: for this call: a number or one per memory, as the constructor's, or a
                tensor: (B,) with one memory, (memories,) with several, or (B, memories).
            output_logprobs, output_component_logprobs: fill these fields of the output.

        Returns logits (B, T', V) in fp32 (fp64 if any model's are), V the base's width, and with
        labels the mean negative log-likelihood in nats. Equivalent to softmax-mixing the models'
        logits over the common ids. Differentiable. Raises ValueError or TypeError.
        """
        checks.check_forward(self, input_ids, labels, logits_to_keep)
        cache = checks.check_cache(cache if cache is not None else past_key_values, self.models)
        if use_cache is None:
            use_cache = cache is not None or getattr(self.config.base, "use_cache", True)
        if use_cache and cache is None:
            cache = self.new_cache()
        views = cache.views if use_cache and cache is not None else [None] * len(self.models)
        checks.check_restarts(self.models, views, input_ids.shape[1])
        padded = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        if position_ids is None and padded:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = positions[:, -input_ids.shape[1] :]
        logits = []
        for i, (model, view) in enumerate(zip(self.models, views, strict=True)):
            output = model(
                input_ids=input_ids,
                attention_mask=readable(mask_of(i, attention_mask), view, input_ids.shape[1]),
                position_ids=position_ids,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE: view},
            )
            logits.append(output.logits)
        if use_cache:
            cache.count(input_ids.shape[1])
        weights = checks.weights_of_rows(self, mix_weight, *logits[0].shape[:2])
        mixed = self._mix(logits, weights, "base")
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=mixed.shape[-1])
        return MixtureOutput(
            loss=loss,
            logits=mixed,
            logprobs=self._mix(logits, weights, "logprob") if output_logprobs else None,
            component_logprobs=self._components(logits) if output_component_logprobs else None,
            **{CACHE: cache if use_cache else None},
        )

    def _mix(self, logits: list[Tensor], weights: list[float] | Tensor, scale: str) -> Tensor:
        # Ids that only the wider model has are padding rows, and no input for the other model.
        width = min(one.shape[-1] for one in logits)
        base, *memories = [one[..., :width].flatten(0, 1) for one in logits]
        options = {"memory_temperature": self.config.memory_temperature, "scale": scale}
        if not memories:
            memories, weights = [base], [0.0]
        mixed = logit_mix(base, memories, weights, **options)
        return _widen(mixed.unflatten(0, logits[0].shape[:2]), logits[0].shape[-1])

    def _components(self, logits: list[Tensor]) -> tuple[Tensor, ...]:
        width = min(one.shape[-1] for one in logits)
        found = []
        for i, one in enumerate(logits):
            wide = torch.promote_types(one.dtype, torch.float32)
            scaled = one[..., :width].to(wide)
            if i > 0:
                scaled = scaled / self.config.memory_temperature
            found.append(_widen(scaled.log_softmax(-1), logits[0].shape[-1]))
        return tuple(found)


def _widen(values: Tensor, width: int) -> Tensor:
    """-inf for the ids beyond, so that they are never chosen."""
    missing = width - values.shape[-1]
    return F.pad(values, (0, missing), value=-torch.inf) if missing else values


AutoModelForCausalLM.register(MemoryMixtureConfig, MemoryMixture, exist_ok=True)
