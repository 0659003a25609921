"""The command line as a table: which stages there are, and the options of each.

An option's name is the argument of the stage's function; its default here is shown in --help and
equal to the function's (a test compares them). Units and ranges stand in the help text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One flag. `default` True or False makes it a switch."""

    name: str
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    many: bool = False
    required: bool = False
    nullable: bool = False
    """Whether null in a config file stands for none, beside a default that is something."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Stage:
    """One subcommand. `command` is its function in cli_commands.py, `target` the stage's own."""

    name: str
    summary: str
    command: str
    target: str
    example: str
    options: tuple[Option, ...] = ()
    continues: bool = True
    """Whether a run that was cut off leaves something to go on from."""


def _path(name: str, help_text: str, **more: Any) -> Option:
    return Option(name, help_text, metavar="PATH", **more)


def _model(name: str, help_text: str, **more: Any) -> Option:
    return Option(name, help_text + ": directory or hub id", metavar="MODEL", **more)


def _number(name: str, help_text: str, default: float | None = None, **more: Any) -> Option:
    return Option(name, help_text, default, type=float, metavar="X", **more)


def _count(name: str, help_text: str, default: int | None = None, **more: Any) -> Option:
    return Option(name, help_text, default, type=int, metavar="N", **more)


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_count_or_auto.__name__ = "N|auto"  # argparse names the type so when it refuses a value


def _windows(batch_size: int, of_batch: str = "windows per forward pass") -> tuple[Option, ...]:
    return (
        _count("block", "input tokens per window", 1024),
        _count("stride", "scored tokens per window, its last ones (default: half of block)"),
        _count("batch_size", of_batch, batch_size),
    )


