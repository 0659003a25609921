"""The demo's inputs: harvested docstrings -> JSON lines, a tokenizer, four corpora."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import __version__
from ..corpus import SEPARATOR, Corpus, build_corpus, open_corpus
from ..models import load_tokenizer
from .harvest import DOMAIN_PACKAGE, GENERAL_PACKAGES, File, harvest
from .recipe import Recipe
from .reuse import Stages

TEXTS = ("general", "train", "valid", "test")


def build_text(recipe: Recipe, stages: Stages) -> tuple[dict[str, Corpus], PreTrainedTokenizerBase]:
    """Run the stages text, tokenizer and corpus-*; returns the corpora by name, the tokenizer."""
    work = stages.work
    stages.run("text", write_texts, check_texts, settings=package_versions())
    texts = work / "text"
    tokenizer = stages.run(
        "tokenizer",
        lambda path: train_tokenizer(texts, path, recipe.vocab_size),
        load_tokenizer,
        settings=recipe.vocab_size,
        after=("text",),
    )
    corpora = {}
    limits = {
        "general": None,
        "domain": recipe.domain_tokens,
        "valid": recipe.valid_tokens,
        "test": recipe.test_tokens,
    }
    for name, limit in limits.items():
        source = texts / ("train.jsonl" if name == "domain" else f"{name}.jsonl")
        corpora[name] = stages.run(
            f"corpus-{name}",
            lambda path, s=source, n=limit: write_corpus(s, tokenizer, path, n),
            open_corpus,
            settings=limit,
            after=("text", "tokenizer"),
        )
    return corpora, tokenizer


def package_versions() -> dict[str, str]:
    """What decides the harvested text."""
    names = [name for name in (*GENERAL_PACKAGES, DOMAIN_PACKAGE) if name != "stdlib"]
    versions = {name: version(name) for name in names}
    return versions | {"python": platform.python_version(), "mdkernels": __version__}


def write_texts(path: Path) -> str:
    """Harvest, and write one JSON line per docstring to general, train, valid and test.jsonl."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    found = harvest()
    groups = {"general": found.general, **found.splits}
    for name in TEXTS:
        _write_lines(path / f"{name}.jsonl", groups[name])
    chars = {name: sum(file.num_chars for file in groups[name]) for name in TEXTS}
    domain = sum(chars[name] for name in TEXTS[1:])
    dropped = sum(found.dropped.values())
    return (
        f"{chars['general'] / 1e6:.1f} MB general, {domain / 1e6:.1f} MB domain, "
        f"{dropped:,} near-duplicates dropped"
    )


def check_texts(path: Path) -> Path:
    for name in TEXTS:
        (path / f"{name}.jsonl").stat()
    return path


def _write_lines(path: Path, files: list[File]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for file in files:
            for text in file.docstrings:
                stream.write(json.dumps({"text": text, "source": file.name}) + "\n")


def documents(path: Path) -> Iterator[str]:
    """The texts of a JSON lines file, in order."""
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]


def train_tokenizer(texts: Path, out: Path, vocab_size: int) -> str:
    """A byte-level BPE of general and domain-train text; valid and test stay unseen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = (text for name in ("general", "train") for text in documents(texts / f"{name}.jsonl"))
    tokenizer.train_from_iterator(seen, trainer)
    settings: dict[str, Any] = {"eos_token": SEPARATOR, "bos_token": SEPARATOR}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(out)
    return f"byte-level BPE of {tokenizer.get_vocab_size():,} tokens"


def write_corpus(
    source: Path, tokenizer: PreTrainedTokenizerBase, out: Path, num_tokens: int | None
) -> str:
    """The corpus of `source`, or of its first documents with at least `num_tokens` tokens."""
    if num_tokens is None:
        corpus = build_corpus(source, tokenizer, out, overwrite=True)
    else:
        prefix = take_documents(documents(source), tokenizer, num_tokens)
        corpus = build_corpus(prefix, tokenizer, out, as_text=True, overwrite=True)
    count = len(corpus.document_offsets) - 1
    return f"{corpus.num_rows:,} rows, {count:,} documents"


def take_documents(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> list[str]:
    """Documents from the front of `texts` until they hold `num_tokens` tokens (eos included)."""
    taken, total = [], 0
    for text in texts:
        if total >= num_tokens:
            break
        taken.append(text)
        total += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    return taken


def choose_prompts(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int,
    truth_tokens: int,
    count: int,
) -> tuple[list[str], list[str]]:
    """Openings of the first `count` documents that are long enough, and how they go on."""
    prompts, truths = [], []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= prompt_tokens + truth_tokens:
            prompts.append(tokenizer.decode(ids[:prompt_tokens]))
            truths.append(tokenizer.decode(ids[prompt_tokens : prompt_tokens + truth_tokens]))
        if len(prompts) == count:
            break
    return prompts, truths
