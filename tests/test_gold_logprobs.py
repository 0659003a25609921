"""log p of a corpus by one model, against full logits, and the models that cannot give it."""

import pytest
import scoring_fixtures
import torch
from pipeline_fixtures import FAMILIES, tiny_model, tiny_tokenizer
from scoring_fixtures import naive_logprobs

from mdkernels import scoring
from mdkernels.corpus import build_corpus
from mdkernels.evaluate import gold_logprobs
from mdkernels.scoring import check_scorable

text = scoring_fixtures.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "stride", "batch_size"), [(32, 16, 3), (64, 64, 8), (20, 1, 64)])
def test_gold_logprobs_equal_full_logits(text, family, block, stride, batch_size):
    corpus, _ = text
    model = tiny_model(family)
    found = gold_logprobs(model, corpus, block=block, stride=stride, batch_size=batch_size)
    assert found.dtype == torch.float32
    expected = naive_logprobs(model, corpus, block, stride)
    assert (found - expected).abs().max() < 3e-6


def test_rows_pick_a_slice_of_the_same_scores(text):
    corpus, _ = text
    model = tiny_model("llama")
    options = {"block": 32, "stride": 8, "batch_size": 5}
    whole = gold_logprobs(model, corpus, **options)
    for rows in ((0, 1), (3, 77), (40, 41), (corpus.num_rows - 1, corpus.num_rows)):
        part = gold_logprobs(model, corpus, rows=rows, **options)
        # Not bitwise: a GEMM of fewer rows may add in another order.
        torch.testing.assert_close(part, whole[slice(*rows)], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"rows: \(5, 5\)"):
        gold_logprobs(model, corpus, rows=(5, 5), **options)


def test_a_corpus_shorter_than_the_block_is_one_window(tmp_path):
    corpus = build_corpus(["the index"], tiny_tokenizer(), tmp_path / "c", as_text=True)
    model = tiny_model("gpt2")
    found = gold_logprobs(model, corpus, block=64)
    assert (found - naive_logprobs(model, corpus, 64, 32)).abs().max() < 3e-6


@pytest.mark.slow
def test_compiled_and_autocast_trunks(text):
    corpus, _ = text
    model = tiny_model("llama", layers=1)
    plain = gold_logprobs(model, corpus, block=32, batch_size=7)
    compiled = gold_logprobs(model, corpus, block=32, batch_size=7, compile=True)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    low = gold_logprobs(model, corpus, block=32, autocast=torch.bfloat16)
    assert 0 < (low - plain).abs().mean() < 0.02


def test_logits_that_are_nan_in_places_are_no_score(text):
    corpus, _ = text
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(corpus.token_ids[100])] = torch.nan
    with pytest.raises(FloatingPointError, match=r"Llama.* at row \d+ of .* hold NaN"):
        gold_logprobs(model, corpus, block=32)


def failing():
    raise RuntimeError


def test_scoring_leaves_the_model_as_it_was(text, monkeypatch):
    model = tiny_model("gpt2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model.base_model))
    gold_logprobs(model, text[0], block=32)
    assert model.training
    monkeypatch.setattr(scoring, "one_text_per_window", failing)
    with pytest.raises(RuntimeError):
        gold_logprobs(model, text[0], block=32)
    assert model.training
    assert set(vars(model.base_model)) == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_models_that_cannot_score_the_corpus_are_refused(text):
    corpus, _ = text
    with pytest.raises(ValueError, match=r"block: 65 .* context of model .*, 64"):
        gold_logprobs(tiny_model("llama"), corpus, block=65)
    with pytest.raises(ValueError, match="vocabulary of 320"):
        gold_logprobs(tiny_model("llama", vocab_size=256), corpus, block=32)


def capped_at(limit, std):
    """A model whose logits are capped behind the head, at `std` a head large or small."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=limit,
        max_position_embeddings=64,
    )
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=std)
    return model


@pytest.fixture(scope="module")
def capped():
    """Hard enough to matter."""
    return capped_at(2.0, std=2.0)


@pytest.mark.parametrize(("block", "stride"), [(32, 16), (24, 24), (32, 5)])
def test_logits_changed_behind_the_head_are_scored_as_they_are(
    text, capped, block, stride, monkeypatch
):
    corpus, _ = text
    expected = naive_logprobs(capped, corpus, block, stride)
    found = gold_logprobs(capped, corpus, block=block, stride=stride, batch_size=3)
    assert (found - expected).abs().max() < 3e-6
    forwards = []
    monkeypatch.setattr("mdkernels.scoring._LOGITS_BYTES", 2 * block * 320 * 4)
    with capped.lm_head.register_forward_hook(lambda *a: forwards.append(a[-1].shape)):
        gold_logprobs(capped, corpus, block=block, stride=stride, batch_size=3)
    kept = {tuple(shape[:2]) for shape in forwards[1:]}  # one is of the probe
    assert kept <= {(size, rows) for size in (1, 2) for rows in range(1, block + 1)}


def test_a_loss_through_the_head_refuses_such_a_model(text, capped):
    with pytest.raises(ValueError, match=r"gemma2.*changes its logits after the LM head"):
        check_scorable(capped, text[0], 32)


def test_a_cap_is_seen_before_the_logits_have_grown_to_it(text):
    """A model that starts small would meet its cap while it trains, and differ from its loss."""
    with pytest.raises(ValueError, match=r"gemma2.*changes its logits after the LM head"):
        check_scorable(capped_at(30.0, std=0.02), text[0], 32)
    larger = capped_at(30.0, std=0.5)  # still within 1 % of its uncapped logits, most of them
    found = gold_logprobs(larger, text[0], block=32, stride=16)
    assert (found - naive_logprobs(larger, text[0], 32, 16)).abs().max() < 3e-6


@pytest.mark.parametrize("change", [lambda x: x.mul_(0.5), lambda x: x[..., 3].fill_(-9.0)])
def test_a_change_in_place_is_seen(text, monkeypatch, change):
    """xLSTM caps its logits so, Chameleon takes its image tokens out."""
    model = tiny_model("llama")
    forward = type(model).forward

    def changed(self, *args, **options):
        output = forward(self, *args, **options)
        change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(ValueError, match="changes its logits after the LM head"):
        check_scorable(model, text[0], 32)


def test_the_head_of_a_compiled_model_is_seen(text):
    model = tiny_model("llama")
    model.compile(backend="eager")
    inputs = torch.arange(8)[None]  # as many as the probe reads
    with torch.inference_mode():
        before = model(input_ids=inputs, use_cache=False).logits
    check_scorable(model, text[0], 32)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=inputs, use_cache=False).logits, before)


def test_scoring_never_searches_for_packed_texts(text, monkeypatch):
    """What it found would be read by the host: one wait for the device per forward."""
    from transformers import masking_utils

    calls = []
    search = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda p: calls.append(p) or search(p)
    )
    gold_logprobs(tiny_model("llama"), text[0], block=32)
    assert calls
    assert all(positions.shape[1] == 8 for positions in calls)  # the probe's only
