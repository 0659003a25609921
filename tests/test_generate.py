"""Decoding from the mixture, against full recomputation without a cache in fp64."""

import io
import math

import numpy as np
import pytest
import torch
from mixture_fixtures import left_padded
from pipeline_fixtures import (
    FAMILIES,
    require_shared_data,
    save_tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GenerationConfig

from mdkernels.decode import decode
from mdkernels.generate import _continuation, _Printer, generate
from mdkernels.mixture import MemoryMixture
from mdkernels.models import load_tokenizer

PROMPTS = ["the tensor returns", "a kernel", "every row sorts its neighbours in place. the index"]


def encode(text):
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


@torch.no_grad()
def mixture_probs(base, memories, ids, weights, temperature=1.0):
    """fp64 (V,): the next-token distribution behind `ids`, as the paper writes it."""
    ids = torch.tensor([ids])
    width = min(model.config.vocab_size for model in [base, *memories])
    p = (1 - sum(weights)) * base(ids).logits[0, -1, :width].double().softmax(0)
    for memory, weight in zip(memories, weights, strict=True):
        logits = memory(ids).logits[0, -1, :width].double()
        p = p + weight * (logits / temperature).softmax(0)
    return p


def greedy(base, memories, ids, weights, new, eos=None, temperature=1.0):
    ids = list(ids)
    for _ in range(new):
        picked = int(mixture_probs(base, memories, ids, weights, temperature).argmax())
        ids.append(picked)
        if picked == eos:
            break
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_family", FAMILIES)
def test_greedy_equals_full_recomputation(family, memory_family):
    base, memory = tiny_model(family), tiny_model(memory_family, seed=1)
    mixture = MemoryMixture(base, memory, 0.6, memory_temperature=1.5)
    prompt = encode(PROMPTS[0])
    found = decode(mixture, torch.tensor([prompt]), max_new_tokens=12)[0].tolist()
    assert found == greedy(base, [memory], prompt, [0.6], 12, temperature=1.5)
    assert len(found) == len(prompt) + 12


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_each_row_alone(family):
    base, memory = tiny_model(family), tiny_model("gpt2", seed=1)
    mixture = MemoryMixture(base, memory, 0.5)
    rows = [encode(prompt) for prompt in PROMPTS]
    ids, mask = left_padded(rows)
    assert len({len(row) for row in rows}) == 3
    batch = decode(mixture, ids, mask, max_new_tokens=10)
    for row, tokens in zip(rows, batch.tolist(), strict=True):
        assert tokens[-10:] == greedy(base, [memory], row, [0.5], 10)[-10:]


def test_a_memory_of_weight_zero_or_one_leaves_one_model():
    base, memory = tiny_model("llama"), tiny_model("gpt2", seed=1)
    ids = torch.tensor([encode(PROMPTS[0])])
    for weight, alone in ((0.0, base), (1.0, memory)):
        mixed = decode(MemoryMixture(base, memory, weight), ids, max_new_tokens=8)
        assert torch.equal(mixed, decode(MemoryMixture(alone, []), ids, max_new_tokens=8))


def test_two_memories():
    base = tiny_model("llama")
    memories = [tiny_model("gpt2", seed=1), tiny_model("qwen2", seed=2)]
    prompt = encode(PROMPTS[0])
    mixture = MemoryMixture(base, memories, [0.3, 0.4])
    found = decode(mixture, torch.tensor([prompt]), max_new_tokens=8)[0].tolist()
    assert found == greedy(base, memories, prompt, [0.3, 0.4], 8)


def test_padded_vocabularies_decode_over_the_common_ids():
    base, memory = tiny_model("llama", vocab_size=384), tiny_model("gpt2", seed=1)
    prompt = encode(PROMPTS[0])
    for pair in ((base, memory), (memory, base)):
        mixture = MemoryMixture(*pair, 0.5)
        found = decode(mixture, torch.tensor([prompt]), max_new_tokens=8)[0].tolist()
        assert found == greedy(pair[0], [pair[1]], prompt, [0.5], 8)
        assert max(found) < 320


def test_a_row_ends_at_eos_and_the_batch_with_its_last_row():
    base, memory = tiny_model("llama"), tiny_model("gpt2", seed=1)
    mixture = MemoryMixture(base, memory, 0.5)
    rows = [encode(prompt) for prompt in PROMPTS]
    free = [greedy(base, [memory], row, [0.5], 20)[len(row) :] for row in rows]
    eos = free[0][3]
    first = [new.index(eos) if eos in new else None for new in free]
    assert first[0] is not None
    ids, mask = left_padded(rows)
    found = decode(mixture, ids, mask, max_new_tokens=20, eos_token_id=eos, pad_token_id=5)
    new = found[:, ids.shape[1] :].tolist()
    longest = max(20 if end is None else end + 1 for end in first)
    for got, expected, end in zip(new, free, first, strict=True):
        assert len(got) == longest
        stop = longest if end is None else end + 1
        assert got[:stop] == expected[:stop]
        assert set(got[stop:]) <= {5}


def test_sampling_follows_the_mixture():
    base, memory = tiny_model("llama"), tiny_model("gpt2", seed=1)
    prompt = encode(PROMPTS[0])
    draws = 4000
    ids = torch.tensor([prompt]).repeat(draws, 1)
    mixture = MemoryMixture(base, memory, 0.4)
    found = decode(mixture, ids, max_new_tokens=1, temperature=1.0, seed=11)[:, -1]
    expected = mixture_probs(base, [memory], prompt, [0.4]).numpy() * draws
    counts = np.bincount(found.numpy(), minlength=len(expected))
    order = np.argsort(-expected)
    cells = [i for i in order if expected[i] >= 8]
    observed = np.append(counts[cells], draws - counts[cells].sum())
    wanted = np.append(expected[cells], draws - expected[cells].sum())
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(cells)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_sampling_repeats_with_its_seed_and_does_not_depend_on_the_batch():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.4)
    ids = torch.tensor([encode(PROMPTS[0])]).repeat(6, 1)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    batch = decode(mixture, ids, seed=3, **options)
    assert torch.equal(batch, decode(mixture, ids, seed=3, **options))
    seeds = torch.arange(40, 46)
    own = decode(mixture, ids, seed=seeds, **options)
    for slot in (0, 3, 5):
        alone = decode(mixture, ids[:1], seed=seeds[slot : slot + 1], **options)
        assert torch.equal(own[slot : slot + 1], alone)
    assert not torch.equal(batch, decode(mixture, ids, seed=4, **options))
    assert len({tuple(row) for row in batch.tolist()}) == 6


