"""What `GenerationMixin.generate` has to know of a mixture: its cache, its masks, its weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from . import mixture_checks as checks
from .mixture_cache import CACHE, MixtureCache, attends, readable


class MixtureGenerationMixin(GenerationMixin):
    """The part of `MemoryMixture` that generate() calls. Nothing of a decoding mode is here."""

    def generate(self, inputs: Tensor | None = None, generation_config=None, *args, **kwargs):
        """`GenerationMixin.generate`, after checks. Also takes `mix_weight`, as `forward` does:
        per row of `inputs`, whatever the number of beams or returned sequences. With a compiled
        step it is an input, where each value assigned to `mixture.mix_weight` compiles anew.

        Raises ValueError, before any compute, for a prompt that is empty, all padding or longer
        than a context, and for options that would be ignored.
        """
        kwargs = checks.check_generate(self, inputs, generation_config, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any):
        """Refused: continuous batching pages one cache of one shape of heads."""
        raise ValueError(checks.NO_CONTINUOUS_BATCHING)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Refused, as `generate_batch`."""
        raise ValueError(checks.NO_CONTINUOUS_BATCHING)

    continuous_batching_context_manager = init_continuous_batching

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, tokenizer=None, assistant_tokenizer=None, **kwargs: Any
    ) -> dict[str, Any]:
        """As of any model; generate() hands tokenizers on to here, which forward has no use for."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def create_masks_for_generate(
        self, config, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> dict[str, Any]:
        """4-D masks per model, made outside the compiled step: a 2-D mask grows with each token."""
        masks: dict[str, Any] = {}
        for i, (model, view) in enumerate(zip(self.models, kwargs[CACHE].views, strict=True)):
            if not attends(view):  # one mask for all layers, which does not grow
                masks[f"{i}."] = readable(attention_mask, view, inputs_embeds.shape[1])
                continue
            make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
            options = {**kwargs, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            mask = make(config=model.config, **{**options, CACHE: view})
            # Flat, as generate() expects: some families have one mask per kind of layer.
            named = mask if isinstance(mask, dict) else {"": mask}
            masks |= {f"{i}.{kind}": one for kind, one in named.items()}
        return masks

    def _extract_generation_mode_kwargs(
        self, custom_generate, kwargs, synced_gpus, assistant_model, streamer
    ) -> dict[str, Any]:
        found = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if callable(custom_generate):  # gets none of these from transformers, silently
            known = inspect.signature(custom_generate).parameters
            given = {
                "synced_gpus": synced_gpus,
                "assistant_model": assistant_model,
                "streamer": streamer,
            }
            for name, value in given.items():
                if value is not None and name not in known:
                    raise ValueError(f"{name}: custom_generate takes no such argument")
                if value is not None:
                    found[name] = value
        return found

    def _validate_generated_length(self, generation_config, input_ids_length, *args) -> None:
        generation_config._prompt_length = input_ids_length
        super()._validate_generated_length(generation_config, input_ids_length, *args)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        checks.check_prepared(self, generation_config, model_kwargs)
        if model_kwargs.get(CACHE) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
            return
        caches = []
        for model in self.models:
            own: dict[str, Any] = {}
            model._prepare_cache_for_generation(generation_config, own, *args)
            caches.append(own.get(CACHE))
        if None not in caches:
            model_kwargs[CACHE] = MixtureCache(caches)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any):
        # An assistant is a model of its own: it knows nothing of weights.
        kept = {name: value for name, value in model_kwargs.items() if name != "mix_weight"}
        return super()._get_candidate_generator(*args, model_kwargs=kept, **kwargs)


def mask_of(i: int, masks: Tensor | dict[str, Any] | None) -> Any:
    """Model i's part of what `create_masks_for_generate` made; anything else is for all."""
    if not isinstance(masks, dict):
        return masks
    own = {name.split(".", 1)[1]: one for name, one in masks.items() if name.startswith(f"{i}.")}
    return own.get("", own)
