"""Perplexity of base, memory and mixture from one pass per model.

Each model is read once for the log-probability of the right token at every position. The mix weight
is fitted on a validation corpus and reported on the test corpus, with bootstrap intervals.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifact import strict_json
from .artifact_writer import sync_path
from .bootstrap import MIN_UNITS, block_starts, document_starts, mean_intervals
from .corpus import Corpus, open_corpus
from .evaluate_report import format_table, plot_path, write_plot
from .mix_weight import check_weights, fit_mix_weight, mixture_logprobs, weight_curve
from .mixture_config import is_mixture
from .models import check_source, load_config, load_model, model_id, plain_model
from .scoring import check_context, gold_logprobs, knn_logprobs
from .tokenizer_check import check_tokenizers
from .train_config import DTYPES, resolve_device
from .value_checks import check_choice, check_path, check_sizes

__all__ = ["MixtureEval", "evaluate", "format_table", "gold_logprobs", "knn_logprobs"]

LEVEL, DRAWS, SEED = 0.95, 2000, 0


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
    plot: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score base, memory and mixture on `corpus`; print a table; return (and write) the numbers.

    Args:
        base: model directory, hub id or live model, also one with adapters of peft.
        memory: the same, a list of several, or None for the base alone.
        corpus: the test text. valid: the text the mix weight is fitted on; not `corpus`.
        mix_weight: the paper's alpha, instead of a fit: one per memory, in [0, 1].
        out: JSON file to write.
        block, stride: tokens a window reads and scores, its last ones (None: block // 2). The
            defaults are the paper's.
        dtype: "float32" or "bfloat16" weights; live models keep theirs.
        plot: draw the curve beside `out`, as <its stem>-curve.png, where matplotlib is installed.

    Returns a dict (the JSON): `base`, `memories`, `mixture`, each with `nats_per_token`,
    `perplexity` and its 95 % `perplexity_interval`, and `bits_per_byte` (the eos tokens count as
    nats, not as bytes). `mixture` also has `mix_weight`, `gain_nats` over the base with its
    `gain_interval`, and `curve`: [total weight, nats per token] with the memories in the
    proportions of `mix_weight`; where that was fitted, `valid_curve` too. The intervals bootstrap
    the documents of the corpus, or blocks of tokens if there are fewer than 20: see `interval`.
    `zero_probability_tokens` counts those that a model gives probability 0: one is enough for an
    infinite perplexity. Numbers that are not finite are null in the file.

    Raises ValueError when the tokenizers of models and corpora differ, or neither `valid` nor
    `mix_weight` says what weight to use; FileExistsError when `out` exists.
    """
    memories = (
        [] if memory is None else list(memory) if isinstance(memory, (list, tuple)) else [memory]
    )
    check_sizes(block, stride, batch_size)
    check_choice("dtype", dtype, tuple(DTYPES))
    corpus = open_corpus(corpus)
    valid = None if valid is None else open_corpus(valid)
    weights = None if mix_weight is None else check_weights(mix_weight, len(memories))
    if out is not None:
        check_path("out", out)
    plotted = plot_path(Path(out), bool(memories)) if plot and out is not None else None
    _check_plan(memories, corpus, valid, weights, [out, plotted], overwrite)
    base, *memories = [
        _one_model("base" if i == 0 else "memory", source)
        for i, source in enumerate([base, *memories])
    ]
    corpora = [corpus] + ([valid] if valid is not None else [])
    check_tokenizers([base, *memories], corpora)
    for source, one in itertools.product([base, *memories], corpora):
        name = model_id(source) if isinstance(source, torch.nn.Module) else str(source)
        check_context(load_config(source), name, one, block)
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
    columns = [score[0].double() for score in scores]  # of the test corpus, base first
    mixture: dict[str, Any] = {}
    if memories:
        weights, mixture = _chosen_weights(scores, weights, valid)
        columns.append(mixture_logprobs(columns[0], columns[1:], weights))
        columns.append(columns[-1] - columns[0])
    measures, intervals, interval = _measures(columns, corpus)
    report: dict[str, Any] = {
        "corpus": str(corpus.path),
        "rows": corpus.num_rows,
        "block": block,
        "stride": max(1, block // 2) if stride is None else stride,
        "dtype": dtype,
        "interval": interval,
        "base": {"model": ids[0], **measures[0]},
        "memories": [
            {"model": name, **part} for name, part in zip(ids[1:], measures[1:], strict=False)
        ],
    }
    if memories:
        report["mixture"] = {
            **measures[-2],
            **mixture,
            "gain_nats": float(columns[-1].mean()),
            "gain_interval": intervals[-1],
            "curve": weight_curve(columns[0], columns[1:-2], shares=weights),
        }
    report["seconds"] = time.perf_counter() - began
    print(format_table(report))  # before a full disk could lose it
    if out is not None:
        _write_json(Path(out), report)
    if plotted is not None:
        write_plot(report, plotted)
    return report


class MixtureEval:
    """The hook that reports the mixture with `base` while a memory trains: `train(...,
    on_eval=this)`.

    The base is scored once, at the first call, and dropped. The weight is fitted on the scored
    corpus itself, so `mixture_perplexity` is for comparing steps of one run, not for reporting.
    """

    numbers = ("base_perplexity", "memory_perplexity", "mixture_perplexity", "mix_weight")
    """The keys of what a call returns."""

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
        self.base = _one_model("base", base)
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
            "base_perplexity": _exp(-float(self.base_logprobs.double().mean())),
            "memory_perplexity": _exp(-float(memory.double().mean())),
            "mixture_perplexity": _exp(fit.nats),
            "mix_weight": fit.weights[0],
        }