def test_top_k_one_is_greedy_at_any_temperature():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.4)
    ids = torch.tensor([encode(PROMPTS[0])])
    sampled = decode(mixture, ids, max_new_tokens=8, temperature=2.0, top_k=1)
    assert torch.equal(sampled, decode(mixture, ids, max_new_tokens=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.empty(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"expected \(batch, length\)"),
        ({"input_ids": torch.full((1, 3), 320)}, r"knows \[0, 320\)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"max_new_tokens": 63}, "do not fit the context of .*, 64"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: expected \(1, 3\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.zeros(1, 3)}, "no row may be all padding"),
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"temperature": float("inf")}, "temperature: expected a finite number"),
        ({"top_k": -1}, "top_k: expected an int of at least 0"),
        ({"top_p": -0.1}, r"top_p: expected a number in \[0, 1\]"),
        ({"min_p": 1.5}, r"min_p: expected a number in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused_before_any_compute(changes, message, monkeypatch):
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2"), 0.5)
    monkeypatch.setattr(type(mixture.base), "forward", lambda *a, **k: pytest.fail("computed"))
    ids = torch.ones(1, 3, dtype=torch.int64)
    arguments = {"input_ids": ids, "max_new_tokens": 8, **changes}
    with pytest.raises(ValueError, match=message):
        decode(mixture, **arguments)


def test_arguments_of_another_type_are_named():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2"), 0.5)
    ids = torch.ones(1, 3, dtype=torch.int64)
    for name, value in (
        ("eos_token_id", "</s>"),
        ("eos_token_id", torch.tensor([1, 2])),
        ("pad_token_id", "x"),
        ("attention_mask", [[1, 1, 1]]),
        ("temperature", "warm"),
        ("min_p", None),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            decode(mixture, ids, max_new_tokens=2, **{name: value})
    with pytest.raises(TypeError, match="attention_mask: expected a tensor, got list"):
        mixture.generate(ids, attention_mask=[[1, 1, 1]])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"draft_tokens": 2}], ids=str)
