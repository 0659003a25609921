"""Train a memory model on kNN targets, or any causal LM on plain text.

    corpus + sparse targets + initial model  ->  a Hugging Face directory with metrics.jsonl

One loss covers the method and its baselines (paper eqs. 4-6), per scored row:

    loss = kl_weight * KL(p_kNN || p_memory) + (1 - kl_weight) * CE(next token)

Objective "kl_ce" is Memory Decoder, "kl" pure distillation, "ce" language modelling: base training,
domain-adaptive training, and the CE-only memory of the controls. Only scored positions reach the LM
head, targets go from the memory map to the loss without ever being dense, and the loss overwrites
the logits with their gradient.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, preflight
from .artifact import FILE_NAME
from .artifact_writer import ArtifactWriter
from .batches import Batch, WindowBatches
from .corpus import open_corpus, windows
from .evaluate import MixtureEval
from .models import lm_head, load_model, model_hash
from .ops.sparse_kl import sparse_kl
from .ops.sparse_targets import SparseTargets
from .optimizer import adamw, lr_factor
from .scoring import unpadded
from .targets import open_targets
from .tokenizer_check import check_tokenizers
from .train_config import DTYPES, TrainConfig, resolve_device

__all__ = ["EvalHook", "TrainConfig", "TrainResult", "train"]

EvalHook = Callable[[torch.nn.Module, int], "dict[str, Any] | None"]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    path: Path
    """Directory that `from_pretrained` and every later stage read."""
    model: torch.nn.Module
    """The trained model, in eval mode."""
    steps: int
    """Optimizer steps since the initial model, those before a resume included."""
    epochs: float
    """Passes over the corpus windows."""
    seconds: float
    """Wall time of this call inside the training loop, evaluations and checkpoints excluded."""
    tokens_per_s: float
    """Input tokens through the trunk per second of `seconds`."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl: one per step, and one {"step", "eval"} per evaluation."""


def train(config: TrainConfig, *, on_eval: EvalHook | None = None) -> TrainResult:
    """Run `config` and return the trained model.

    `on_eval(model, step)` runs every `config.eval_every` steps and after the last one, with the
    model in eval mode; the JSON-able dict it may return goes to metrics.jsonl. It replaces the
    built-in mixture perplexity on `config.valid`. Random state is put back after it.

    A run interrupted at any point lies in `<out>.partial`; the same config continues it from its
    last checkpoint and, on the CPU with as many threads, ends bit for bit where the uninterrupted
    run would have. `out` appears only when training is complete. Several processes cannot train
    into one `out`.

    Raises ArtifactError when `out` is taken, the targets do not belong to the corpus, or the
    interrupted run had another config; ValueError for a model that cannot train on this corpus;
    FloatingPointError, naming the step, when the loss is not finite: checkpoints stay as they were.
    """
    return _Run(config, on_eval).execute()


