"""Scoring and `evaluate` against a per-window fp64 computation that shares no code with them."""

import json
import math
import os

import numpy as np
import pytest
import scoring_fixtures
import torch
from pipeline_fixtures import tiny_model, tiny_tokenizer
from scoring_fixtures import naive_logprobs
from train_fixtures import make_corpus

from mdkernels import linear_token_logprobs, token_logprobs
from mdkernels.evaluate import MixtureEval, evaluate, gold_logprobs, knn_logprobs
from mdkernels.mix_weight import mixture_logprobs

text = scoring_fixtures.text


def test_evaluate_reports_the_mixture_of_the_test_text(text, tmp_path, capsys):
    corpus, valid = text
    base, memory = tiny_model("gpt2"), tiny_model("llama", seed=1)
    out = tmp_path / "deep" / "eval.json"
    report = evaluate(base, memory, corpus, valid=valid, block=32, stride=16, out=out)

    scores = [naive_logprobs(model, corpus, 32, 16) for model in (base, memory)]
    held_out = [naive_logprobs(model, valid, 32, 16) for model in (base, memory)]
    grid = np.linspace(0, 1, 1001)
    nats = [-float(mixture_logprobs(held_out[0], held_out[1:], [w]).mean()) for w in grid]
    (weight,) = report["mixture"]["mix_weight"]
    assert weight == pytest.approx(grid[int(np.argmin(nats))], abs=1e-3)
    p = (1 - weight) * scores[0].exp() + weight * scores[1].exp()
    expected = {"base": scores[0], "memory": scores[1], "mixture": p.log()}
    found = {**report, "memory": report["memories"][0]}
    for name, logprobs in expected.items():
        mean = -float(logprobs.mean())
        assert found[name]["nats_per_token"] == pytest.approx(mean, abs=1e-6)
        assert found[name]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        bits = mean * corpus.num_rows / math.log(2) / corpus.text_bytes
        assert found[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    gain = float((p.log() - scores[0]).mean())
    assert report["mixture"]["gain_nats"] == pytest.approx(gain, abs=1e-6)
    low, high = report["mixture"]["gain_interval"]
    assert low <= gain <= high
    assert report["mixture"]["fitted_on"] == str(valid.path)
    assert json.loads(out.read_text()) == report
    for part in (report["base"], report["memories"][0], report["mixture"]):
        low, high = part["perplexity_interval"]
        assert low <= part["perplexity"] <= high
    for name, (base, memory) in {"curve": scores, "valid_curve": held_out}.items():
        assert [w for w, _ in report["mixture"][name]] == pytest.approx(np.linspace(0, 1, 21))
        for w, nats in report["mixture"][name]:
            mean = -float(((1 - w) * base.exp() + w * memory.exp()).log().mean())
            assert nats == pytest.approx(mean, abs=1e-6)
    assert out.with_name("eval-curve.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.parent.iterdir()} == {"eval.json", "eval-curve.png"}
    printed = capsys.readouterr().out
    assert f"{report['mixture']['perplexity']:.2f}" in printed
    assert report["interval"]["units"] == 21  # 838 tokens, 41 to a block
    assert "bootstrap of 21 blocks" in printed


def test_intervals_are_of_documents_where_there_are_enough(text, tmp_path):
    corpus = make_corpus(tmp_path / "many", 24, 5)
    base, memory = tiny_model("gpt2"), tiny_model("llama", seed=1)
    report = evaluate(base, memory, corpus, mix_weight=0.4, block=32)
    assert report["interval"]["unit"] == "document"
    assert report["interval"]["units"] == 24
    scores = [gold_logprobs(model, corpus, block=32).double() for model in (base, memory)]
    gain = (mixture_logprobs(scores[0], scores[1:], [0.4]) - scores[0]).numpy()
    owner = np.repeat(np.arange(24), np.diff(corpus.document_offsets))[1:]  # of each row's token
    rng = np.random.default_rng(9)
    documents = [gain[owner == d] for d in range(24)]
    means = [
        np.concatenate([documents[d] for d in rng.integers(0, 24, 24)]).mean() for _ in range(2000)
    ]
    expected = np.quantile(means, [0.025, 0.975])
    assert report["mixture"]["gain_interval"] == pytest.approx(
        expected, abs=0.15 * float(np.diff(expected)[0])
    )


def test_a_plot_is_optional_and_never_overwritten_by_accident(text, tmp_path, monkeypatch):
    corpus, _ = text
    given = {"mix_weight": 0.5, "block": 32, "out": tmp_path / "eval.json"}
    base, memory = tiny_model("gpt2"), tiny_model("llama", seed=1)
    plot = tmp_path / "eval-curve.png"
    plot.write_text("precious")
    with pytest.raises(FileExistsError, match=r"eval-curve\.png exists"):
        evaluate(base, memory, corpus, **given)
    evaluate(base, memory, corpus, plot=False, **given)
    assert plot.read_text() == "precious"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no matplotlib
    evaluate(base, memory, corpus, overwrite=True, **given)
    assert plot.read_text() == "precious"


@pytest.mark.parametrize("source", ["logits", "hidden states"])
def test_bf16_inputs_cost_less_than_1e_5_nats(source):
    """A chain in bf16 arithmetic is off by 7e-3 on such logits: their large values round by 0.03.
    The logits of a bf16 product are its result; that of the same product is scored in fp64."""
    draw = torch.Generator().manual_seed(0)
    rows, vocab, width = 192, 50257, 64
    labels = torch.randint(0, vocab, (rows,), generator=draw)
    found, exact = [], []
    for _ in range(2):
        if source == "logits":  # Zipf's law: a long tail with half of the mass
            rank = torch.stack([torch.randperm(vocab, generator=draw) for _ in range(rows)])
            logits = (12.0 - (rank + 1.0).log()).bfloat16()
            found.append(token_logprobs(logits, labels))
        else:
            hidden = torch.randn(rows, width, generator=draw).bfloat16()
            weight = (torch.randn(vocab, width, generator=draw) * 0.4).bfloat16()
            logits = torch.nn.functional.linear(hidden, weight)
            found.append(linear_token_logprobs(hidden, weight, labels))
        exact.append(logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0])
    nats = -mixture_logprobs(found[0], found[1:], [0.55]).mean()
    expected = -(0.45 * exact[0].exp() + 0.55 * exact[1].exp()).log().mean()
    assert abs(float(nats - expected)) < 1e-5
    for ours, theirs in zip(found, exact, strict=True):
        assert abs(float((ours - theirs).mean())) < 1e-5


def test_base_alone_and_several_memories(text):
    corpus, valid = text
    base = tiny_model("gpt2")
    alone = evaluate(base, None, corpus, block=32)
    assert alone["memories"] == []
    assert "mixture" not in alone
    memories = [tiny_model("llama", seed=1), tiny_model("qwen2", seed=2)]
    both = evaluate(base, memories, corpus, valid=valid, block=32)
    one = evaluate(base, memories[0], corpus, valid=valid, block=32)
    weights = both["mixture"]["mix_weight"]
    assert len(weights) == 2
    # The fit lies on the curve, whose points bound it by convexity.
    curve = both["mixture"]["valid_curve"]
    assert both["mixture"]["valid_nats_per_token"] <= min(nats for _, nats in curve) + 1e-9
    scores = [gold_logprobs(m, corpus, block=32) for m in (base, *memories)]
    ends = [w / sum(weights) for w in weights]
    expected = -float(mixture_logprobs(scores[0], scores[1:], ends).mean())
    assert both["mixture"]["curve"][-1][1] == pytest.approx(expected, abs=1e-9)
    assert both["base"] == alone["base"]
    ours = both["mixture"]["valid_nats_per_token"]
    assert ours <= one["mixture"]["valid_nats_per_token"] + 1e-9
    given = evaluate(base, memories, corpus, mix_weight=[0.0, 0.0], block=32)
    assert given["mixture"]["nats_per_token"] == pytest.approx(alone["base"]["nats_per_token"])


def test_padded_vocabularies_may_differ(text):
    corpus, _ = text
    wide = tiny_model("llama", vocab_size=384, seed=1)
    report = evaluate(tiny_model("gpt2"), wide, corpus, mix_weight=0.5, block=32)
    expected = naive_logprobs(wide, corpus, 32, 16)
    found = report["memories"][0]["nats_per_token"]
    assert found == pytest.approx(-float(expected.mean()), abs=1e-6)


def test_mixture_hook_reports_each_step(text):
    corpus, _ = text
    hook = MixtureEval(tiny_model("gpt2"), corpus, block=32)
    model = tiny_model("llama", seed=1)
    first = hook(model, 1)
    assert hook.base is None
    assert hook(model, 2) == first
    report = evaluate(tiny_model("gpt2"), model, corpus, mix_weight=first["mix_weight"], block=32)
    assert first["base_perplexity"] == pytest.approx(report["base"]["perplexity"])
    assert first["mixture_perplexity"] == pytest.approx(report["mixture"]["perplexity"])


def test_mixture_hook_survives_a_model_that_diverged(text):
    """Above 709 nats per token the perplexity is no double."""
    model = tiny_model("llama", seed=1)
    model.lm_head.weight.data *= 1e4
    found = MixtureEval(tiny_model("gpt2"), text[0], block=32)(model, 1)
    assert found["memory_perplexity"] == math.inf
    assert found["mixture_perplexity"] <= found["base_perplexity"] * (1 + 1e-6)
    assert set(found) == set(MixtureEval.numbers)


class ExhaustiveIndex:
    """Nearest keys by direct subtraction."""

    def __init__(self, keys):
        self.keys = keys

    def search(self, queries, num_neighbors):
        distances = torch.cdist(queries.double(), self.keys.double()).square()
        values, ids = distances.topk(num_neighbors, largest=False)
        return values.float(), ids


def test_knn_logprobs_equal_the_dense_distribution():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 8, generator=generator)
    values = torch.randint(0, 30, (200,), generator=generator, dtype=torch.int32)
    queries = keys[:50] + 0.1 * torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 30, (50,), generator=generator)
    datastore = type("Store", (), {"values": values.numpy()})
    for exclude in (None, torch.arange(50)):
        found = knn_logprobs(
            ExhaustiveIndex(keys),
            datastore,
            queries,
            labels,
            num_neighbors=20,
            knn_temperature=2.0,
            exclude_ids=exclude,
            batch_size=17,
        )
        for i in range(50):
            d = (queries[i].double() - keys.double()).square().sum(1)
            order = d.argsort()[:20]
            if exclude is not None:
                order = order[order != i]
            p = (-d[order] / 2.0).softmax(0)
            mass = float(p[values[order] == labels[i]].sum())
            if mass == 0.0:
                assert found[i] == -math.inf
            else:
                assert float(found[i]) == pytest.approx(math.log(mass), abs=1e-4)


