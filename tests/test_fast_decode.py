"""The fast loop behind generate(), against fp64 decoding without a cache and generate() itself."""

import copy

import numpy as np
import pytest
import torch
from decode_fixtures import decoded, double_mixture, joint, small_vocabulary
from mix_sample_oracle import g_test
from mixture_fixtures import PAIRS, PLAIN, VOCAB, greedy, left_padded, prompts
from pipeline_fixtures import tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from mdkernels.decode import decode
from mdkernels.fast_decode import FastDecodeOutput, fast_decode
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE

NEW = 10
FAST = {"custom_generate": fast_decode, "max_new_tokens": NEW}
MODES = {
    "plain": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
    "chunked static": {"prefill_chunk_size": 3, "cache_implementation": "static"},
    "drafts": {"draft_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("families", PAIRS, ids="-".join)
def test_greedy(families, mode):
    """A left-padded batch, each row as it would be alone, and a row alone."""
    mixture = double_mixture(*families)
    rows = prompts()
    want = [greedy(mixture, row, NEW) for row in rows]
    options = {**PLAIN, **FAST, **MODES[mode]}
    alone = mixture.generate(torch.tensor([rows[2]]), **options)
    assert alone[0].tolist() == rows[2] + want[2]
    if mode == "static":
        ids, mask = left_padded(rows)
        found = mixture.generate(ids, attention_mask=mask, **options)
        assert found[:, -NEW:].tolist() == want
        found = mixture.generate(ids[2:].repeat(2, 1), **options)
        assert found[:, -NEW:].tolist() == [want[2]] * 2


def test_weights_of_rows_and_returned_sequences():
    mixture = double_mixture("llama", "gpt2", "qwen2", weight=(0.25, 0.4))
    rows = prompts()
    ids, mask = left_padded(rows)
    weights = torch.tensor([[0.5, 0.1], [0.0, 1.0], [0.2, 0.2]])
    want = [
        greedy(mixture, row, NEW, weights=own)
        for row, own in zip(rows, weights.double().tolist(), strict=True)
    ]
    for draft in (0, 3):
        options = {**PLAIN, **FAST, "attention_mask": mask, "draft_tokens": draft}
        found = mixture.generate(ids, mix_weight=weights, **options)
        assert found[:, -NEW:].tolist() == want
    sampled = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    found = mixture.generate(ids, mix_weight=weights, num_return_sequences=3, **FAST, **sampled)
    assert found.shape == (9, ids.shape[1] + NEW)
    assert len({tuple(row) for row in found.tolist()}) == 9


def test_a_sliding_window_beside_full_attention():
    config = MistralConfig(sliding_window=4, **tiny_model("llama").config.to_dict())
    mixture = MemoryMixture(MistralForCausalLM(config).double().eval(), [], 0.5)
    mixture.base.load_state_dict(tiny_model("llama").double().state_dict())
    rows = prompts()
    ids, mask = left_padded(rows)
    for options in ({}, {"cache_implementation": "static"}):
        found = mixture.generate(ids, attention_mask=mask, **{**PLAIN, **FAST, **options})
        assert found[:, -NEW:].tolist() == [greedy(mixture, row, NEW) for row in rows]


def test_a_cache_is_continued():
    mixture = double_mixture("llama", "gpt2")
    row = prompts()[1]
    want = greedy(mixture, row, 2 * NEW)
    first = mixture.generate(torch.tensor([row]), return_dict_in_generate=True, **{**PLAIN, **FAST})
    assert isinstance(first, FastDecodeOutput)
    assert first.stats.new_tokens == NEW
    assert first.stats.base_passes == NEW - 1
    assert first[CACHE].get_seq_length() == len(row) + NEW - 1
    other = copy.deepcopy(first[CACHE])
    whole = mixture.generate(first.sequences, cache=first[CACHE], **{**PLAIN, **FAST})
    assert whole[0].tolist() == row + want
    mask = torch.ones_like(first.sequences)
    part = mixture.generate(
        first.sequences[:, -1:], attention_mask=mask, cache=other, **{**PLAIN, **FAST}
    )
    assert part[0].tolist() == want[NEW - 1 :]
    room = mixture.new_cache(40)
    found = mixture.generate(torch.tensor([row]), cache=room, **{**PLAIN, **FAST})
    assert found[0].tolist() == row + want[:NEW]
    assert not room.layers[0].keys.requires_grad
    assert not room.layers[0].keys.is_inference()


@pytest.mark.parametrize("draft", [0, 3])
def test_rows_end_as_they_do_in_generate(draft):
    mixture = double_mixture("llama", "gpt2")
    rows = prompts(4)
    ids, mask = left_padded(rows)
    free = [greedy(mixture, row, NEW) for row in rows]
    for ends in ([free[0][3], free[1][1]], [free[2][0]], [319]):
        options = {**PLAIN, "eos_token_id": ends, "attention_mask": mask, "pad_token_id": 9}
        want = mixture.generate(ids, max_new_tokens=NEW, **options)
        found = mixture.generate(ids, draft_tokens=draft, **FAST, **options)
        assert torch.equal(found, want)
        longer = {**options, "max_length": ids.shape[1] + NEW}
        found = mixture.generate(ids, custom_generate=fast_decode, draft_tokens=draft, **longer)
        assert torch.equal(found, want)


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen, self.over = [], False

    def put(self, value):
        assert not self.over
        self.seen.append(value.clone())

    def end(self):
        self.over = True


@pytest.mark.parametrize("draft", [0, 3])
def test_a_streamer_sees_what_is_returned(draft):
    mixture = double_mixture("llama", "gpt2")
    ids, mask = left_padded(prompts())
    eos = greedy(mixture, prompts()[0], NEW)[4]
    for chosen in (slice(None), slice(2, 3)):
        streamer = Recorder()
        options = {**PLAIN, "eos_token_id": eos, "attention_mask": mask[chosen]}
        found = mixture.generate(
            ids[chosen], streamer=streamer, draft_tokens=draft, **FAST, **options
        )
        assert streamer.over
        prompt, *new = streamer.seen
        assert torch.equal(prompt, ids[chosen])
        assert torch.equal(torch.stack(new, 1), found[:, ids.shape[1] :])


def test_a_custom_loop_that_knows_no_streamer_is_told_so():
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids

    mixture = double_mixture("llama", "gpt2")
    ids = torch.tensor(prompts()[:1])
    options = {"custom_generate": loop, "max_new_tokens": 2, **PLAIN}
    assert torch.equal(mixture.generate(ids, **options), ids)
    with pytest.raises(ValueError, match="streamer: custom_generate takes no such argument"):
        mixture.generate(ids, streamer=Recorder(), **options)


def test_the_filters_of_a_request_reach_the_op():
    """The joint distribution of two tokens, with the warpers that generate() would apply."""
    mixture = small_vocabulary(vocab=7)
    filters = {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.03}
    prompt, count = [1, 3, 2], 12_000
    expected = joint(mixture, prompt, 2, **filters)
    found = mixture.generate(
        torch.tensor([prompt]),
        num_return_sequences=count,
        max_new_tokens=2,
        custom_generate=fast_decode,
        do_sample=True,
        seed=5,
        eos_token_id=None,
        pad_token_id=0,
        **filters,
    )
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(found[:, 3:].numpy().T), 1)
    assert counts[expected == 0].sum() == 0
    assert g_test(counts.ravel(), expected.ravel()) > 1e-3


def test_seeds():
    mixture = double_mixture("llama", "gpt2")
    ids = torch.tensor(prompts()[:1]).repeat(4, 1)
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **FAST}
    torch.manual_seed(1)
    first, second = (mixture.generate(ids, **options) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, mixture.generate(ids, **options))
    assert not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == 4
    with_int = mixture.generate(ids, seed=3, **options)
    assert torch.equal(with_int, decode(mixture, ids, max_new_tokens=NEW, temperature=1.0, seed=3))
    seeds = torch.arange(4) + 10
    batch = mixture.generate(ids, seed=seeds, **options)
    alone = mixture.generate(ids[:1], seed=seeds[2:3], **options)
    assert torch.equal(batch[2:3], alone)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"draft_tokens": 2}])