class _Run:
    """One training run: built from its inputs, executed once."""

    def __init__(self, config: TrainConfig, on_eval: EvalHook | None):
        self.config = config
        self.corpus = corpus = open_corpus(config.corpus)
        targets = None if config.targets is None else open_targets(config.targets)
        if targets is not None:
            targets.check_corpus(corpus)
        self.device = resolve_device(config.device)
        self.tokenizer = preflight.tokenizer_of(config, corpus)
        self.model = load_model(config.model, dtype=torch.float32, device=self.device)
        preflight.check_model(self.model, corpus, config.block)
        self.head = lm_head(self.model)
        self.trunk = self.model.base_model
        if config.compile:
            self.trunk = torch.compile(self.trunk, dynamic=False)
        self.autocast = None if config.dtype == "float32" else DTYPES[config.dtype]
        self.on_eval = on_eval or self._mixture_hook()

        spans = np.asarray(windows(corpus.num_rows, config.block, config.scored))
        self.data = WindowBatches(
            corpus.token_ids, spans, config.block, seed=config.seed, targets=targets
        )
        self.per_step = config.batch_size * config.grad_accum
        if config.max_steps is not None:
            self.steps, self.windows = config.max_steps, config.max_steps * self.per_step
        else:
            self.windows = math.ceil(config.epochs * len(self.data))
            self.steps = math.ceil(self.windows / self.per_step)
        self.optimizer = adamw(self.model, config)
        self.header = {
            "config": config.identity(),
            "model_hash": model_hash(self.model),
            "tokenizer_hash": corpus.tokenizer_hash,
            "vocab_size": corpus.vocab_size,
            "inputs": {a.kind: a.content_id for a in (corpus, targets) if a is not None},
        }
        self.rows: list[dict[str, Any]] = []
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.seconds = 0.0
        self.trained_tokens = 0

    def execute(self) -> TrainResult:
        out = Path(os.path.realpath(self.config.out))
        if self.config.resume:
            preflight.refuse_other_config(out, self.header)
        with ArtifactWriter(out, "train", self.header, overwrite=self.config.overwrite) as writer:
            self.work, self.writer = writer.work, writer
            start = self._restore(writer.state.get("step", 0) if self.config.resume else 0)
            (self.work / preflight.RUN).write_text(json.dumps(self.header), encoding="utf-8")
            path = self.work / "metrics.jsonl"
            with open(path, "a", encoding="utf-8") as self.metrics, unpadded(self.model):
                self._loop(start)
            self.model.eval()
            self._commit()
        speed = self.trained_tokens / self.seconds if self.seconds else 0.0
        epochs = self.windows / len(self.data)
        return TrainResult(out, self.model, self.steps, epochs, self.seconds, speed, self.rows)

    def _restore(self, step: int) -> int:
        """Put everything where it was after `step`; 0 clears what an unwanted run left."""
        metrics = self.work / "metrics.jsonl"
        if step == 0:
            shutil.rmtree(self.work / "checkpoints", ignore_errors=True)
            metrics.unlink(missing_ok=True)
            torch.manual_seed(self.config.seed)
            return 0
        path = preflight.usable_checkpoint(self.work / "checkpoints", step)
        state = checkpoint.restore(path, self.model, self.optimizer)
        # Rows behind the checkpoint, and a line that a kill cut short, will be written again.
        with open(metrics, "r+b") as stream:
            stream.truncate(state["metrics_bytes"])
            self.rows = [json.loads(line) for line in stream.read().splitlines()]
        return state["step"]

    def _loop(self, start: int) -> None:
        config = self.config
        flush_every = 1 if self.device.type == "cpu" else config.log_every
        description = f"train {config.objective}"
        with tqdm(
            total=self.steps, initial=start, desc=description, unit="step", disable=None
        ) as bar:
            self.model.train()
            self.mark = time.perf_counter()
            for step in range(start + 1, self.steps + 1):
                self._step(step)
                last = step == self.steps
                evaluate = self.on_eval is not None and (
                    last or (config.eval_every is not None and step % config.eval_every == 0)
                )
                save = config.save_every is not None and step % config.save_every == 0 and not last
                if step % flush_every == 0 or evaluate or save or last:
                    self._flush(bar)
                if evaluate:
                    self._evaluate(step)
                if save:
                    self._save(step)
                bar.update()

    def _step(self, step: int) -> None:
        """One optimizer step; its measures stay on the device in `pending`."""
        first = (step - 1) * self.per_step
        stop = min(first + self.per_step, self.windows)
        size = self.config.batch_size
        batches = [self.data.take(i, min(i + size, stop), size) for i in range(first, stop, size)]
        scored = sum(len(batch.labels) for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)
        measures = torch.zeros(3, device=self.device)
        for batch in batches:
            share = len(batch.labels) / scored
            output = self._loss(batch.to(self.device))
            # A factor of 1 would cost the in-place gradient another pass on some devices.
            (output.loss if share == 1.0 else output.loss * share).backward()
            measures += share * torch.stack([t.detach().float() for t in output])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        lr = self.config.lr * lr_factor(step, self.steps, self.config)
        values = torch.cat([measures, norm.detach().float()[None]])
        if (
            self.device.type == "cpu"
        ):  # on a GPU this would wait for the step; `_flush` checks there
            _check_finite(step, values.tolist())
        self.pending.append(({"step": step, "epoch": stop / len(self.data), "lr": lr}, values))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.trained_tokens += len(batches) * size * self.data.length

    def _loss(self, batch: Batch):
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            hidden = self.trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            logits = self.head(batch.select(hidden))
        targets = batch.targets
        if targets is None:
            targets = SparseTargets.empty(len(batch.labels), device=self.device)
        return sparse_kl(logits, targets, batch.labels, kl_weight=self.config.beta, inplace=True)

    def _flush(self, bar) -> None:
        """Read what is pending off the device, check it, write it, show it."""
        values = torch.stack([values for _, values in self.pending]).tolist()
        elapsed = time.perf_counter() - self.mark
        tokens = len(self.pending) * self.per_step * self.data.length
        for (row, _), (loss, kl, ce, norm) in zip(self.pending, values, strict=True):
            _check_finite(row["step"], (loss, kl, ce, norm))
            kl = None if self.data.targets is None else kl
            row |= {"loss": loss, "kl": kl, "ce": ce, "grad_norm": norm}
            self._write(row | {"tokens_per_s": tokens / elapsed})
        self.pending.clear()
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / elapsed:,.0f} tok/s", refresh=False)
        self.seconds += elapsed
        self.mark = time.perf_counter()

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()

    def _evaluate(self, step: int) -> None:
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            result = self.on_eval(self.model, step)
        self.model.train()
        if result is not None:
            self._write({"step": step, "eval": result})
        self.mark = time.perf_counter()

    def _save(self, step: int) -> None:
        directory = self.work / "checkpoints"
        extra = {"metrics_bytes": self.metrics.tell()}
        os.fsync(self.metrics.fileno())
        checkpoint.save(directory, step, self.model, self.tokenizer, self.optimizer, extra)
        # Older checkpoints go only after the record of progress points at the new one.
        self.writer.checkpoint(step=step)
        checkpoint.prune(directory, self.config.keep)
        self.mark = time.perf_counter()

    def _commit(self) -> None:
        """Model, tokenizer and metrics become the artefact."""
        staging = self.work / "model"
        shutil.rmtree(staging, ignore_errors=True)
        checkpoint.save_model(staging, self.model, self.tokenizer)
        names = ["metrics.jsonl"]
        for path in sorted(staging.iterdir()):
            target = self.work / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
            names.append(path.name)
        staging.rmdir()
        for name in names:
            # A tokenizer may write what it likes; other names are kept, without a checksum.
            if (self.work / name).is_file() and FILE_NAME.fullmatch(name):
                self.writer.file(name)
        artifact = self.writer.commit(steps=self.steps, epochs=self.windows / len(self.data))
        (artifact.path / preflight.RUN).unlink(missing_ok=True)

    def _mixture_hook(self) -> EvalHook | None:
        config = self.config
        if config.valid is None:
            return None
        check_tokenizers([config.base], [self.corpus, open_corpus(config.valid)])
        return MixtureEval(
            config.base,
            config.valid,
            block=config.block,
            stride=config.scored,
            batch_size=config.batch_size,
            autocast=self.autocast,
        )


def _check_finite(step: int, values) -> None:
    if not all(map(math.isfinite, values)):
        loss, _, _, norm = values
        raise FloatingPointError(
            f"step {step}: loss is {loss}, gradient norm {norm}; training stopped. Checkpoints are "
            "as they were; try a smaller lr, warmup_steps, or dtype float32"
        )
