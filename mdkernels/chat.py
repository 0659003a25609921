"""A conversation with the mixture on a terminal: reads lines, writes replies, keeps the cache."""

from __future__ import annotations

import sys

import torch
from transformers import GenerationConfig, TextStreamer

from .fast_decode import fast_decode
from .generate_checks import check_options, model_sources
from .mixture import MemoryMixture
from .mixture_cache import CACHE
from .models import end_tokens, load_tokenizer
from .train_config import DTYPES


def chat(
    base,
    memory,
    *,
    tokenizer=None,
    mix_weight=None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
) -> None:
    """Answer each line of stdin on stdout, until they end. Arguments and errors as of `generate`.

    Lines are user messages where the tokenizer has a chat template; else each is appended to the
    text so far. What the models have read stays in their cache, unless a template writes earlier
    turns otherwise than they were generated. Of the base's generation defaults only its end tokens
    count. ValueError when the context is full.
    """
    if sys.stdin is None:
        raise ValueError("stdin: is closed, but chat reads its lines from there")
    sources = model_sources(base, memory)
    tokenizer = load_tokenizer(base if tokenizer is None else tokenizer)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    checked = {"mix_weight": mix_weight, "seed": seed, "device": device, "dtype": dtype}
    place = check_options(sources, **options, **checked)
    loaded = {"mix_weight": mix_weight, "device": place, "dtype": DTYPES[dtype]}
    mixture = MemoryMixture.from_pretrained(base, memory, **loaded)
    if temperature == 0.0:
        del options["temperature"]
    else:
        options["top_k"] = 0  # transformers would keep 50
    ends = list(end_tokens(tokenizer, mixture))
    mixture.generation_config = GenerationConfig(eos_token_id=ends or None)
    options |= {"pad_token_id": ends[0] if ends else 0, "custom_generate": fast_decode}
    options |= {"return_dict_in_generate": True, "do_sample": temperature > 0.0}
    options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages, read, cache = [], [], mixture.new_cache()
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        if tokenizer.chat_template is None:
            ids = read + tokenizer("\n" * bool(read) + line, add_special_tokens=False)["input_ids"]
        else:
            form = {"add_generation_prompt": True, "return_dict": False}
            ids = tokenizer.apply_chat_template(messages, **form)
        if ids[: len(read)] != read:
            cache = mixture.new_cache()
        if temperature > 0.0:
            options["seed"] = seed + len(messages)
        output = mixture.generate(torch.tensor([ids], device=place), **{CACHE: cache}, **options)
        read = output.sequences[0].tolist()
        reply = tokenizer.decode(read[len(ids) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
