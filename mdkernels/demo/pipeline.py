"""The method, stage by stage, through the functions that `mdkernels <stage>` runs.

text -> tokenizer -> corpora -> base model -> datastore -> index -> targets
     -> CE-only memory, Memory Decoder memory -> scores, text
"""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..corpus import Corpus
from ..datastore import build_datastore, open_datastore
from ..evaluate import evaluate
from ..generate import generate
from ..index import build_index, open_index
from ..models import load_model
from ..scoring import knn_logprobs
from ..targets import build_targets, open_targets
from ..train import TrainConfig, train
from .live import compare_losses
from .recipe import Machine, Recipe
from .reuse import Stages
from .scores import EarlyStopping, Scorer, Scores, difference, open_scores, summary
from .text import build_text, choose_prompts, documents

MEMORIES = {"memory-ce": "ce", "memory": "kl_ce"}
"""Stage name -> objective. The first is the control: same size, steps, seed and batch order."""

PROMPTS = 4
PROMPT_TOKENS = 24
NEW_TOKENS = 64


class Demo:
    """One run of the demo in `work`; `run` returns what the report shows."""

    def __init__(self, recipe: Recipe, machine: Machine, stages: Stages):
        self.recipe, self.machine, self.stages = recipe, machine, stages
        self.work = stages.work
        self.settings = dataclasses.asdict(recipe) | dataclasses.asdict(machine)

    def path(self, stage: str) -> Path:
        return self.work / stage

    def run(self) -> dict[str, Any]:
        self.corpora, self.tokenizer = build_text(self.recipe, self.stages)
        self.scorer = Scorer(self.corpora, self.recipe, self.machine)
        base = self.base()
        targets = self.targets()
        scores = {"base": base, "knn": self.knn()}
        curves = {}
        for stage in MEMORIES:
            curves[stage], scores[stage], scores[f"{stage} best"] = self.memory(stage, base)
        rows = {name: summary(s, base if name != "base" else None) for name, s in scores.items()}
        ours = scores["memory"]
        others = [name for name in scores if name not in ("base", "memory", "memory best")]
        return {
            "rows": rows,
            "curves": curves,
            "differences": {name: difference(ours, scores[name], base) for name in others},
            "targets": targets,
            "losses": self.losses(),
            "checked": self.checked(),
            "generations": self.generations(rows["memory"]["mixture"]["mix_weight"]),
            "corpora": {name: corpus.num_rows for name, corpus in self.corpora.items()},
        }

    def base(self) -> Scores:
        """Train a small model on the general text, then score it on the domain."""
        recipe = self.recipe

        def make(path: Path) -> str:
            torch.manual_seed(recipe.seed)
            model = LlamaForCausalLM(self._architecture())
            config = self._train_config(path, self.corpora["general"], "ce", recipe.base_lr)
            warmup = recipe.base_steps // 20
            config |= {"model": model, "max_steps": recipe.base_steps, "warmup_steps": warmup}
            result = train(TrainConfig(**config, tokenizer=self.path("tokenizer")))
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            return f"{millions:.2f} M parameters, {_speed(result)}"

        self.stages.run(
            "base", make, _model_directory, settings=self.settings, after=("corpus-general",)
        )
        return self.stages.run(
            "scores-base",
            lambda path: self._save(path, self.scorer.score(self._load("base"), "base")),
            lambda path: open_scores(path, self.scorer.rows),
            settings=self.settings,
            after=("base", "corpus-valid", "corpus-test"),
        )

    def targets(self) -> dict[str, Any]:
        """Datastore of the domain text, exact index, and the kNN distribution of every row."""
        self._keys("datastore", "domain")
        self.datastore = open_datastore(self.path("datastore"))

        def make_index(path: Path) -> str:
            build_index(self.datastore, path, factory="exact", overwrite=True)
            return "exact search"

        self.index = self.stages.run(
            "index",
            make_index,
            lambda path: open_index(path, self.datastore),
            settings="exact",
            after=("datastore",),
        )
        options = {
            "num_neighbors": self.recipe.num_neighbors,
            "relative_temperature": self.recipe.temperature,
        }

        def make(path: Path) -> str:
            built = build_targets(self.datastore, self.index, path, overwrite=True, **options)
            return f"K = {self.recipe.num_neighbors}, {built.nnz / built.num_rows:.0f} tokens a row"

        self.target_store = self.stages.run(
            "targets", make, open_targets, settings=options, after=("datastore", "index")
        )
        return self.target_store.meta["config"] | self.target_store.meta["stats"]

    def knn(self) -> Scores:
        """The retriever itself at test time: what the memory imitates without a datastore."""

        def make(path: Path) -> str:
            options = {
                "num_neighbors": self.recipe.num_neighbors,
                "knn_temperature": self.target_store.knn_temperature,
            }
            found = []
            for name in ("valid", "test"):
                queries = open_datastore(self.path(f"queries-{name}"))
                keys, labels = (
                    torch.from_numpy(queries.keys[:]),
                    torch.from_numpy(queries.values[:]),
                )
                found.append(knn_logprobs(self.index, self.datastore, keys, labels, **options))
            return self._save(path, Scores(*found))

        for name in ("valid", "test"):
            self._keys(f"queries-{name}", name)
        return self.stages.run(
            "scores-knn",
            make,
            lambda path: open_scores(path, self.scorer.rows),
            settings=self.settings,
            after=("targets", "queries-valid", "queries-test"),
        )

    def memory(self, stage: str, base: Scores) -> tuple[list[dict[str, Any]], Scores, Scores]:
        """Train one memory from the base; its valid curve, scores at the end and at its best."""
        recipe, objective = self.recipe, MEMORIES[stage]
        folder = self.path(f"{stage}-scores")

        def make(path: Path) -> str:
            config = self._train_config(path, self.corpora["domain"], objective, recipe.memory_lr)
            config |= {
                "model": self.path("base"),
                "targets": self.path("targets"),
                "max_steps": recipe.memory_steps,
                "eval_every": -(-recipe.memory_steps // recipe.evaluations),
            }
            hook = EarlyStopping(self.scorer, base, folder, recipe.memory_steps, stage)
            return _speed(train(TrainConfig(**config), on_eval=hook))

        def open_result(path: Path):
            _model_directory(path)
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            curve = [row for row in map(json.loads, lines) if "eval" in row]
            opened = [open_scores(folder / f"{when}.npz", self.scorer.rows) for when in MOMENTS]
            return [{"step": row["step"], **row["eval"]} for row in curve], *opened

        return self.stages.run(
            stage,
            make,
            open_result,
            settings=[self.settings, objective],
            after=("base", "scores-base", "targets", "corpus-domain"),
        )

    def losses(self) -> dict[str, Any]:
        """The fused loss against eager torch on one training batch of targets."""
        recipe = self.recipe

        def make(path: Path) -> str:
            count = min(recipe.batch_size * recipe.context, self.target_store.num_rows)
            targets = self.target_store.rows(0, count).to(self.machine.device)
            labels = torch.from_numpy(self.datastore.values[:count].astype(np.int64))
            dtype = self.machine.autocast or torch.float32
            found = compare_losses(
                targets, labels.to(self.machine.device), recipe.vocab_size, dtype
            )
            path.write_text(json.dumps(found) + "\n")
            times = found["milliseconds"]
            return ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())

        return self.stages.run(
            "losses", make, _read_json, settings=self.settings, after=("targets",)
        )

    def checked(self) -> dict[str, Any]:
        """The same mixture once more through `mdkernels evaluate`, in fp32 throughout."""

        def make(path: Path) -> str:
            options = {"block": self.recipe.context, "stride": self.recipe.context}
            options |= {"valid": self.corpora["valid"], "out": path, "overwrite": True}
            options["plot"] = False  # quality.png has the curve
            with redirect_stdout(
                io.StringIO()
            ):  # it prints a table, and there will be a fuller one
                found = evaluate(
                    self.path("base"), self.path("memory"), self.corpora["test"], **options
                )
            return f"mixture perplexity {found['mixture']['perplexity']:.1f} in fp32"

        after = ("base", "memory", "corpus-valid", "corpus-test")
        return self.stages.run("eval.json", make, _read_json, settings=self.settings, after=after)

    def generations(self, mix_weight: float) -> list[dict[str, str]]:
        """Continuations of held-out docstrings by base and mixture, from the same random stream."""

        def make(path: Path) -> str:
            prompts, truths = choose_prompts(
                documents(self.path("text") / "test.jsonl"),
                self.tokenizer,
                prompt_tokens=PROMPT_TOKENS,
                truth_tokens=NEW_TOKENS,
                count=PROMPTS,
            )
            found = generate(
                self.path("base"),
                self.path("memory"),
                prompts,
                mix_weight=mix_weight,
                max_new_tokens=NEW_TOKENS,
                temperature=0.5,
                top_p=0.9,
                seed=self.recipe.seed,
                side_by_side=True,
            )
            texts = [
                {"prompt": one["prompt"], "base": one["base"], "mixture": one["mixture"]}
                | {"truth": truth}
                for one, truth in zip(found, truths, strict=True)
            ]
            path.write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")
            return f"{len(prompts)} prompts, {NEW_TOKENS} tokens each"

        return self.stages.run(
            "generations",
            make,
            _read_json,
            settings=[self.settings, mix_weight],
            after=("memory", "text"),
        )

    def _keys(self, stage: str, corpus: str) -> None:
        def make(path: Path) -> str:
            options = {"block": self.recipe.context, "stride": self.recipe.context}
            built = build_datastore(
                self.corpora[corpus], self.path("base"), path, overwrite=True, **options
            )
            return f"{built.num_rows:,} keys of width {built.dim}"

        after = ("base", f"corpus-{corpus}")
        self.stages.run(stage, make, open_datastore, settings=self.recipe.context, after=after)

    def _train_config(self, out: Path, corpus: Corpus, objective: str, lr: float) -> dict[str, Any]:
        return {
            "corpus": corpus,
            "out": out,
            "objective": objective,
            "block": self.recipe.context,
            "stride": self.recipe.context,
            "batch_size": self.recipe.batch_size,
            "lr": lr,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "seed": self.recipe.seed,
            "device": self.machine.device,
            "dtype": self.machine.dtype,
            "compile": self.machine.compile,
            "save_every": None,
            "resume": False,
            "overwrite": True,
        }

    def _architecture(self) -> LlamaConfig:
        recipe = self.recipe
        return LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.mlp_size,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            # The usual 0.02 is for wide models; at this width it costs 0.4 nats after 200 steps.
            initializer_range=recipe.hidden_size**-0.5,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def _load(self, stage: str):
        return load_model(self.path(stage), dtype=torch.float32, device=self.machine.device)

    def _save(self, path: Path, scores: Scores) -> str:
        scores.save(path)
        return f"{len(scores.valid):,} valid and {len(scores.test):,} test tokens"


MOMENTS = ("last", "best")


def _model_directory(path: Path) -> Path:
    """Raises OSError unless a finished training run lies there."""
    for name in ("meta.json", "config.json", "model.safetensors", "tokenizer.json"):
        (path / name).stat()
    return path


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _speed(result) -> str:
    return f"{result.steps} steps, {result.tokens_per_s:,.0f} tokens/s"
