"""Perplexity of base, memory and mixture from one pass per model.

Each model is read once for the log-probability of the right token at every position. The mix weight
is fitted on a validation corpus and reported on the test corpus, with a bootstrap interval of the
gain.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import sync_path
from .corpus import Corpus, open_corpus
from .mix_weight import (
    check_weights,
    fit_mix_weight,
    mixture_logprobs,
    paired_interval,
    weight_curve,
)
from .models import load_model, model_id
from .scoring import gold_logprobs, knn_logprobs
from .tokenizer_check import check_tokenizers
from .train_config import DTYPES, resolve_device

__all__ = ["MixtureEval", "evaluate", "gold_logprobs", "knn_logprobs"]


def evaluate(
    base,
    memory,
    corpus: Corpus | str | os.PathLike,
    *,
    valid: Corpus | str | os.PathLike | None = None,
    mix_weight: float | Sequence[float] | None = None,
    out: str | os.PathLike | None = None,
    block: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    compile: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score base, memory and mixture on `corpus`; print a table; return (and write) the numbers.

    Args:
        base: model directory, hub id or live model.
        memory: the same, a list of several, or None for the base alone.
        corpus: the test text. valid: the text the mix weight is fitted on; not `corpus`.
        mix_weight: the paper's alpha, instead of a fit: one per memory, in [0, 1].
        out: JSON file to write.
        block, stride: tokens a window reads and scores (None: block // 2).
        dtype: "float32" or "bfloat16" weights; live models keep theirs.

    Returns a dict (the JSON): `base`, `memories`, `mixture`, each with `nats_per_token`,
    `perplexity` and `bits_per_byte` (the eos tokens count as nats, not as bytes); `mixture` also
    has `mix_weight`, `gain_nats` over the base with its 95 % block-bootstrap interval, and `curve`.

    Raises ValueError when the tokenizers of models and corpora differ, or neither `valid` nor
    `mix_weight` says what weight to use; FileExistsError when `out` exists.
    """
    memories = (
        [] if memory is None else list(memory) if isinstance(memory, (list, tuple)) else [memory]
    )
    corpus = open_corpus(corpus)
    valid = None if valid is None else open_corpus(valid)
    weights = None if mix_weight is None else check_weights(mix_weight, len(memories))
    _check_plan(memories, corpus, valid, weights, out, overwrite)
    check_tokenizers([base, *memories], [corpus] + ([valid] if valid is not None else []))
    began = time.perf_counter()
    fit_corpora = [valid] if weights is None and memories else []
    scores, ids = [], []
    for i, source in enumerate([base, *memories]):
        model = load_model(source, dtype=DTYPES[dtype], device=resolve_device(device))
        options = {"block": block, "stride": stride, "batch_size": batch_size, "compile": compile}
        label = "base" if i == 0 else "memory" if len(memories) == 1 else f"memory {i}"
        scores.append(
            [gold_logprobs(model, c, label=label, **options) for c in [corpus, *fit_corpora]]
        )
        ids.append(model_id(model))
        del model
    test = [score[0] for score in scores]
    report: dict[str, Any] = {
        "corpus": str(corpus.path),
        "rows": corpus.num_rows,
        "block": block,
        "stride": max(1, block // 2) if stride is None else stride,
        "dtype": dtype,
        "base": {"model": ids[0], **_measures(test[0], corpus)},
        "memories": [
            {"model": name, **_measures(score, corpus)}
            for name, score in zip(ids[1:], test[1:], strict=True)
        ],
    }
    if memories:
        report["mixture"] = _mixture_report(scores, weights, corpus, valid)
    report["seconds"] = time.perf_counter() - began
    if out is not None:
        _write_json(Path(out), report)
    print(format_table(report))
    return report


class MixtureEval:
    """The hook that reports the mixture with `base` while a memory trains: `train(...,
    on_eval=this)`.

    The base is scored once, at the first call, and dropped. The weight is fitted on the scored
    corpus itself, so `mixture_perplexity` is for comparing steps of one run, not for reporting.
    """

    def __init__(
        self,
        base,
        corpus: Corpus | str | os.PathLike,
        *,
        block: int = 1024,
        stride: int | None = None,
        batch_size: int = 8,
        autocast: torch.dtype | None = None,
    ):
        self.corpus = open_corpus(corpus)
        self.base = base
        self.options = {
            "block": block,
            "stride": stride,
            "batch_size": batch_size,
            "autocast": autocast,
        }
        self.base_logprobs: Tensor | None = None

    def __call__(self, model, step: int) -> dict[str, float]:
        if self.base_logprobs is None:
            base = load_model(self.base, device=model.device)
            self.base_logprobs = gold_logprobs(base, self.corpus, label="base", **self.options)
            self.base = None
        memory = gold_logprobs(model, self.corpus, label=f"step {step}", **self.options)
        fit = fit_mix_weight(self.base_logprobs, [memory])
        return {
            "base_perplexity": math.exp(-float(self.base_logprobs.double().mean())),
            "memory_perplexity": math.exp(-float(memory.double().mean())),
            "mixture_perplexity": math.exp(fit.nats),
            "mix_weight": fit.weights[0],
        }


def format_table(report: dict[str, Any]) -> str:
    """The report of `evaluate` as text, one model a line."""
    lines = [f"{report['rows']:,} tokens of {report['corpus']}"]
    rows = [("base", report["base"])]
    rows += [(f"memory {i}", part) for i, part in enumerate(report["memories"], 1)]
    if len(rows) == 2:
        rows[1] = ("memory", rows[1][1])
    if "mixture" in report:
        rows.append(("mixture", report["mixture"]))
    lines.append(f"{'':10}{'perplexity':>12}{'nats/token':>12}{'bits/byte':>11}")
    lines += [
        f"{name:10}{part['perplexity']:12.2f}{part['nats_per_token']:12.4f}"
        f"{part['bits_per_byte']:11.4f}"
        for name, part in rows
    ]
    if "mixture" in report:
        mixture = report["mixture"]
        low, high = mixture["gain_interval"]
        weights = ", ".join(f"{weight:.3f}" for weight in mixture["mix_weight"])
        how = "given" if mixture["fitted_on"] is None else f"fitted on {mixture['fitted_on']}"
        lines.append(f"mix weight {weights} ({how})")
        gain = f"{mixture['gain_nats']:.4f} nats/token, 95 % [{low:.4f}, {high:.4f}]"
        lines.append(f"gain over the base {gain}")
    return "\n".join(lines)


def _check_plan(memories, corpus, valid, weights, out, overwrite) -> None:
    """What would otherwise fail only after minutes of scoring."""
    if memories and weights is None and valid is None:
        raise ValueError(
            "mix_weight: give a weight, or a validation corpus (valid=) to fit it on; one fitted "
            "on the test corpus would flatter the mixture"
        )
    if valid is not None and (weights is not None or not memories):
        raise ValueError(
            f"valid: {valid.path} is for fitting the mix weight, but "
            + ("mix_weight is given; leave one out" if memories else "there is no memory to mix")
        )
    if valid is not None and valid.content_id == corpus.content_id:
        raise ValueError(
            f"valid: {valid.path} holds the same text as the test corpus {corpus.path}; fit the "
            "mix weight on held-out text, or pass mix_weight"
        )
    if out is not None and Path(out).exists() and (not overwrite or Path(out).is_dir()):
        raise FileExistsError(
            f"out: {out} exists; pass overwrite=True (--overwrite) or another file"
        )


def _measures(logprobs: Tensor, corpus: Corpus) -> dict[str, float]:
    nats = -float(logprobs.double().mean())
    return {
        "nats_per_token": nats,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
        "bits_per_byte": nats * len(logprobs) / math.log(2) / corpus.text_bytes,
    }


def _mixture_report(scores, weights, corpus, valid) -> dict[str, Any]:
    """`scores[model]` is [test] or [test, valid]; model 0 is the base."""
    fitted_on = None
    extra: dict[str, Any] = {}
    if weights is None:
        base_valid, *memories_valid = [score[1] for score in scores]
        fit = fit_mix_weight(base_valid, memories_valid)
        weights, fitted_on = fit.weights, str(valid.path)
        extra = {"valid_nats_per_token": fit.nats, "fit_iterations": fit.iterations}
    base, *memories = [score[0] for score in scores]
    mixture = mixture_logprobs(base, memories, weights)
    gain, low, high = paired_interval(mixture - base.double())
    return {
        **_measures(mixture, corpus),
        "mix_weight": list(weights),
        "fitted_on": fitted_on,
        **extra,
        "gain_nats": gain,
        "gain_interval": [low, high],
        "curve": weight_curve(base, memories),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sync_path(partial)
    partial.replace(path)
