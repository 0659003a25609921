"""A mixture in EleutherAI's lm-evaluation-harness. Needs lm-eval.

The harness itself would take the log-softmax of (batch, length, vocabulary) logits; here it gets
its two numbers per continuation from `mixture_scoring`. Importing this module registers the model
"mdkernels"; ``python -m mdkernels.integrations.lm_eval`` is `lm_eval` with it registered.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..mixture import MemoryMixture
from ..mixture_scoring import MixtureScorer
from ..models import load_tokenizer
from ..train_config import resolve_device


@register_model("mdkernels")
class MixtureLM(HFLM):
    """An lm-eval model over a `MemoryMixture`: all three kinds of requests.

    Args:
        mixture: a live mixture, which needs a `tokenizer` and takes none of the next six.
        base, memory, mix_weight, memory_temperature, dtype: as `MemoryMixture.from_pretrained`;
            without a memory `base` is a saved mixture.
        device: None or "auto" (a GPU if there is one), "cpu", "cuda", ... "cuda:0", which is what
            `lm_eval` passes unless told otherwise, is the CPU where there is no GPU.
        tokenizer: None: that of `base`.
        max_length: tokens of context and continuation; None: the shortest context of the models.
        batch_size: sequences per forward pass, or "auto".
        options: `add_bos_token`, `prefix_token_id`, `truncation`, `max_batch_size`,
            `chat_template_args`, `enable_thinking`, `think_end_token`, as `HFLM` takes them.

    Log-likelihoods are in nats, summed in fp64. Raises ValueError or TypeError for what does not
    fit, and for more than one process.
    """

    def __init__(
        self,
        mixture: MemoryMixture | None = None,
        *,
        base: Any = None,
        memory: Any = None,
        mix_weight: Any = None,
        memory_temperature: float | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ):
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(f"MixtureLM takes no {', '.join(unknown)}; see its documentation")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "MixtureLM runs in one process, WORLD_SIZE is "
                f"{os.environ['WORLD_SIZE']}; raise batch_size instead"
            )
        if (mixture is None) == (base is None):
            raise ValueError("give one of mixture, a live MemoryMixture, and base")
        if mixture is None:
            tokenizer = load_tokenizer(base if tokenizer is None else tokenizer)
            mixture = MemoryMixture.from_pretrained(
                base,
                memory,
                mix_weight=mix_weight,
                memory_temperature=memory_temperature,
                device=_device(device),
                dtype=dtype,
            )
        else:
            given = {"memory": memory, "mix_weight": mix_weight, "device": device}
            given |= {"memory_temperature": memory_temperature, "dtype": dtype}
            for name, value in given.items():
                if value not in (None, "auto"):
                    raise ValueError(f"{name}: a live mixture stays as it is; leave it out")
            if tokenizer is None:
                raise ValueError("tokenizer: needed with a live mixture, which carries none")
            tokenizer = load_tokenizer(tokenizer)
        self.scorer = MixtureScorer(mixture)
        super().__init__(
            pretrained=mixture,
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length or self.scorer.context,
            batch_size=batch_size,
            **options,
        )

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
            batch_size = self._detect_batch_size([longest])
        scores = self.scorer.scores(
            pairs, batch_size=batch_size, max_length=self.max_length, progress=not disable_tqdm
        )
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:  # windows of a longer text: the caller caches their sum
                self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [tuple(score) for score in scores]

    def tok_batch_encode(self, strings, *args: Any, **options: Any):
        """An empty prompt is continued from the prefix token, as its log-likelihoods are."""
        prefix = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
        strings = [one if self.tok_encode(one) else prefix for one in strings]
        return super().tok_batch_encode(strings, *args, **options)

    def _model_generate(self, context, max_length: int, stop: list[str], **options: Any):
        """Greedy tasks may carry sampling options; a mixture refuses what it would ignore."""
        if options.get("do_sample") is False:
            options = {k: v for k, v in options.items() if k not in _OF_SAMPLING}
        return super()._model_generate(context, max_length, stop, **options)


def _device(name: str | None) -> torch.device:
    if name == "cuda:0" and not torch.cuda.is_available():
        _log.warning("no CUDA device is visible to torch: the mixture runs on the CPU")
        name = "cpu"
    return resolve_device("auto" if name is None else name)


_log = logging.getLogger(__name__)
_OPTIONS = {
    "add_bos_token",
    "prefix_token_id",
    "truncation",
    "max_batch_size",
    "chat_template_args",
    "enable_thinking",
    "think_end_token",
}
_OF_SAMPLING = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p"}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
