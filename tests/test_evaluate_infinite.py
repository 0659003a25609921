"""Perplexities that are infinite: what the report says, and files that any JSON parser reads."""

import json
import math
import warnings

import pytest
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer
from train_fixtures import config, make_data

from mdkernels import evaluate as stage
from mdkernels.corpus import build_corpus
from mdkernels.train import train

ZEROS = range(5, 9)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora") / "test"
    return build_corpus(tiny_documents(6, seed=3), tiny_tokenizer(), path, as_text=True)


def strict(text):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def zero_for(monkeypatch):
    """`zero_for("base")` has the base give probability 0 to the tokens `ZEROS`."""
    score = stage.gold_logprobs

    def patch(*labels):
        def scored(model, corpus, *, label, **options):
            found = score(model, corpus, label=label, **options).clone()
            if label in labels:
                found[ZEROS] = -math.inf
            return found

        monkeypatch.setattr(stage, "gold_logprobs", scored)

    return patch


def test_a_base_that_gives_a_token_probability_0(corpus, tmp_path, zero_for, capsys):
    zero_for("base")
    out = tmp_path / "eval.json"
    base, memory = tiny_model("gpt2"), tiny_model("llama", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = stage.evaluate(base, memory, corpus, mix_weight=0.5, block=32, out=out)
    assert report["base"]["perplexity"] == report["mixture"]["gain_nats"] == math.inf
    written = strict(out.read_text())
    assert written["base"]["nats_per_token"] is None
    assert written["base"]["perplexity"] is None
    assert written["base"]["perplexity_interval"][1] is None
    assert written["base"]["zero_probability_tokens"] == len(ZEROS)
    assert written["memories"] == report["memories"]
    assert written["mixture"]["curve"][0] == [0.0, None]
    for name in ("perplexity", "perplexity_interval", "zero_probability_tokens"):
        assert written["mixture"][name] == report["mixture"][name]
    assert written["mixture"]["zero_probability_tokens"] == 0
    assert "base: probability 0 for 4 of these tokens" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_token_that_base_and_memory_give_probability_0(corpus, tmp_path, zero_for, weight):
    zero_for("base", "memory")
    out = tmp_path / "eval.json"
    models = tiny_model("gpt2"), tiny_model("llama", seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        stage.evaluate(*models, corpus, mix_weight=weight, block=32, out=out)
    mixture = strict(out.read_text())["mixture"]
    assert mixture["zero_probability_tokens"] == len(ZEROS)
    assert mixture["perplexity"] is None
    assert mixture["gain_nats"] is None
    assert mixture["gain_interval"] == [None, None]


def test_a_perplexity_that_is_no_double(corpus, tmp_path):
    model = tiny_model("llama", seed=1)
    model.lm_head.weight.data *= 1e4
    stage.evaluate(model, None, corpus, block=32, out=tmp_path / "eval.json")
    base = strict((tmp_path / "eval.json").read_text())["base"]
    assert base["perplexity"] is None
    assert base["nats_per_token"] > 710
    assert base["zero_probability_tokens"] == 0


def test_metrics_of_an_evaluation_that_is_infinite(tmp_path):
    data, out = make_data(tmp_path), tmp_path / "out"
    infinite = {"perplexity": math.inf, "gain": math.nan, "steps": 3}
    result = train(config(data, out, max_steps=1), on_eval=lambda *_: infinite)
    rows = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval"] == {"perplexity": None, "gain": None, "steps": 3}
    assert result.metrics == rows
