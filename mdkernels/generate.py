"""Text from the mixture, token by token, optionally beside what the base alone would write."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .decode import decode
from .generate_checks import check_options, model_sources
from .mixture import MemoryMixture
from .models import end_tokens, load_tokenizer
from .train_config import DTYPES


def generate(
    base,
    memory,
    prompts: str | Sequence[str],
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    mix_weight: float | Sequence[float] | None = None,
    memory_temperature: float | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    draft_tokens: int | str = 0,
    side_by_side: bool = False,
    stream: TextIO | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Continue each prompt; one dict per prompt with `prompt`, `mixture` and maybe `base`.

    Args:
        base, memory: directories, hub ids or live models with one tokenizer; `memory` may be a
            list, or None with the directory of a saved mixture as `base`.
        prompts: one text or several, decoded as one batch. The text is tokenised without special
            tokens, as the corpus was.
        tokenizer: None: that of `base`, which must then be a directory or hub id.
        mix_weight, memory_temperature: see `MemoryMixture`. None: 0.5 and 1, or what the saved
            mixture has.
        max_new_tokens, temperature, top_k, top_p, min_p, seed, draft_tokens: see `decode`; the base
            alone has no drafts.
        side_by_side: also decode with the base alone, from the same random streams.
        stream: where to write the text while it is made (one prompt only), for example sys.stdout.
        dtype: "float32" or "bfloat16" weights; live models keep theirs.

    Texts end before an end token, see `end_tokens`. Raises ValueError before loading a model or
    writing to `stream`: for an empty prompt, naming it, for one that with `max_new_tokens` exceeds
    a context, for values that `MemoryMixture` and `decode` refuse, and for top_k, top_p and min_p
    at temperature 0, which would ignore them.
    """
    sources = model_sources(base, memory)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if tokenizer is None and isinstance(base, torch.nn.Module):
        raise ValueError("tokenizer: needed with a live base model, which carries none")
    tokenizer = load_tokenizer(base if tokenizer is None else tokenizer)
    for text in texts:
        if not text.isascii() and text != text.encode(errors="ignore").decode():
            raise ValueError(f"prompts: {text!r} is not UTF-8 text")
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if not encoded:
        raise ValueError("prompts: got none; give at least one")
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompts: {text!r} is empty; a model continues at least one token")
    if stream is not None and len(texts) > 1:
        raise ValueError(f"stream: shows one prompt, got {len(texts)}; generate them one by one")
    place = check_options(
        sources,
        mix_weight=mix_weight,
        memory_temperature=memory_temperature,
        prompt_tokens=max(map(len, encoded)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        draft_tokens=draft_tokens,
        device=device,
        dtype=dtype,
    )

    mixture = MemoryMixture.from_pretrained(
        base,
        memory,
        mix_weight=mix_weight,
        memory_temperature=memory_temperature,
        device=place,
        dtype=DTYPES[dtype],
    )
    ends = end_tokens(tokenizer, mixture)
    models = {"mixture": mixture}
    if side_by_side:
        models = {"base": MemoryMixture(mixture.base, []), **models}
    input_ids, mask = _left_pad(encoded, mixture.base.device)
    results: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    for name, model in models.items():
        printer = None
        if stream is not None:
            printer = _Printer(tokenizer, encoded[0], ends, stream, f"--- {name}\n{texts[0]}")
        tokens = decode(
            model,
            input_ids,
            mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            draft_tokens=draft_tokens if name == "mixture" else 0,
            eos_token_id=ends,
            on_token=printer,
        )
        if printer is not None:
            printer.close()
        new = tokens[:, input_ids.shape[1] :].tolist()
        for result, prompt_ids, ids in zip(results, encoded, new, strict=True):
            result[name] = _continuation(tokenizer, prompt_ids, ids, ends)
    return results


class _Printer:
    """Writes text as tokens arrive, holding back bytes that are not yet a whole character.

    `header` comes before the first of them: a refused option leaves nothing on the stream.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[int],
        ends: tuple[int, ...],
        stream: TextIO,
        header: str,
    ):
        self.decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.ends, self.stream, self.header = ends, stream, header
        self.ids, self.ended = list(prompt_ids), False
        # Of the ids up to `shown` the text is written; those from `begin` on are decoded with what
        # follows, as a SentencePiece tokenizer would drop the first space of a text.
        self.begin, self.shown = 0, len(prompt_ids)

    def __call__(self, picked: Tensor) -> None:
        token = int(picked[0])
        self.ended = self.ended or token in self.ends
        if not self.ended:
            self.ids.append(token)
            text = self._text()
            if not text.endswith("\ufffd"):
                self._write(text)
                self.begin, self.shown = self.shown, len(self.ids)

    def _text(self) -> str:
        before = self.decode(self.ids[self.begin : self.shown])
        return self.decode(self.ids[self.begin :])[len(before) :]

    def _write(self, text: str) -> None:
        self.stream.write(self.header + text)
        self.header = ""
        self.stream.flush()

    def close(self) -> None:
        self._write(self._text())
        self.stream.write("\n")


def _continuation(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    new_ids: list[int],
    ends: tuple[int, ...],
) -> str:
    """The text of `new_ids` up to the first of `ends`, as it reads after the prompt.

    Decoded together with the prompt: alone, a SentencePiece tokenizer would drop its first space.
    """
    kept = list(itertools.takewhile(lambda token: token not in ends, new_ids))
    options = {"clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt_ids, **options)
    return tokenizer.decode(prompt_ids + kept, **options)[len(before) :]


def _left_pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask; what fills the padding is never read."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
