"""A base model and its memories decoding as one next-token distribution (paper eq. 7).

    p(y | x) = (1 - sum_i w_i) p_base(y | x) + sum_i w_i p_memory_i(y | x)

Each model keeps its own KV cache and sees every token once; per step only the last position's
logits exist, and one fused op turns them into the next token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .mix_weight import check_weights
from .models import load_model, model_id
from .ops.mix_argmax import mix_argmax
from .ops.mix_sample import mix_sample
from .tokenizer_check import check_tokenizers
from .train_config import DTYPES, resolve_device

TokenHook = Callable[[Tensor], None]


class MemoryMixture:
    """Decodes from the mixture of `base` and one or more memories.

    Args:
        base, memory: live causal LMs on one device that share a tokenizer; `memory` may be a list,
        or
            empty for the base alone. Padded vocabularies may differ in width.
        mix_weight: the memory's share w in [0, 1] (paper's alpha); one per memory, summing to at
        most 1.
        memory_temperature: divides the memory logits before their softmax.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        memory: PreTrainedModel | Sequence[PreTrainedModel],
        mix_weight: float | Sequence[float] = 0.5,
        memory_temperature: float = 1.0,
    ):
        self.base = base.eval()
        memories = list(memory) if isinstance(memory, (list, tuple)) else [memory]
        self.memories = [m.eval() for m in memories]
        self.weights = check_weights(mix_weight, len(memories)) if memories else ()
        if not memory_temperature > 0.0:
            raise ValueError(f"memory_temperature must be > 0, got {memory_temperature}")
        self.memory_temperature = memory_temperature
        for model in self.memories:
            if model.device != base.device:
                raise ValueError(
                    f"memory {model_id(model)} is on {model.device}, base {model_id(base)} on "
                    f"{base.device}; move them to one device"
                )

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        memory,
        *,
        mix_weight: float | Sequence[float] = 0.5,
        memory_temperature: float = 1.0,
        device: str = "auto",
        dtype: str = "float32",
    ) -> MemoryMixture:
        """Load base and memory: directories, hub ids or live models, of one tokenizer."""
        memories = list(memory) if isinstance(memory, (list, tuple)) else [memory]
        check_tokenizers([base, *memories])
        options = {"dtype": DTYPES[dtype], "device": resolve_device(device)}
        loaded = [load_model(source, **options) for source in [base, *memories]]
        return cls(loaded[0], loaded[1:], mix_weight, memory_temperature)

    @torch.inference_mode()
    def generate(
        self,
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
            attention_mask: (B, T), 0 on padding; None: no padding. A padded row decodes exactly as
            it
                would alone.
            temperature: of the mixture; 0 is greedy decoding, which ignores the next four.
            top_k, top_p, min_p: truncate the mixture before sampling; 0, 1 and 0 leave it whole.
            seed: an int, from which each row gets a stream by its place in the batch, or (B,) int64
                seeds; a row with a seed of its own draws the same tokens in any batch.
            eos_token_id: ends a row; the end of the batch is the end of its last row.
            pad_token_id: fills rows that ended early; None: the eos token.
            on_token: called with each (B,) of new tokens.

        Returns (B, T + n) int64 with 1 <= n <= max_new_tokens. Raises ValueError, before any
        compute, for an empty prompt, right padding, or a prompt that with max_new_tokens exceeds a
        context.
        """
        mask = self._check(input_ids, attention_mask, max_new_tokens)
        sampling = _check_sampling(temperature, top_k, top_p, min_p)
        pad = eos_token_id if pad_token_id is None else pad_token_id
        models = [self.base, *self.memories]
        caches = [DynamicCache(config=model.config) for model in models]
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens, step_ids = input_ids, input_ids
        for step in range(max_new_tokens):
            logits = [
                _last_logits(model, step_ids, mask, cache)
                for model, cache in zip(models, caches, strict=True)
            ]
            picked = self._pick(logits, sampling, seed, step)
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
        self, logits: list[Tensor], sampling: dict | None, seed: int | Tensor, step: int
    ) -> Tensor:
        # Ids that only the wider model has are padding rows, and no input for the other model.
        width = min(one.shape[1] for one in logits)
        base, *memories = [one[:, :width] for one in logits]
        weights = list(self.weights)
        if not memories:
            memories, weights = [base], [0.0]
        mix = {"memory_temperature": self.memory_temperature}
        if sampling is None:
            return mix_argmax(base, memories, weights, **mix)
        return mix_sample(base, memories, weights, seeds=seed, offsets=step, **sampling, **mix)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, new: int) -> Tensor | None:
        """The mask to use: None when nothing is padded, which lets attention skip it."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(
                f"input_ids: expected (batch, length) int64, got {tuple(input_ids.shape)} "
                f"{input_ids.dtype}"
            )
        if input_ids.numel() == 0:
            raise ValueError("input_ids: the prompt is empty; give at least one token per row")
        if not isinstance(new, int) or new < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {new!r}")
        for model in [self.base, *self.memories]:
            context = getattr(model.config, "max_position_embeddings", None)
            # The last new token is never read.
            if context is not None and input_ids.shape[1] + new - 1 > context:
                raise ValueError(
                    f"input_ids: {input_ids.shape[1]} prompt tokens and {new} new ones do not fit "
                    f"the context of {model_id(model)}, {context}; shorten one of them"
                )
            rows = model.get_input_embeddings().weight.shape[0]
            if int(input_ids.max()) >= rows or int(input_ids.min()) < 0:
                raise ValueError(
                    f"input_ids: values span [{int(input_ids.min())}, {int(input_ids.max())}], "
                    f"model {model_id(model)} knows [0, {rows})"
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
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


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