def test_what_is_returned_can_be_used_outside_inference_mode(options):
    mixture = double_mixture("llama", "gpt2")
    found = mixture.generate(
        torch.tensor(prompts()[:1]), return_dict_in_generate=True, **PLAIN, **FAST, **options
    )
    found.sequences += 0
    with torch.enable_grad():
        mixture.base(found.sequences).logits.sum().backward()
    mixture.base.zero_grad(set_to_none=True)
    found[CACHE].crop(-2)
    mixture(found.sequences[:, -2:], cache=found[CACHE])
    assert found[CACHE].get_seq_length() == found.sequences.shape[1] - 1


def test_only_the_last_position_reaches_the_head():
    mixture = double_mixture("llama", "gpt2")
    seen = []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for model in mixture.models
    ]
    try:
        decoded(mixture, torch.ones(1, 20, dtype=torch.int64), new=4)
        assert seen == [1] * 8
        seen.clear()
        decoded(mixture, torch.ones(1, 20, dtype=torch.int64), new=6, draft=2)
        assert set(seen) <= {1, 2, 3}
        assert seen[:2] == [1, 1]
    finally:
        for hook in hooks:
            hook.remove()


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


SAMPLE = {"do_sample": True}
REFUSED = {
    "num_beams: 3 beams": {"num_beams": 3},
    "RepetitionPenaltyLogitsProcessor is not in the fused op": {"repetition_penalty": 1.2},
    "TypicalLogitsWarper is not in the fused op": {**SAMPLE, "typical_p": 0.5},
    "MinLengthLogitsProcessor is not": {"min_new_tokens": 3, "eos_token_id": 5},
    "TemperatureLogitsWarper comes twice or out of order": {
        **SAMPLE,
        "top_k": 0,
        "logits_processor": LogitsProcessorList(
            [TopKLogitsWarper(3), TemperatureLogitsWarper(0.5)]
        ),
    },
    "TopKLogitsWarper has min_tokens_to_keep=2": {
        **SAMPLE,
        "top_k": 0,
        "logits_processor": LogitsProcessorList([TopKLogitsWarper(3, min_tokens_to_keep=2)]),
    },
    "stopping_criteria: Never is no part": {"stopping_criteria": StoppingCriteriaList([Never()])},
    "stopping_criteria: MaxTimeCriteria is no part": {"max_time": 100.0},
    "output_scores: ": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits: ": {"output_logits": True, "return_dict_in_generate": True},
    "use_cache: ": {"use_cache": False},
    "position_ids: the fast loop counts": {"position_ids": torch.arange(2, 6)[None]},
    "assistant_model: drafts come from the memory": {"assistant_model": tiny_model("gpt2")},
    "prompt_lookup_num_tokens: drafts come": {"prompt_lookup_num_tokens": 3},
    "seed: would be ignored by greedy": {"seed": 3},
    "temperature: would be ignored by greedy": {
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    },
    r"seed: expected an int, or int64 of shape \(1,\)": {**SAMPLE, "seed": torch.arange(2)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_ignored_is_refused_before_any_compute(message, monkeypatch):
    mixture = double_mixture("llama", "gpt2")
    monkeypatch.setattr(type(mixture.base), "forward", lambda *a, **k: pytest.fail("computed"))
    options = {**PLAIN, **FAST, **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        mixture.generate(torch.tensor(prompts()[:1]), **options)


def test_positions_that_the_loop_would_count_itself_are_no_request():
    mixture = double_mixture("llama", "gpt2")
    ids, mask = left_padded(prompts())
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    options = {"attention_mask": mask, **PLAIN, **FAST}
    found = mixture.generate(ids, position_ids=positions, **options)
    assert torch.equal(found, mixture.generate(ids, **options))


def test_a_seed_that_is_no_number():
    mixture = double_mixture("llama", "gpt2")
    with pytest.raises(TypeError, match=r"seed: expected an int.*; got 1.5"):
        mixture.generate(torch.tensor([[1]]), seed=1.5, **{**PLAIN, **FAST, **SAMPLE})


def test_a_plain_model_is_refused():
    with pytest.raises(TypeError, match="fast_decode: decodes a MemoryMixture, got Llama"):
        tiny_model("llama").generate(torch.tensor([[1]]), **FAST, **PLAIN)


def test_defaults_of_a_checkpoint_are_honoured():
    """What generation_config.json of the base says counts, as in generate()."""
    mixture = MemoryMixture(tiny_model("llama").double(), tiny_model("gpt2", seed=1).double(), 0.4)
    mixture.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=1, eos_token_id=VOCAB - 1, pad_token_id=0
    )
    row = prompts()[1]
    found = mixture.generate(torch.tensor([row]), **FAST)
    assert found[0].tolist() == row + greedy(mixture, row, NEW, eos=VOCAB - 1)
