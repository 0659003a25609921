"""Arguments of the wrong type in the Python functions of the stages: the message names them."""

import math

import numpy as np
import pytest
import torch
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer
from train_fixtures import make_corpus, make_targets

from mdkernels import SparseTargets
from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.decode import decode
from mdkernels.evaluate import evaluate, gold_logprobs
from mdkernels.integrations import SparseTargetsCollator, causal_lm_loss, from_topk_logprobs
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_scoring import MixtureScorer
from mdkernels.targets import build_targets

IDS = torch.ones(1, 3, dtype=torch.int64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    corpus = make_corpus(root / "corpus")
    make_targets(corpus, root)
    return root, corpus


def refused(name, function, *args, **options):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}( must be|:).* got "):
        function(*args, **options)


@pytest.mark.parametrize("value", ["a", [3], {}])
def test_stages(made, value):
    root, corpus = made
    llama = tiny_model("llama")
    documents = tiny_documents(2)
    refused("out", build_corpus, documents, tiny_tokenizer(), 3, as_text=True)
    for name in ("block", "stride", "batch_size", "checkpoint_seconds"):
        options = {"block": 32, name: value}
        refused(name, build_datastore, corpus, llama, root / "new", **options)
    refused("model", build_datastore, corpus, 3, root / "new", block=32)
    names = ("num_neighbors", "knn_temperature", "relative_temperature", "batch_size")
    for name in (*names, "checkpoint_seconds"):
        store, index = root / "datastore", root / "index"
        refused(name, build_targets, store, index, root / "new", **{name: value})
    refused("base", evaluate, 3, llama, corpus, mix_weight=0.5, block=32)
    refused("memory", evaluate, llama, [3], corpus, mix_weight=0.5, block=32)
    refused("model", gold_logprobs, value, corpus, block=32)
    refused("autocast", gold_logprobs, llama, corpus, block=32, autocast=value)
    assert not (root / "new").exists()


@pytest.mark.parametrize("value", ["a", [3], {}])
def test_mixtures(value):
    models = tiny_model("llama"), tiny_model("gpt2")
    mixture = MemoryMixture(*models)
    refused("mixture", decode, value, IDS)
    refused("mixture", MixtureScorer, value)
    refused("input_ids", decode, mixture, value)
    refused("input_ids", mixture, value)
    refused("labels", mixture, IDS, labels=value)
    refused("memory_temperature", MemoryMixture, *models, memory_temperature=value)


@pytest.mark.parametrize("value", ["a", [3], {}])
def test_batches(value):
    example = {"input_ids": [1, 2, 3], "shift_labels": [2, 3, 4]}
    batch = SparseTargetsCollator()([example | {"targets": SparseTargets.empty(3)}])
    for name in ("input_ids", "shift_labels", "targets"):
        refused("batch", causal_lm_loss, tiny_model("llama"), batch | {name: value})
    with pytest.raises(ValueError, match="examples: number 1 is int, expected a mapping"):
        SparseTargetsCollator()([example, 3])


def test_what_is_as_good_is_taken(made, tmp_path):
    """Numbers of numpy, no limit, text that is a number, any iterable."""
    _, corpus = made
    options = {"block": 32, "checkpoint_seconds": math.inf}
    assert build_datastore(corpus, tiny_model("llama"), tmp_path / "a", **options).num_rows
    options["checkpoint_seconds"] = np.float32(60)
    assert build_datastore(corpus, tiny_model("llama"), tmp_path / "b", **options).num_rows
    for rows in (np.array([0, 5]), iter((0, 5))):
        assert len(gold_logprobs(tiny_model("llama"), corpus, block=32, rows=rows)) == 5
    targets = SparseTargets.empty(2)
    assert SparseTargets.cat({1: targets, 2: targets}.values()).num_rows == 4
    ids, logprobs = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]).log()
    assert from_topk_logprobs(ids, logprobs, temperature="2").probs.tolist() == [0.5, 0.5]
