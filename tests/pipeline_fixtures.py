"""Tiny models, a tokenizer and text for the pipeline tests; no file and no network is needed.

Everything is deterministic in its arguments. Models are random-init but have the real module layout
of their family, so hooks, LM heads and generation behave as they do on full checkpoints.
"""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FAMILIES = ("gpt2", "llama", "qwen2")
VOCAB_SIZE = 320
HIDDEN_SIZE = 32
CONTEXT = 64
EOS = "<|endoftext|>"

_SUBJECTS = ("the tensor", "a kernel", "the index", "this model", "every row", "the gradient")
_VERBS = ("returns", "copies", "sorts", "normalises", "writes", "skips")
_OBJECTS = ("the logits", "its neighbours", "one block of keys", "a sparse target", "the mask")
_TAILS = ("in place", "before the loss", "for each token", "without a copy", "at double precision")


def tiny_documents(count: int = 24, *, sentences: int = 6, seed: int = 0) -> list[str]:
    """`count` short documents from a small grammar: repetitive enough that neighbours exist."""
    rng = random.Random(seed)
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _TAILS)
    return [
        " ".join(" ".join(map(rng.choice, parts)) + "." for _ in range(sentences))
        for _ in range(count)
    ]


@functools.cache
def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly `vocab_size` entries; eos, bos and pad are `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_documents(64, seed=1), trainer)
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS
    )


def tiny_model(
    family: str,
    *,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = HIDDEN_SIZE,
    layers: int = 2,
    context: int = CONTEXT,
    seed: int = 0,
) -> PreTrainedModel:
    """A random-init causal LM of `family` in eval mode, fp32, on the CPU."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=context,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ids,
        )
        model_class = GPT2LMHeadModel
    elif family in ("llama", "qwen2"):
        config_class = LlamaConfig if family == "llama" else Qwen2Config
        config = config_class(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            tie_word_embeddings=family == "qwen2",
            **ids,
        )
        model_class = LlamaForCausalLM if family == "llama" else Qwen2ForCausalLM
    else:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # The default init (std 0.02) makes all keys nearly equal; wider weights separate them.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_tiny_checkpoint(path: str | os.PathLike, family: str, **model_options) -> str:
    """Write model and tokenizer the way a hub checkpoint is laid out; return the directory."""
    tiny_model(family, **model_options).save_pretrained(path)
    tiny_tokenizer(model_options.get("vocab_size", VOCAB_SIZE)).save_pretrained(path)
    return str(path)


def save_tiny_pair(root: Path) -> tuple[str, str]:
    """A base and a memory of another family, saved below `root`."""
    base = save_tiny_checkpoint(root / "base", "llama")
    return base, save_tiny_checkpoint(root / "memory", "gpt2", seed=1)


def shared_data() -> Path:
    """Folder of optional real data: $MDK_SHARED_DATA, else ../shared/data next to the repo."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("MDK_SHARED_DATA", default))


def require_shared_data(relative: str) -> Path:
    """Path of one shared item, or skip the running test with the reason."""
    path = shared_data() / relative
    if not path.exists():
        pytest.skip(f"optional test data {relative!r} is not in {shared_data()} (MDK_SHARED_DATA)")
    return path