_OVERWRITE = Option("overwrite", "replace a finished result, once the new one is complete", False)
_DEVICE = Option("device", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", "auto")
_DTYPE = Option("dtype", "arithmetic", "float32", choices=("float32", "bfloat16"))
_CORPUS = _path("corpus", "corpus directory", required=True)

CORPUS = Stage(
    "corpus",
    "turn text into token ids",
    "corpus",
    "mdkernels.corpus:build_corpus",
    "mdkernels corpus --inputs law.train.txt.xz --tokenizer gpt2 --out run/corpus",
    (
        Option(
            "inputs",
            "UTF-8 .txt or .jsonl files (also .gz, .xz), directories of them, or hf:NAME[:CONFIG]; "
            "in .txt a line <|endoftext|> separates documents",
            metavar="PATH",
            many=True,
            required=True,
        ),
        _model("tokenizer", "tokenizer", required=True),
        _path("out", "corpus directory to write", required=True),
        Option("text_field", "field of .jsonl records and datasets", "text", metavar="NAME"),
        Option("split", "split of hf: datasets", "train", metavar="NAME"),
        _OVERWRITE,
    ),
)

DATASTORE = Stage(
    "datastore",
    "store a key and the next token for every position of a corpus",
    "datastore",
    "mdkernels.datastore:build_datastore",
    "mdkernels datastore --corpus run/corpus --model gpt2-xl --out run/datastore",
    (
        _CORPUS,
        _model("model", "key model", required=True),
        _path("out", "datastore directory to write", required=True),
        *_windows(8),
        Option(
            "dtype",
            "arithmetic of the key model; auto: that of its checkpoint",
            "auto",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
        _DEVICE,
        _OVERWRITE,
    ),
)

INDEX = Stage(
    "index",
    "make the keys of a datastore searchable",
    "index",
    "mdkernels.index:build_index",
    "mdkernels index --datastore run/datastore --out run/index",
    (
        _path("datastore", "datastore directory", required=True),
        _path("out", "index directory to write", required=True),
        Option("factory", "exact, or faiss: IVF4096,PQ64, HNSW32, ...", "exact", metavar="NAME"),
        _count("nprobe", "cells that an IVF index visits per query", 32),
        _count("train_rows", "keys faiss trains on (default: 64 per cell, at least 65536)"),
        _count("seed", "seed of that sample", 0),
        _DEVICE,
        _OVERWRITE,
    ),
)

TARGETS = Stage(
    "targets",
    "turn the neighbours of every position into sparse next-token distributions",
    "targets",
    "mdkernels.targets:build_targets",
    "mdkernels targets --datastore run/datastore --index run/index --out run/targets",
    (
        _path("datastore", "datastore directory", required=True),
        _path("index", "index directory of that datastore", required=True),
        _path("out", "targets directory to write", required=True),
        _count("num_neighbors", "neighbours searched per position, itself among them", 1024),
        _number("knn_temperature", "divides squared L2 distances, in squared key units"),
        _number(
            "relative_temperature",
            "the same in mean squared distances of two keys (default: 0.05, unless the other is "
            "given)",
        ),
        Option("probs_dtype", "stored probabilities", "float32", choices=("float32", "float16")),
        _count("batch_size", "rows searched at once", 4096),
        _DEVICE,
        _OVERWRITE,
    ),
)

IMPORT_TARGETS = Stage(
    "import-targets",
    "turn targets of the authors' code into a targets directory",
    "import_targets",
    "mdkernels.integrations.official:import_targets",
    "mdkernels import-targets --path knn_gpt2_train_1600.arrow --corpus run/corpus "
    "--out run/targets",
    (
        _path("path", "knn_*.arrow file of the authors' code", required=True),
        _path("corpus", "corpus whose positions its rows are, in order", required=True),
        _path("out", "targets directory to write", required=True),
        _OVERWRITE,
    ),
)

TRAIN = Stage(
    "train",
    "train a memory model on targets, or any causal LM on plain text",
    "train",
    "mdkernels.train:TrainConfig",
    "mdkernels train --corpus run/corpus --targets run/targets --model gpt2 --epochs 10 "
    "--out run/memory",
    (
        _CORPUS,
        _path(
            "targets",
            "targets directory of that corpus, or the authors' .arrow file; none for objective ce",
        ),
        _model("model", "initial model", required=True),
        _path("out", "model directory to write", required=True),
        _model("tokenizer", "tokenizer, if the model directory has none"),
        Option(
            "objective",
            "kl_ce: Memory Decoder; kl: targets only; ce: language modelling; of a base "
            "model that is domain-adaptive pre-training (DAPT) of all its weights",
            "kl_ce",
            choices=("kl_ce", "kl", "ce"),
        ),
        _number("kl_weight", "weight of KL in kl_ce, 0..1, the paper's beta (default: 0.5)"),
        *_windows(16, "windows per forward pass, in each process"),
        _count("grad_accum", "forward passes per optimizer step", 1),
        _number("epochs", "passes over the corpus; this or --max-steps is needed"),
        _count("max_steps", "optimizer steps"),
        _number("lr", "peak learning rate of AdamW", 1e-3),
        Option(
            "schedule",
            "learning rate after warm-up",
            "cosine",
            choices=("cosine", "linear", "constant"),
        ),
        _count("warmup_steps", "optimizer steps of linear warm-up", 0),
        _number("weight_decay", "decoupled decay of matrices, per unit of lr", 0.0),
        _number("clip", "largest gradient norm; null in a config file: any", 1.0, nullable=True),
        _count("lora", "train low-rank adapters of this rank only, merged at the end; needs peft"),
        _number("lora_alpha", "scale of the adapters times their rank (default: 2 * rank)"),
        _number("lora_dropout", "dropout in front of the adapters, 0..1", 0.0),
        Option(
            "lora_targets",
            "layers that get adapters",
            "all-linear",
            metavar="NAME",
            many=True,
        ),
        _count("seed", "seed of window order and dropout", 0),
        _DEVICE,
        _DTYPE,
        Option("compile", "torch.compile the trunk: 10-30 s once, then faster steps", False),
        Option("activation_checkpointing", "recompute blocks in the backward: less memory", False),
        Option(
            "parallel",
            "with torchrun or accelerate launch; fsdp2 cuts weights and moments by process",
            "auto",
            choices=("auto", "ddp", "fsdp2"),
        ),
        _path("valid", "corpus for the mixture perplexity during training; needs --base"),
        _model("base", "base model for that perplexity"),
        _count("eval_every", "optimizer steps between evaluations (default: only at the end)"),
        _count("patience", "stop after N evaluations without a new best; implies --keep-best"),
        Option("keep_best", "keep the best step instead of the last; needs --eval-every", False),
        Option(
            "monitor",
            "number of the evaluation that decides which is best, smaller being better",
            "mixture_perplexity",
            metavar="NAME",
        ),
        Option("track", "log to tensorboard, wandb, ... too", metavar="NAME", many=True),
        _count("log_every", "optimizer steps between reads of the loss on a GPU", 10),
        _count(
            "save_every",
            "optimizer steps between checkpoints; null in a config file: none",
            500,
            nullable=True,
        ),
        _count("keep", "newest checkpoints kept", 1),
        Option("resume", "continue an interrupted run of the same options", True),
        _OVERWRITE,
    ),
)

EVALUATE = Stage(
    "evaluate",
    "perplexity of base, memory and mixture, with a fitted mix weight",
    "evaluate",
    "mdkernels.evaluate:evaluate",
    "mdkernels evaluate --base gpt2-xl --memory run/memory --corpus run/test --valid run/valid "
    "--out run/eval.json",
    (
        _model("base", "base model", required=True),
        _model("memory", "memory model, or several", many=True),
        _path("corpus", "test corpus directory", required=True),
        _path("valid", "corpus directory to fit the mix weight on"),
        _number("mix_weight", "share of each memory, 0..1, instead of a fit", many=True),
        _path("out", "JSON file to write"),
        *_windows(8),
        _DEVICE,
        _DTYPE,
        Option("compile", "torch.compile the trunks; pays on a large corpus", False),
        Option("plot", "draw the mix-weight curve beside --out, if matplotlib is there", True),
        _OVERWRITE,
    ),
    continues=False,
)

_OWN = "(default: {}, or the saved mixture's own)"
_MEMORY = _model("memory", "memory model, or several; none with a saved mixture", many=True)
_MIX_WEIGHT = _number("mix_weight", f"share of each memory, 0..1 {_OWN.format(0.5)}", many=True)

GENERATE = Stage(
    "generate",
    "continue a prompt with the mixture",
    "generate",
    "mdkernels.generate:generate",
    "mdkernels generate --base gpt2-xl --memory run/memory --mix-weight 0.55 --side-by-side "
    '--prompt "The Court held that"',
    (
        _model("base", "base model, or a saved mixture", required=True),
        _MEMORY,
        Option("prompt", "text to continue, or several", metavar="TEXT", many=True, required=True),
        _model("tokenizer", "tokenizer, if the base directory has none"),
        _MIX_WEIGHT,
        _number("memory_temperature", f"divides the memory's logits {_OWN.format(1)}"),
        _count("max_new_tokens", "tokens to add at most", 128),
        _number("temperature", "of sampling; 0: greedy", 0.0),
        _count("top_k", "sample among the k most likely tokens; 0: all", 0),
        _number("top_p", "sample among the tokens that hold this mass, 0..1", 1.0),
        _number("min_p", "drop tokens below this fraction of the most likely one, 0..1", 0.0),
        _count("seed", "seed of sampling", 0),
        Option(
            "draft_tokens",
            "tokens that the memory drafts per pass of the base; auto: as many as pay; 0: none",
            0,
            type=_count_or_auto,
            metavar="N|auto",
        ),
        Option("side_by_side", "also continue with the base alone", False),
        Option("quiet", "print when done instead of token by token", False),
        _DEVICE,
        _DTYPE,
    ),
    continues=False,
)

CHAT = Stage(
    "chat",
    "talk with the mixture, line by line, until Ctrl-D",
    "chat",
    "mdkernels.chat:chat",
    "mdkernels chat --base Qwen/Qwen2.5-1.5B-Instruct --memory run/memory --temperature 0.7",
    (
        _model("base", "base model (one with a chat template), or a saved mixture", required=True),
        _MEMORY,
        _model("tokenizer", "tokenizer, if the base directory has none"),
        _MIX_WEIGHT,
        _count("max_new_tokens", "tokens of a reply at most", 128),
        _number("temperature", "of sampling; 0: greedy", 0.0),
        _count("seed", "seed of sampling", 0),
        _DEVICE,
        _DTYPE,
    ),
    continues=False,
)

DEMO = Stage(
    "demo",
    "run the whole method on the docstrings of the installed packages",
    "demo",
    "mdkernels.demo:run",
    "mdkernels demo --out demo-out",
    (
        _path("out", "directory for table, plots and models", default="demo-out"),
        Option("short", "a few steps of everything, to see that it runs", False),
    ),
)

DOCTOR = Stage(
    "doctor",
    "show versions, the CPU and GPU, and which backends run",
    "doctor",
    "mdkernels.ops.doctor:report",
    "mdkernels doctor",
    continues=False,
)

STAGES = (
    CORPUS,
    DATASTORE,
    INDEX,
    TARGETS,
    IMPORT_TARGETS,
    TRAIN,
    EVALUATE,
    GENERATE,
    CHAT,
    DEMO,
    DOCTOR,
)
