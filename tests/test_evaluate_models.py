"""What scoring takes as a model: one with adapters of peft, but no mixture."""

import pytest
import scoring_fixtures
import torch
from pipeline_fixtures import save_tiny_pair, tiny_model, tiny_tokenizer
from scoring_fixtures import naive_logprobs

from mdkernels.evaluate import MixtureEval, evaluate, gold_logprobs
from mdkernels.generate import generate
from mdkernels.mixture import MemoryMixture

text = scoring_fixtures.text


def adapted(family, **settings):
    """A model in the wrapper of peft, whose adapters change what it computes."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the lora extra)")
    settings = {"r": 2, "target_modules": "all-linear", **settings}
    settings["fan_in_fan_out"] = family == "gpt2"
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_count(text, family):
    corpus, _ = text
    model = adapted(family)
    scores = naive_logprobs(model, corpus, 32, 16)
    assert (scores - naive_logprobs(tiny_model(family), corpus, 32, 16)).abs().max() > 0.1
    found = gold_logprobs(model, corpus, block=32, stride=16)
    assert (found - scores).abs().max() < 1e-5
    options = {"block": 32, "stride": 16}
    plain = tiny_model("llama", seed=1)
    for models in ((model, plain), (plain, model)):
        report = evaluate(*models, corpus, mix_weight=0.5, **options)
        parts = [report["base"], report["memories"][0]]
        part = parts[models.index(model)]
        assert part["nats_per_token"] == pytest.approx(-float(scores.mean()), abs=1e-6)
    row = MixtureEval(model, corpus, **options)(model, 1)
    assert row["base_perplexity"] == row["memory_perplexity"]
    assert row["base_perplexity"] == pytest.approx(float((-scores.mean()).exp()), rel=1e-5)


def test_where_adapters_have_to_be_merged():
    model = adapted("llama")
    message = r"got PeftModelForCausalLM.*; pass model\.merge_and_unload\(\)"
    with pytest.raises(TypeError, match=message):
        MemoryMixture(tiny_model("llama"), model)
    with pytest.raises(TypeError, match=message):
        MemoryMixture.from_pretrained(model, tiny_model("llama"))
    with pytest.raises(TypeError, match=message):
        generate(model, tiny_model("llama"), "the", tokenizer=tiny_tokenizer())


def test_a_learned_prompt_is_no_layer(text):
    peft = pytest.importorskip("peft", reason="peft is not installed (the lora extra)")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="PeftModelForCausalLM adds a learned prompt"):
        gold_logprobs(model, text[0], block=32)


def test_a_mixture_is_scored_model_by_model(text, tmp_path):
    corpus, _ = text
    base, memory = save_tiny_pair(tmp_path)
    mixture = MemoryMixture.from_pretrained(base, memory, mix_weight=0.3)
    saved = tmp_path / "mixture"
    mixture.save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    options = {"block": 32, "mix_weight": 0.3}
    message = r"base: .*mixture is a mixture itself, .* pass mixture\.base as base and"
    for source in (saved, str(saved)):
        with pytest.raises(ValueError, match=message):
            evaluate(source, memory, corpus, **options)
        with pytest.raises(ValueError, match=message):
            evaluate(source, None, corpus, block=32)
        with pytest.raises(ValueError, match=message):
            MixtureEval(source, corpus)
    with pytest.raises(ValueError, match="base: MemoryMixture is a mixture itself"):
        evaluate(mixture, None, corpus, block=32)
    with pytest.raises(ValueError, match=r"memory: .* is a mixture itself"):
        evaluate(base, saved, corpus, **options)
    with pytest.raises(ValueError, match=r"MemoryMixture: its LM head is None, .* mixture\.models"):
        gold_logprobs(mixture, corpus, block=32)
    again = MemoryMixture.from_pretrained(saved)
    whole = evaluate(again.base, again.memories, corpus, **options)
    parts = evaluate(base, memory, corpus, **options)
    assert whole["mixture"]["nats_per_token"] == parts["mixture"]["nats_per_token"]


@pytest.mark.parametrize("rows", [3, (1,), (0, 1.5), "ab"])
def test_arguments_of_the_wrong_type(text, rows):
    with pytest.raises(TypeError, match=r"rows: expected \(start, stop\), two integers, got"):
        gold_logprobs(tiny_model("llama"), text[0], block=32, rows=rows)
    with pytest.raises(TypeError, match="out: expected a path, got 5"):
        evaluate(tiny_model("llama"), None, text[0], block=32, out=5)
