"""What each subcommand runs, and the line or table it prints. It imports only when it runs."""

from __future__ import annotations

import sys
from typing import Any


def corpus(**settings: Any) -> str:
    from .corpus import build_corpus

    built = build_corpus(**settings)
    documents = len(built.document_offsets) - 1
    return f"{built.path}: {len(built.token_ids):,} tokens, {documents:,} documents"


def datastore(**settings: Any) -> str:
    from .datastore import build_datastore

    built = build_datastore(**settings)
    return f"{built.path}: {built.keys.shape[0]:,} keys of width {built.keys.shape[1]}"


def index(**settings: Any) -> str:
    from .index import build_index

    built = build_index(**settings)
    return f"{built.path}: {built.factory} index of {built.num_rows:,} keys"


def targets(**settings: Any) -> str:
    from .targets import build_targets

    built = build_targets(**settings)
    stats = built.meta["stats"]
    return (
        f"{built.path}: {built.num_rows:,} rows, {stats['nnz_mean']:.1f} tokens each, top "
        f"probability {stats['top_prob']:.2f}, own next token {stats['own_token_prob']:.2f}"
    )


def import_targets(**settings: Any) -> str:
    from .integrations.official import import_targets as run

    built = run(**settings)
    return f"{built.path}: {built.num_rows:,} rows, {built.nnz / built.num_rows:.1f} tokens each"


def train(**settings: Any) -> str | None:
    from . import distributed
    from .train import TrainConfig
    from .train import train as run

    every = settings.get("eval_every")
    if every is not None and settings.get("valid") is None:
        raise ValueError(
            f"eval_every: got {every}, but there is nothing to evaluate; give valid and base too"
        )
    result = run(TrainConfig.from_dict(settings))
    distributed.leave()
    if not result.is_main:
        return None
    last = next(row for row in reversed(result.metrics) if "loss" in row)
    text = (
        f"{result.path}: {result.steps:,} steps, {result.epochs:.2f} epochs, loss "
        f"{last['loss']:.4f}, {result.tokens_per_s:,.0f} tokens/s"
    )
    step = result.steps
    if result.best_step is not None:
        step = result.best_step
        text += f", weights of step {step:,}"
    for scores in (row["eval"] for row in result.metrics if "eval" in row and row["step"] == step):
        text += (
            f", mixture perplexity {scores['mixture_perplexity']:.2f} "
            f"(base {scores['base_perplexity']:.2f}, memory {scores['memory_perplexity']:.2f})"
        )
    return text


def evaluate(**settings: Any) -> None:
    from .evaluate import evaluate as run

    run(settings.pop("base"), settings.pop("memory", None), settings.pop("corpus"), **settings)


def generate(*, prompt: list[str], quiet: bool = False, **settings: Any) -> str | None:
    from .generate import generate as run

    stream = sys.stdout if len(prompt) == 1 and not quiet else None
    results = run(
        settings.pop("base"), settings.pop("memory", None), prompt, stream=stream, **settings
    )
    if stream is not None:
        return None
    parts = []
    for result in results:
        for name in ("base", "mixture"):
            if name in result:
                parts.append(f"--- {name}\n{result['prompt']}{result[name]}")
    return "\n".join(parts)


def chat(**settings: Any) -> None:
    from .chat import chat as run

    run(settings.pop("base"), settings.pop("memory", None), **settings)


def demo(**settings: Any) -> None:
    from .demo import run

    if not run(**settings)["passed"]:
        raise SystemExit(1)


def doctor() -> str:
    from .ops.doctor import report

    return report()