def test_logits_without_a_distribution_end_in_an_error(options):
    mixture = MemoryMixture(tiny_model("gpt2"), tiny_model("llama"), 0.5)
    torch.nn.init.constant_(mixture.base.transformer.ln_f.weight, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        decode(mixture, torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4, **options)


def test_the_longest_prompt_that_fits_decodes():
    mixture = MemoryMixture(tiny_model("gpt2"), tiny_model("llama"), 0.5)
    assert decode(mixture, torch.ones(1, 3, dtype=torch.int64), max_new_tokens=62).shape == (1, 65)


def test_weights_and_temperatures_out_of_range():
    pair = tiny_model("llama"), tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"mix_weight must be in \[0, 1\]"):
        MemoryMixture(*pair, mix_weight=-0.1)
    for temperature in (0.0, float("inf"), float("nan"), 1e-31):
        with pytest.raises(ValueError, match="memory_temperature must be > 0"):
            MemoryMixture(*pair, memory_temperature=temperature)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_tiny_checkpoint(root / "base", "llama")
    return base, save_tiny_checkpoint(root / "memory", "gpt2", seed=1)


def test_text_of_base_and_mixture_side_by_side(checkpoints):
    base, memory = checkpoints
    options = {"max_new_tokens": 10, "mix_weight": 0.7}
    results = generate(base, memory, PROMPTS, side_by_side=True, **options)
    models = tiny_model("llama"), tiny_model("gpt2", seed=1)
    for result, prompt in zip(results, PROMPTS, strict=True):
        ids = encode(prompt)
        assert list(result) == ["prompt", "base", "mixture"]
        for name, memories, weights in (("base", [], []), ("mixture", [models[1]], [0.7])):
            tokens = greedy(models[0], memories, ids, weights, 10, eos=0)
            tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
            assert prompt + result[name] == tiny_tokenizer().decode(tokens)


def test_drafts_change_nothing_but_the_speed(checkpoints):
    options = {"max_new_tokens": 12, "mix_weight": 0.7, "side_by_side": True}
    want = generate(*checkpoints, PROMPTS, **options)
    for draft_tokens in (2, "auto"):
        assert generate(*checkpoints, PROMPTS, draft_tokens=draft_tokens, **options) == want


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_streaming_shows_what_is_returned(checkpoints, draft_tokens):
    stream = io.StringIO()
    options = {"max_new_tokens": 20, "stream": stream, "draft_tokens": draft_tokens}
    (result,) = generate(*checkpoints, PROMPTS[1], **options)
    assert stream.getvalue() == f"--- mixture\n{PROMPTS[1]}{result['mixture']}\n"


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "models/stories260K"])
def test_streamed_characters_are_those_of_the_whole_text(name):
    """Also those of several tokens; and a token costs the same however long the text has become."""
    tokenizer = load_tokenizer(require_shared_data(name))
    prompt, text = "Über ", "naïve \u200d👩\u200d🚀👩\u200d🚀 中文字符  두 \n\n x" * 3
    prompt_ids = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + text).input_ids[len(prompt_ids) :]
    stream, lengths = io.StringIO(), []
    printer = _Printer(tokenizer, prompt_ids, (), stream, "")
    decode = printer.decode
    printer.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    for token in ids:
        printer(torch.tensor([token]))
    printer.close()
    assert stream.getvalue() == _continuation(tokenizer, prompt_ids, ids, ()) + "\n"
    assert max(lengths[-40:]) < 30