def _one_model(name: str, source: Any) -> Any:
    """`source`, without the wrapper of peft. Raises ValueError for a mixture."""
    check_source(name, source)
    source = plain_model(source)
    if is_mixture(source):
        shown = model_id(source) if isinstance(source, torch.nn.Module) else str(source)
        raise ValueError(
            f"{name}: {shown} is a mixture itself, whose models are scored one by one; with "
            "mixture = MemoryMixture.from_pretrained(...) pass mixture.base as base and "
            "mixture.memories as memory, or the directories that they came from"
        )
    return source


def _check_plan(memories, corpus, valid, weights, written, overwrite) -> None:
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
    for path in [Path(path) for path in written if path is not None]:
        if path.exists() and (not overwrite or path.is_dir()):
            raise FileExistsError(
                f"out: {path} exists; pass overwrite=True (--overwrite) or another file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"out: the directory {path.parent} is not writable")


def _chosen_weights(scores, weights, valid) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The weights, and what the report says of them. `scores[model]` is [test] or [test, valid]."""
    if weights is not None:
        return weights, {"mix_weight": list(weights), "fitted_on": None}
    base, *memories = [score[1] for score in scores]
    fit = fit_mix_weight(base, memories)
    return fit.weights, {
        "mix_weight": list(fit.weights),
        "fitted_on": str(valid.path),
        "valid_rows": valid.num_rows,
        "valid_nats_per_token": fit.nats,
        "fit_iterations": fit.iterations,
        "fit_gap_nats": fit.gap,
        "valid_curve": weight_curve(base, memories, shares=fit.weights),
    }


def _measures(
    columns: list[Tensor], corpus: Corpus
) -> tuple[list[dict[str, Any]], list[list[float]], dict[str, Any]]:
    """Of per-token values: measures as of log-probs, intervals of the means, and what these are."""
    starts, unit = document_starts(corpus.document_offsets, corpus.num_rows), "document"
    if len(starts) < MIN_UNITS:
        starts, unit = block_starts(corpus.num_rows), "block"
    values = torch.stack(columns).numpy()
    ends = mean_intervals(values, starts, draws=DRAWS, level=LEVEL, seed=SEED).tolist()
    measures = []
    means, zeros_of = values.mean(axis=1).tolist(), np.isneginf(values).sum(axis=1).tolist()
    for mean, (low, high), zeros in zip(means, ends, zeros_of, strict=True):
        measures.append(
            {
                "nats_per_token": -mean,
                "perplexity": _exp(-mean),
                "perplexity_interval": [_exp(-high), _exp(-low)],
                "bits_per_byte": -mean * values.shape[1] / math.log(2) / corpus.text_bytes,
                "zero_probability_tokens": zeros,
            }
        )
    how = {"level": LEVEL, "draws": DRAWS, "seed": SEED, "unit": unit, "units": len(starts)}
    return measures, ends, {**how, "tokens_per_unit": corpus.num_rows / len(starts)}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(strict_json(value, indent=1) + "\n", encoding="utf-8")
    sync_path(partial)
    partial.replace(path)
