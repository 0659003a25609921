"""A corpus with real kNN targets, and training settings small enough for tests."""

from __future__ import annotations

import importlib.util

import pytest
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer

from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.index import build_index
from mdkernels.targets import build_targets
from mdkernels.train import TrainConfig

BLOCK, STRIDE = 32, 16
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed (the lora extra)"
)


def make_corpus(path, count=12, seed=0):
    documents = tiny_documents(count, seed=seed)
    return build_corpus(documents, tiny_tokenizer(), path, as_text=True)


def make_targets(corpus, root):
    """Targets of `corpus` from the keys of a tiny model, in `root`/targets."""
    datastore = build_datastore(
        corpus, tiny_model("llama"), root / "datastore", block=BLOCK, stride=STRIDE
    )
    index = build_index(datastore, root / "index")
    temperature = 0.05 * datastore.mean_squared_distance()
    return build_targets(
        datastore, index, root / "targets", num_neighbors=16, knn_temperature=temperature
    )


def make_data(root):
    """(corpus, its targets) under `root`: what `config` takes."""
    corpus = make_corpus(root / "corpus")
    return corpus, make_targets(corpus, root)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


class Stop(Exception):
    """Stands for whatever ends a run."""


def config(data, out, **changes) -> TrainConfig:
    """Twelve steps of a tiny Llama on `data` = (corpus, targets), with `changes`."""
    corpus, targets = data
    settings = {
        "corpus": corpus,
        "targets": targets,
        "model": tiny_model("llama", seed=3),
        "tokenizer": tiny_tokenizer(),
        "out": out,
        "block": BLOCK,
        "stride": STRIDE,
        "batch_size": 4,
        "max_steps": 12,
        "lr": 3e-3,
        "device": "cpu",
    }
    if changes.get("objective") == "ce":
        del settings["targets"]
    if "epochs" in changes:
        del settings["max_steps"]
    return TrainConfig(**settings | changes)


def steps(result):
    """The rows of metrics.jsonl that are optimizer steps."""
    return [row for row in result.metrics if "loss" in row]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
