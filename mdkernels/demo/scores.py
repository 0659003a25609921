"""Gold log-probabilities on the held-out text, and what the table needs of them.

Everything in the table follows from one number per token and model: perplexities, the mix weight
fitted on valid, the gain on test and its interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bootstrap import paired_interval
from ..corpus import Corpus
from ..mix_weight import fit_mix_weight, mixture_logprobs, weight_curve
from ..scoring import gold_logprobs
from .recipe import Machine, Recipe


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the right token, fp32, nats; one per row of the corpus."""

    valid: Tensor
    test: Tensor

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:
            np.savez(stream, valid=self.valid.numpy(), test=self.test.numpy())


def open_scores(path: Path, rows: tuple[int, int]) -> Scores:
    """Raises ValueError unless there are `rows` = (valid, test) of them."""
    with np.load(path, allow_pickle=False) as arrays:
        scores = Scores(torch.from_numpy(arrays["valid"]), torch.from_numpy(arrays["test"]))
    if (len(scores.valid), len(scores.test)) != rows:
        raise ValueError(f"{path} holds scores of another text")
    return scores


class Scorer:
    """Scores models on valid and test, all alike: same windows, same arithmetic."""

    def __init__(self, corpora: dict[str, Corpus], recipe: Recipe, machine: Machine):
        self.corpora = corpora
        self.rows = (corpora["valid"].num_rows, corpora["test"].num_rows)
        self.options: dict[str, Any] = {
            "block": recipe.context,
            "stride": recipe.context,
            "batch_size": 16,
            "autocast": machine.autocast,
            "compile": machine.compile,
        }

    def on(self, name: str, model, label: str) -> Tensor:
        return gold_logprobs(model, self.corpora[name], label=label, **self.options)

    def score(self, model, label: str) -> Scores:
        return Scores(self.on("valid", model, label), self.on("test", model, label))


class EarlyStopping:
    """Hook of `train`: scores a memory as it trains, keeping its best and its last moment.

    The best is the evaluation with the lowest mixture loss on valid, the only text it chooses by;
    its test score is kept beside that of the end.
    """

    def __init__(self, scorer: Scorer, base: Scores, folder: Path, last_step: int, label: str):
        self.scorer, self.base = scorer, base
        self.folder, self.last_step, self.label = folder, last_step, label
        self.best = math.inf

    def __call__(self, model, step: int) -> dict[str, float]:
        label = f"{self.label} at step {step}"
        valid = self.scorer.on("valid", model, label)
        fit = fit_mix_weight(self.base.valid, [valid])
        is_best, is_last = fit.nats < self.best, step == self.last_step
        if is_best or is_last:
            scores = Scores(valid, self.scorer.on("test", model, label))
            if is_best:
                self.best = fit.nats
                scores.save(self.folder / "best.npz")
            if is_last:
                scores.save(self.folder / "last.npz")
        return {
            "valid_mixture_nats": fit.nats,
            "valid_memory_nats": -float(valid.double().mean()),
            "mix_weight": fit.weights[0],
        }


def summary(scores: Scores, base: Scores | None = None) -> dict[str, Any]:
    """Alone and, with a `base`, as a mixture whose weight is fitted on valid; measured on test."""
    result: dict[str, Any] = {"alone": _measures(scores.test)}
    if base is None:
        return result
    fit = fit_mix_weight(base.valid, [scores.valid])
    mixed = mixture_logprobs(base.test, [scores.test], fit.weights)
    gain, low, high = paired_interval(mixed - base.test.double())
    mixture = {
        **_measures(mixed),
        "mix_weight": fit.weights[0],
        "gain_nats": gain,
        "gain_interval": [low, high],
        "curve": [
            [w, nats if math.isfinite(nats) else None]
            for w, nats in weight_curve(base.test, [scores.test])
        ],
    }
    return result | {"mixture": mixture}


def difference(left: Scores, right: Scores, base: Scores) -> dict[str, Any]:
    """How much better the mixture with `left` is than that with `right`, in nats per test token."""
    mixed = []
    for scores in (left, right):
        weights = fit_mix_weight(base.valid, [scores.valid]).weights
        mixed.append(mixture_logprobs(base.test, [scores.test], weights))
    mean, low, high = paired_interval(mixed[0] - mixed[1])
    return {"nats": mean, "interval": [low, high]}


def _measures(logprobs: Tensor) -> dict[str, float | None]:
    """None where a token has probability 0, as kNN alone gives to unseen ones."""
    nats = -float(logprobs.double().mean())
    finite = math.isfinite(nats)
    return {"nats": nats if finite else None, "perplexity": math.exp(nats) if finite else None}
