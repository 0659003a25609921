"""Train a memory model on kNN targets, or any causal LM on plain text.

    corpus + sparse targets + initial model  ->  a Hugging Face directory with metrics.jsonl

One loss covers the method and its baselines (paper eqs. 4-6), per scored row:

    loss = kl_weight * KL(p_kNN || p_memory) + (1 - kl_weight) * CE(next token)

Objective "kl_ce" is Memory Decoder, "kl" pure distillation, "ce" language modelling: base training,
domain-adaptive training, and the CE-only memory of the controls. Only scored positions reach the LM
head, targets go from the memory map to the loss without ever being dense, and the loss overwrites
the logits with their gradient.

Several processes (torchrun, `accelerate launch`) share each step: process r of n takes the r-th of
n equal cuts of every batch, so n processes with batch_size b do what one does with n * b. The loss
is the mean over the scored rows of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, preflight
from .batches import WindowBatches
from .corpus import open_corpus, windows
from .distributed import Processes, accumulating
from .early_stop import BestStep
from .evaluate import MixtureEval
from .interrupt import CtrlC, Interrupted
from .metrics import Metrics, check_finite, check_trackers
from .models import load_model, model_hash
from .optimizer import lr_factor
from .prefetch import Prefetcher
from .run_directory import RunDirectory
from .schedule import Schedule
from .scoring import unpadded
from .targets import open_targets
from .tokenizer_check import check_tokenizers
from .train_config import DTYPES, TrainConfig
from .trained_model import TrainedModel
from .value_checks import check_choice

__all__ = ["EvalHook", "TrainConfig", "TrainResult", "train"]

EvalHook = Callable[[torch.nn.Module, int], "dict[str, Any] | None"]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    path: Path
    """Directory that `from_pretrained` and every later stage read."""
    model: torch.nn.Module
    """The trained model, in eval mode. Under FSDP2 whole (and on the CPU) in process 0 only; other
    processes get their part."""
    steps: int
    """Optimizer steps since the initial model, those before a resume included."""
    best_step: int | None
    """The step whose weights `path` holds, with `keep_best`; None: the last one."""
    epochs: float
    """Passes over the corpus windows."""
    seconds: float
    """Wall time of this call inside the training loop, evaluations and checkpoints excluded."""
    tokens_per_s: float
    """Input tokens through the trunk per second of `seconds`, of all processes together."""
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl: one per step, and one {"step", "eval"} per evaluation."""
    is_main: bool
    """Whether this process wrote `path`: process 0 of several."""


def train(config: TrainConfig, *, on_eval: EvalHook | None = None) -> TrainResult:
    """Run `config` and return the trained model.

    `on_eval(model, step)` runs every `config.eval_every` steps and after the last one, with the
    model in eval mode; the JSON-able dict it may return goes to metrics.jsonl. It replaces the
    built-in mixture perplexity on `config.valid`. Of several processes, process 0 alone runs it, on
    a whole model.

    A run interrupted at any point lies in `<out>.partial`; the same config continues it from its
    last checkpoint and, on the CPU with as many threads, ends bit for bit where the uninterrupted
    run would have. Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; a
    second one aborts. `out` appears only when training is complete. Two runs cannot train into one
    `out`.

    With `patience` or `keep_best`, every evaluation with a new smallest `monitor` saves a
    checkpoint, which is kept, and `out` holds the weights of the best one.

    Raises ArtifactError when `out` is taken, the targets do not belong to the corpus, or the
    interrupted run had another config; ValueError for a model that cannot train on this corpus;
    FloatingPointError, naming the step, when the loss is not finite (in every process):
    checkpoints stay as they were.
    """
    return _Run(config, on_eval).execute()