def saved(path, tokenizer, family="llama", **options):
    tiny_model(family, **options).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_other_tokenizers_are_refused_with_hashes_and_a_token(text, tmp_path):
    corpus, valid = text
    good = saved(tmp_path / "good", tiny_tokenizer())
    other = saved(tmp_path / "other", tiny_tokenizer(300))
    with pytest.raises(ValueError, match="tokenizers differ") as caught:
        evaluate(good, other, corpus, valid=valid, block=32)
    message = str(caught.value)
    assert good in message
    assert other in message
    assert "id 300 is" in message
    assert "nothing in the second" in message
    assert corpus.tokenizer_hash in message
    with pytest.raises(ValueError, match=f"corpus {corpus.path}"):
        evaluate(other, None, corpus, block=32)


def test_a_plan_that_cannot_work_fails_before_scoring(text, tmp_path, monkeypatch):
    corpus, _ = text
    monkeypatch.setattr("mdkernels.evaluate.gold_logprobs", lambda *a, **k: pytest.fail("scored"))
    base, memory = tiny_model("gpt2"), tiny_model("llama")
    with pytest.raises(ValueError, match="give a weight, or a validation corpus"):
        evaluate(base, memory, corpus, block=32)
    with pytest.raises(ValueError, match="same text as the test corpus"):
        evaluate(base, memory, corpus, valid=corpus, block=32)
    with pytest.raises(ValueError, match=r"mix_weight must be in \[0, 1\], got 2"):
        evaluate(base, memory, corpus, mix_weight=2, block=32)
    for sizes, message in (
        ({"block": 0}, "block must be an integer >= 1, got 0"),
        ({"block": 33.5}, "block must be an integer"),
        ({"block": 32, "stride": 33}, r"stride must be an integer in \[1, 32\], got 33"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(base, memory, corpus, mix_weight=0.5, **sizes)
    for ignored in ({"memory": memory, "mix_weight": 0.5}, {"memory": None}):
        with pytest.raises(ValueError, match="is for fitting the mix weight, but"):
            evaluate(base, corpus=corpus, valid=text[1], block=32, **ignored)
    narrow = tiny_model("llama")
    narrow.config.max_position_embeddings = 16
    with pytest.raises(ValueError, match="block: 32 tokens do not fit the context of model Llama"):
        evaluate(base, [memory, narrow], corpus, mix_weight=[0.2, 0.3], block=32)
    out = tmp_path / "eval.json"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        evaluate(base, memory, corpus, mix_weight=0.5, out=out, block=32)
    assert out.read_text() == "precious"
    assert os.listdir(tmp_path) == ["eval.json"]
