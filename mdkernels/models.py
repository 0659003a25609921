"""Loading base, memory and key models, and the few things the pipeline asks of one.

A model is any Hugging Face causal LM; only the key hook needs to know its family.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import convert_slow_tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .artifact import PARTIAL, ArtifactError

# config.model_type -> the list of blocks; each block's feed-forward part is its `.mlp`.
_BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}


def load_model(
    name: str | os.PathLike | PreTrainedModel,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """Load a causal LM from a local directory or hub id, in eval mode, on `device`.

    A loaded model is returned as it is (eval mode, moved). `dtype="auto"` keeps the checkpoint's.
    `options` go to `from_pretrained`. Raises ValueError naming `name` when it cannot be loaded.
    """
    if isinstance(name, PreTrainedModel):
        return name.to(device).eval()
    load = AutoModelForCausalLM.from_pretrained
    return _load("model", load, name, dtype=dtype, **options).to(device).eval()


def plain_model(model):
    """The Hugging Face model in a peft wrapper, with its adapters in place; any other as it is.
    Raises ValueError where the wrapper itself takes part, as in prompt tuning."""
    if not hasattr(model, "get_base_model"):
        return model
    inner = model.get_base_model()
    if inner is model.base_model:
        raise ValueError(
            f"model {model_id(model)}: its {type(model).__name__} adds a learned prompt, which its "
            "layers alone do not have; pass adapters in layers (LoRA), or a model without"
        )
    return inner


def check_source(name: str, source: Any) -> None:
    """Raise TypeError unless a model could be `source` or be loaded from it."""
    if not isinstance(source, (str, os.PathLike, nn.Module)):
        raise TypeError(
            f"{name}: expected a directory, a hub id or a live model, got {type(source).__name__}"
        )


def merge_hint(model: Any) -> str:
    """The end of a message that refuses `model`: what to do if it is one of peft."""
    wrapped = hasattr(model, "get_base_model")
    return "; pass model.merge_and_unload(), which has the adapters added in" if wrapped else ""


def load_config(name: str | os.PathLike | PreTrainedModel) -> PreTrainedConfig:
    """The configuration of a local directory, hub id or live model, without any weights."""
    if isinstance(name, PreTrainedModel):
        return name.config
    return _load("model", AutoConfig.from_pretrained, name)


def load_tokenizer(
    name: str | os.PathLike | PreTrainedTokenizerBase, **options: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or hub id; a loaded one is returned as it is.

    A checkpoint that names no model's tokenizer class gets exactly what its tokenizer.json says.
    (AutoTokenizer gives some families, Qwen2 among them, their own pre-tokeniser all the same.)
    """
    if isinstance(name, PreTrainedTokenizerBase):
        return name
    declared = _load("tokenizer", get_tokenizer_config, name).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    return _load("tokenizer", loader.from_pretrained, name, **options)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` the floating dtype as `from_pretrained(dtype=...)` does: what it computes for
    itself, such as rotary frequencies, keeps its precision, which `model.to(dtype)` would take."""
    for module in model.modules():
        computed = module._non_persistent_buffers_set
        saved = {name: x for name, x in module._buffers.items() if name not in computed}
        for value in [*module._parameters.values(), *saved.values()]:
            if value is not None and value.is_floating_point():
                value.data = value.data.to(dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout within the context; `model.training` is restored, whatever is raised."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The output embedding, (V, D), with or without bias."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model {model_id(model)}: its LM head is {head!r}, expected a linear layer"
            + ("; pass one of mixture.models" if hasattr(model, "mix_weight") else "")
        )
    return head


def key_module(model: PreTrainedModel) -> nn.Module:
    """The last block's MLP, whose input is the datastore key (official code: `last_ffn_input`).

    Raises ValueError for a family without an entry, listing those that have one.
    """
    family = model.config.model_type
    if family not in _BLOCKS:
        raise ValueError(
            f"model {model_id(model)}: no key position is known for model_type {family!r}; "
            f"use a key model of one of {sorted(_BLOCKS)}"
        )
    return model.get_submodule(_BLOCKS[family])[-1].mlp


@contextmanager
def capture_keys(model: PreTrainedModel) -> Iterator[Callable[[], Tensor]]:
    """Yield a call that returns the (B, T, D) keys of the latest forward pass, once."""
    latest: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = [inputs[0].detach()]

    handle = key_module(model).register_forward_pre_hook(keep)
    try:
        yield latest.pop
    finally:
        handle.remove()


def model_id(model: PreTrainedModel) -> str:
    """Hub id or directory the model came from; its class name for one built in memory."""
    return model.config.name_or_path or type(model).__name__


def model_hash(model: PreTrainedModel) -> str:
    """Digest of family, parameter names, shapes, dtypes and values; tied parameters count once."""
    digest = blake2b(model.config.model_type.encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
        header = [name, list(parameter.shape), str(parameter.dtype), zlib.crc32(data)]
        digest.update(json.dumps(header).encode())
    return digest.hexdigest()


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """What ends a text: the tokenizer's eos first, and what the model's generation config names
    beside it (an instruction-tuned one often has an end of turn and an end of text)."""
    if tokenizer.eos_token_id is None:
        return ()
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    # A config without the tokenizer's eos was left at the defaults of its family.
    others = named if tokenizer.eos_token_id in named else []
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *others]))


def tokenizer_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1; models may have more embedding rows, never fewer."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids: vocabulary, merges, added tokens, normalisation.

    Independent of path, of slow or fast loading, and of things that leave the ids of a text alone:
    chat template, padding, truncation, decoder, which token serves as eos or pad.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) or convert_slow_tokenizer(tokenizer)
    spec = json.loads(backend.to_str())
    model = spec["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in model.get("merges") or []]
    tables = {"vocab", "merges"}
    # Absent, null, false and "" mean the same here, and loaders differ in which one they write.
    settings = {key: value for key, value in model.items() if key not in tables and value}
    if not isinstance(model["vocab"], dict):  # unigram: scores in id order
        settings["pieces"] = model["vocab"]
    flags = ("content", "id", "single_word", "lstrip", "rstrip")
    added = sorted([token[flag] for flag in flags] for token in spec["added_tokens"])
    vocab = sorted(backend.get_vocab(with_added_tokens=True).items())
    parts = [settings, vocab, merges, added, spec["normalizer"], spec["pre_tokenizer"]]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _holds_tokenizer(directory: Path) -> bool:
    names = ("tokenizer*", "vocab*", "merges.txt", "*.model")
    return any(True for name in names for _ in directory.glob(name))


def _load(what: str, load: Callable[..., Any], name: str | os.PathLike, **options: Any) -> Any:
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            f"{what}: expected a directory, a hub id or a live {what}, got {type(name).__name__}"
            + merge_hint(name)
        )
    path = Path(name)
    partial = Path(f"{path}{PARTIAL}")
    if not path.exists() and partial.is_dir():
        raise ArtifactError(
            f"no model at {path}: an unfinished run left {partial}; the same `mdkernels train` "
            "again continues it, and its checkpoints are models too"
        )
    try:
        return load(os.fspath(name), **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if what == "tokenizer" and path.is_dir() and not _holds_tokenizer(path):
            raise ValueError(
                f"tokenizer: {path} holds none; put one there with tokenizer.save_pretrained, or "
                "where that is an option, name another directory or hub id (--tokenizer)"
            ) from error
        missing = "" if path.exists() else "there is no such directory; as a hub id: "
        raise ValueError(
            f"cannot load a {what} from {os.fspath(name)!r}: {missing}{str(error).rstrip('.')}. "
            "Pass a local directory in the Hugging Face layout or a hub id"
        ) from error
