"""What a training run is: every setting, its unit, and the values it may have."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .value_checks import check_choice, check_integer, check_number, check_switch

OBJECTIVES = ("kl_ce", "kl", "ce")
SCHEDULES = ("cosine", "linear", "constant")
PARALLEL = ("auto", "ddp", "fsdp2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Settings that change where a run writes, or how often it reports, but not the model it ends with.
_NOT_IDENTITY = {
    "corpus",  # identified by content instead, like the next three
    "targets",
    "model",
    "tokenizer",
    "out",
    "base",
    "valid",
    "eval_every",
    "log_every",
    "save_every",
    "keep",
    "parallel",
    "track",
    "overwrite",
    "resume",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train`. Wrong names and values are refused at construction, with the way out."""

    corpus: Any
    """Corpus to train on: its directory or the opened object."""
    model: Any
    """Initial model: a directory, a hub id, or a live fp32 model, which is trained in place."""
    out: str | os.PathLike
    """Directory to write; it appears when training is complete."""
    targets: Any = None
    """kNN targets of the corpus: what `open_targets` takes. Only objective "ce" works without."""
    tokenizer: Any = None
    """Tokenizer to store beside the weights: directory, hub id or object. None: that of `model`."""

    objective: str = "kl_ce"
    """One of "kl_ce" (Memory Decoder), "kl", "ce" (language modelling; `targets` only reported).
    "ce" with a base model as `model` is domain-adaptive pre-training (DAPT) of all its weights."""
    kl_weight: float | None = None
    """Weight of KL in "kl_ce", in [0, 1]; the paper's beta. None: 0.5."""

    block: int = 1024
    """Input tokens per window; at most the model's context."""
    stride: int | None = None
    """Scored tokens per window, its last ones, in [1, block]. None: block // 2, as in the paper."""
    batch_size: int = 16
    """Windows per forward pass, in each process."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    epochs: float | None = None
    """Passes over the corpus. One of `epochs` and `max_steps` is needed."""
    max_steps: int | None = None
    """Optimizer steps."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """Decay after warm-up: "cosine" or "linear" to 0, or "constant"."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled decay per unit of lr, on matrices only: never on norms, biases and embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    clip: float | None = 1.0
    """Largest gradient norm, larger ones are scaled down. None: no limit."""

    lora: int | None = None
    """Rank of low-rank adapters (needs peft): only they are trained, and merged at the end."""
    lora_alpha: float | None = None
    """Adapters are scaled by lora_alpha / lora. None: 2 * lora."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters, in [0, 1)."""
    lora_targets: Any = "all-linear"
    """Names of the layers that get adapters; "all-linear": every linear layer but the LM head."""

    seed: int = 0
    """Seeds the order of windows and dropout."""
    device: str = "auto"
    """Where to train: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"."""
    dtype: str = "float32"
    """Arithmetic: "float32", or "bfloat16" autocast; weights and moments stay fp32."""
    compile: bool = False
    """torch.compile the trunk: 10-30 s once, then about 2x faster on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    parallel: str = "auto"
    """With several processes: "ddp", "fsdp2" (weights and moments cut among them), or "auto": what
    `accelerate launch` was told, else "ddp"."""

    valid: Any = None
    """Corpus (directory or object) evaluated every `eval_every` steps; needs `base`."""
    base: Any = None
    """Base model (directory, hub id or live) for the mixture perplexity on `valid`."""
    eval_every: int | None = None
    """Optimizer steps between evaluations. None: only after the last step."""
    patience: int | None = None
    """Stop after this many evaluations without a new best one; implies `keep_best`."""
    keep_best: bool = False
    """`out` holds the weights of the best evaluated step instead of the last one."""
    monitor: str = "mixture_perplexity"
    """Which number of the evaluation decides about the best, smaller being better."""
    track: Sequence[str] | None = None
    """Trackers that also get the metrics: "tensorboard", "wandb", ... as accelerate knows them."""
    log_every: int = 10
    """Optimizer steps between reads of the loss on a GPU (each waits for it); a CPU reads each."""
    save_every: int | None = 500
    """Optimizer steps between checkpoints. None: none."""
    keep: int = 1
    """Newest checkpoints kept."""
    overwrite: bool = False
    """Replace a finished run at `out`, once this one is complete."""
    resume: bool = True
    """Continue an interrupted run of the same config; False starts again."""

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.objective != "ce" and self.targets is None:
            raise ValueError(
                f"objective {self.objective!r} learns from kNN targets, got targets=None; "
                'build them with `mdkernels targets`, or use objective "ce"'
            )
        if self.kl_weight is not None:
            check_number("kl_weight", self.kl_weight, least=0.0, most=1.0)
            if self.objective != "kl_ce":
                raise ValueError(
                    f'kl_weight belongs to objective "kl_ce", got {self.kl_weight} with '
                    f"{self.objective!r}; leave it out"
                )
        check_integer("block", self.block, 1)
        if self.stride is not None:
            check_integer("stride", self.stride, 1, self.block)
        for name in ("batch_size", "grad_accum", "log_every", "keep"):
            check_integer(name, getattr(self, name), 1)
        for name in ("max_steps", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("compile", "activation_checkpointing", "keep_best", "overwrite", "resume"):
            check_switch(name, getattr(self, name))
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"give one of epochs and max_steps, got epochs={self.epochs!r} and "
                f"max_steps={self.max_steps!r}"
            )
        if self.epochs is not None:
            check_number("epochs", self.epochs, above=0.0)
        check_number("lr", self.lr, above=0.0)
        check_number("weight_decay", self.weight_decay, least=0.0)
        if self.clip is not None:
            check_number("clip", self.clip, above=0.0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, least=0.0, below=1.0)
        check_choice("parallel", self.parallel, PARALLEL)
        if self.compile and self.parallel == "fsdp2":
            raise ValueError(
                'compile is not supported with parallel "fsdp2": leave one out, or use "ddp"'
            )
        self._check_lora()
        if self.patience is not None:
            check_integer("patience", self.patience, 1)
        if self.best_kept and self.eval_every is None:
            name = "keep_best" if self.patience is None else "patience"
            raise ValueError(f"{name} compares evaluations during training: give eval_every")
        if not isinstance(self.out, (str, os.PathLike)):
            raise ValueError(f"out: expected a directory to write, got {self.out!r}")
        if self.track is not None and not isinstance(self.track, (list, tuple)):
            raise ValueError(f"track: expected a list of names, got {self.track!r}")
        if (self.valid is None) != (self.base is None):
            missing = "base" if self.base is None else "valid"
            raise ValueError(
                f"valid and base belong together (the mixture perplexity during training), "
                f"{missing} is None"
            )

    def _check_lora(self) -> None:
        if self.lora is None:
            given = {"lora_alpha": None, "lora_dropout": 0.0, "lora_targets": "all-linear"}
            for name, default in given.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} belongs to low-rank adapters, got {getattr(self, name)!r} without "
                        "a rank; give lora (--lora RANK) or leave it out"
                    )
            return
        check_integer("lora", self.lora, 1)
        if self.lora_alpha is not None:
            check_number("lora_alpha", self.lora_alpha, above=0.0)
        check_number("lora_dropout", self.lora_dropout, least=0.0, below=1.0)
        if not self.lora_targets or not isinstance(self.lora_targets, (str, list, tuple)):
            raise ValueError(
                f'lora_targets: expected names of layers or "all-linear", got {self.lora_targets!r}'
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """From plain settings, for example a JSON file. Unknown names raise ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
                raise ValueError(f"unknown setting {name!r}: {hint}")
        return cls(**settings)

    def identity(self) -> dict[str, Any]:
        """The settings that decide which model comes out, as JSON-able values."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _NOT_IDENTITY
        }
        resolved: dict[str, Any] = {
            "betas": list(self.betas),
            "stride": self.scored,
            "kl_weight": self.beta,
        }
        if self.lora is not None:
            resolved["lora_alpha"] = self.alpha
        if not isinstance(self.lora_targets, str):
            resolved["lora_targets"] = list(self.lora_targets)  # as JSON gives it back
        if self.best_kept:
            resolved["eval_every"] = self.eval_every
        return settings | resolved

    @property
    def best_kept(self) -> bool:
        """Whether `out` holds the best evaluated step rather than the last."""
        return self.keep_best or self.patience is not None

    @property
    def alpha(self) -> float:
        """Numerator of the adapters' scale."""
        return 2.0 * self.lora if self.lora_alpha is None else float(self.lora_alpha)

    @property
    def scored(self) -> int:
        """Rows scored per window: `stride`, or its default."""
        return max(1, self.block // 2) if self.stride is None else self.stride

    @property
    def beta(self) -> float:
        """Weight of KL in the loss, in [0, 1], whatever the objective."""
        if self.objective == "kl_ce":
            return 0.5 if self.kl_weight is None else float(self.kl_weight)
        return {"kl": 1.0, "ce": 0.0}[self.objective]


def resolve_device(name: str) -> torch.device:
    """The device `name` stands for, "auto" being a GPU if there is one. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