class _Run:
    """One training run: built from its inputs, executed once."""

    def __init__(self, config: TrainConfig, on_eval: EvalHook | None):
        self.config = config
        check_trackers(config.track or ())
        self.corpus = corpus = open_corpus(config.corpus)
        targets = None if config.targets is None else open_targets(config.targets)
        if targets is not None:
            targets.check_corpus(corpus)
        self.processes = Processes(config.device, config.parallel)
        self.device = self.processes.device
        tokenizer = preflight.tokenizer_of(config, corpus)
        model = load_model(config.model, dtype=torch.float32, device=self.device)
        preflight.check_model(model, corpus, config.block)
        self.on_eval = on_eval or self._mixture_hook(model)
        self.best = BestStep(config.monitor, config.patience) if config.best_kept else None
        if self.best is not None and self.on_eval is None:
            raise ValueError(
                "patience and keep_best compare evaluations, and there are none: give valid and "
                "base, or on_eval"
            )
        spans = np.asarray(windows(corpus.num_rows, config.block, config.scored))
        self.data = WindowBatches(
            corpus.token_ids, spans, config.block, seed=config.seed, targets=targets
        )
        self.schedule = Schedule(self.data, config, self.processes)
        inputs = {"corpus": corpus, "targets": targets}
        if self.best is not None and config.valid is not None:
            inputs["valid"] = open_corpus(config.valid)
        header = {
            "config": config.identity(),
            "model_hash": model_hash(model),
            "tokenizer_hash": corpus.tokenizer_hash,
            "vocab_size": corpus.vocab_size,
            "processes": self.processes.count,
            "inputs": {name: a.content_id for name, a in inputs.items() if a is not None},
        }
        self.directory = RunDirectory(config, header, tokenizer)
        self.trained = TrainedModel(model, config, self.processes)
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.seconds = 0.0
        self.trained_tokens = 0
        self.interrupted = False  # in some process, as far as this one has heard

    def execute(self) -> TrainResult:
        processes = self.processes
        with ExitStack() as stack:
            start = processes.on_main(lambda: self.directory.open(stack, self.trained.saved))
            if self.best is not None and start.best is not None:
                self.best.restore(start.best)
            self.trained.spread()
            if start.step:
                path = self.directory.checkpoint(start.step)
                checkpoint.restore_moments(path, self.trained)
            log = self.directory.open_metrics if processes.is_main else Metrics
            self.metrics = stack.enter_context(log(start.rows))
            stack.enter_context(unpadded(self.trained.model))
            step = self._loop(start.step)
            best = None if self.best is None else self.best.step
            other = best not in (None, step)
            load = partial(self.directory.load, best) if other else None
            model = self.trained.finished(load)
            fields = {"steps": step, "best_step": best, "epochs": self.schedule.epochs(step)}
            processes.on_main(lambda: self.directory.commit(model, **fields))
        return TrainResult(
            path=self.directory.out,
            model=model,
            **fields,
            seconds=self.seconds,
            tokens_per_s=self.trained_tokens / self.seconds if self.seconds else 0.0,
            metrics=self.metrics.rows,
            is_main=processes.is_main,
        )

    def _loop(self, start: int) -> int:
        """Train from step `start` to the end, or until it stops early; the last step done."""
        config, steps, step = self.config, self.schedule.steps, start
        flush_every = 1 if self.device.type == "cpu" else config.log_every
        bar = tqdm(
            total=steps,
            initial=start,
            desc=f"train {config.objective}",
            unit="step",
            disable=None if self.processes.is_main else True,
        )
        notice = "finishing this step and saving it; Ctrl-C again aborts"
        notice = notice if self.processes.is_main else None
        ranges = self.schedule.ranges(start)
        batches = Prefetcher(self.data, ranges, config.batch_size, self.device)
        with bar, CtrlC(notice) as self.ctrl_c, batches as self.batches:
            self.trained.model.train()
            self.mark = time.perf_counter()
            while step < steps and not (self.best is not None and self.best.exhausted):
                step += 1
                self._step(step)
                last = step == steps
                evaluate = self.on_eval is not None and (
                    last or (config.eval_every is not None and step % config.eval_every == 0)
                )
                save = config.save_every is not None and step % config.save_every == 0 and not last
                alone = self.processes.count == 1 and self.ctrl_c.pressed
                if step % flush_every == 0 or evaluate or save or last or alone:
                    self._flush(bar)
                improved = evaluate and self._evaluate(step)
                interrupted = self.interrupted and not last
                if save or improved or interrupted:
                    self._save(step)
                bar.update()
                if interrupted:
                    command = "same command" if config.resume else "command with resume"
                    raise Interrupted(
                        f"stopped behind step {step:,} of {steps:,}, whose checkpoint is under "
                        f"{self.directory.work}; the {command} continues from there"
                    )
        return step

    def _step(self, step: int) -> None:
        """One optimizer step; its measures stay on the device in `pending`."""
        count = self.processes.count
        # Dropout depends on (seed, step, process) alone, so a resumed run draws the same.
        seed = np.random.SeedSequence((self.config.seed, step, self.processes.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        self.trained.optimizer.zero_grad(set_to_none=True)
        measures = torch.zeros(4, device=self.device)  # loss, kl, ce, processes interrupted
        parts = self.schedule.parts(step)
        for i, part in enumerate(parts):
            with accumulating(self.trained.module, last=i == len(parts) - 1):
                output = self.trained.module(next(self.batches))
                # Gradients are averaged over the processes. A factor of 1 would cost the in-place
                # gradient another pass on some devices.
                factor = part.share * count
                (output.loss if factor == 1.0 else output.loss * factor).backward()
            measures[:3] += part.share * torch.stack([t.detach().float() for t in output])
        if self.ctrl_c.pressed:
            measures[3:].fill_(1.0)
        self.processes.sum_(measures)
        values = torch.cat([measures, self.trained.clip()[None]])
        if self.device.type == "cpu":  # a GPU would have to be waited for; `_flush` checks there
            check_finite(step, values.tolist())
        lr = self.config.lr * lr_factor(step, self.schedule.steps, self.config)
        row = {"step": step, "epoch": self.schedule.epochs(step), "lr": lr}
        self.pending.append((row, values))
        self.trained.update(lr)
        self.trained_tokens += len(parts) * self.schedule.per_forward * self.data.length

    def _flush(self, bar) -> None:
        """Read what is pending off the device, check it, write it, show it."""
        pending = torch.stack([values for _, values in self.pending]).tolist()
        elapsed = time.perf_counter() - self.mark
        speed = len(self.pending) * self.schedule.per_step * self.data.length / elapsed
        for (row, _), values in zip(self.pending, pending, strict=True):
            check_finite(row["step"], values)
            loss, kl, ce, interrupted, norm = values
            self.interrupted |= interrupted > 0
            kl = None if self.data.targets is None else kl
            row |= {"loss": loss, "kl": kl, "ce": ce, "grad_norm": norm}
            self.metrics.write(row | {"tokens_per_s": speed})
        self.interrupted |= self.processes.count == 1 and self.ctrl_c.pressed
        self.pending.clear()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s", refresh=False)
        self.seconds += elapsed
        self.mark = time.perf_counter()

    def _evaluate(self, step: int) -> bool:
        """Record an evaluation; whether it is the best so far, where that is asked for."""
        result = self.trained.evaluate(self.on_eval, step)
        if result is not None:
            self.metrics.write({"step": step, "eval": result})
        self.mark = time.perf_counter()
        return self.best is not None and self.best.update(step, result)

    def _save(self, step: int) -> None:
        moments, model = checkpoint.moments(self.trained), self.trained.whole()
        best = None if self.best is None else self.best.state()
        self.processes.on_main(
            lambda: self.directory.save(step, model, moments, best, self.metrics.sync())
        )
        self.mark = time.perf_counter()

    def _mixture_hook(self, model) -> EvalHook | None:
        config = self.config
        if config.valid is None:
            return None
        if isinstance(config.base, torch.nn.Module):
            preflight.check_base(config.base, model)
        if config.best_kept:
            check_choice("monitor", config.monitor, MixtureEval.numbers)
        check_tokenizers([config.base], [self.corpus, open_corpus(config.valid)])
        return MixtureEval(
            config.base,
            config.valid,
            block=config.block,
            stride=config.scored,
            batch_size=config.batch_size,
            autocast=None if config.dtype == "float32" else DTYPES[config.dtype],
        )