@pytest.mark.parametrize("named", [True, False])
def test_every_end_that_the_checkpoint_names_ends_a_text(tmp_path, named):
    """If the tokenizer's eos is among them: else they are defaults of the family."""
    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    memory = save_tiny_checkpoint(tmp_path / "memory", "gpt2", seed=1)
    (whole,) = generate(base, memory, PROMPTS[0], max_new_tokens=12)
    ids = encode(PROMPTS[0])
    tokens = greedy(tiny_model("llama"), [tiny_model("gpt2", seed=1)], ids, [0.5], 12)
    end = tokens[len(ids) + 3]
    GenerationConfig(eos_token_id=[0, end] if named else end).save_pretrained(base)
    stream = io.StringIO()
    (cut,) = generate(base, memory, PROMPTS[0], max_new_tokens=12, stream=stream)
    kept = tokens[: tokens.index(end, len(ids))]
    text = tiny_tokenizer().decode(kept) if named else PROMPTS[0] + whole["mixture"]
    assert PROMPTS[0] + cut["mixture"] == text
    assert stream.getvalue() == f"--- mixture\n{text}\n"


def test_prompts_that_cannot_be_continued(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="prompts: '' is empty"):
        generate(*checkpoints, ["the", ""])
    with pytest.raises(ValueError, match=r"prompts: .* is not UTF-8 text"):
        generate(*checkpoints, "caf\udce9")
    with pytest.raises(ValueError, match="prompts: got none"):
        generate(*checkpoints, [])
    for wrong in ({"temperature": -1.0}, {"max_new_tokens": 0}, {"draft_tokens": -1}):
        stream = io.StringIO()
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(*checkpoints, "a", stream=stream, **{"max_new_tokens": 5, **wrong})
        assert stream.getvalue() == ""
    with pytest.raises(ValueError, match="stream: shows one prompt, got 2"):
        generate(*checkpoints, ["a", "b"], stream=io.StringIO())
    with pytest.raises(ValueError, match="tokenizer: needed with a live base"):
        generate(tiny_model("llama"), checkpoints[1], "the")
    other = save_tiny_checkpoint(tmp_path / "other", "gpt2", vocab_size=330)
    with pytest.raises(ValueError, match="tokenizers differ"):
        generate(checkpoints[0], other, "the", max_new_tokens=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: expected a number"),
        ({"top_k": 5}, r"top_k: got 5, but temperature 0 is greedy decoding.* ignore"),
        ({"top_p": 0.9}, "top_p: got 0.9, but temperature 0"),
        ({"min_p": 0.1}, "min_p: got 0.1, but temperature 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"max_new_tokens": 64}, r"prompt tokens and 64 new ones do not fit .*, 64"),
        ({"mix_weight": 1.5}, r"mix_weight must be in \[0, 1\]"),
        ({"mix_weight": [0.5, 0.5]}, r"2 weight\(s\) for 1"),
        ({"memory_temperature": 0.0}, "memory_temperature must be > 0"),
        ({"draft_tokens": -1}, "draft_tokens must be"),
        ({"draft_tokens": 2, "memory": []}, "without a memory nothing could draft"),
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"dtype": "float8"}, "dtype: expected one of float32, bfloat16, got 'float8'"),
        ({"seed": 1.5}, "seed: expected an integer"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    checkpoints, changes, message, monkeypatch
):
    """And before anything is printed."""
    monkeypatch.setattr(
        MemoryMixture, "from_pretrained", lambda *a, **k: pytest.fail("loaded a model")
    )
    stream = io.StringIO()
    arguments = {"memory": checkpoints[1], "side_by_side": True, "stream": stream, **changes}
    with pytest.raises(ValueError, match=message):
        generate(checkpoints[0], prompts=PROMPTS[1], **arguments)
    assert stream.getvalue() == ""


def test_what_only_decoding_can_refuse_is_refused_before_printing(checkpoints, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr("mdkernels.generate.decode", refuse)
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"):
        generate(*checkpoints, PROMPTS[1], side_by_side=True, stream=stream)
    assert stream.getvalue() == ""
