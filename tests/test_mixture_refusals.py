"""What generate() of a mixture refuses, before any compute, and what it does not."""

import copy

import pytest
import torch
from mixture_fixtures import PLAIN, greedy, mixture_of, prompts
from pipeline_fixtures import tiny_model
from transformers import GenerationConfig

from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE


@pytest.fixture(scope="module")
def mixed():
    return mixture_of("llama", "gpt2")


def refused(mixture, monkeypatch, message, *args, error=ValueError, **options):
    for model in mixture.models:
        monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(error, match=message):
        mixture.generate(*args, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.empty(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"inputs": torch.zeros(3, dtype=torch.int64)}, r"expected \(batch, length\)"),
        ({"inputs": torch.full((1, 3), 320)}, r"knows \[0, 320\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.zeros(1, 3, dtype=torch.int64)}, "no row may be all padding"),
        ({"max_new_tokens": 63}, r"need 65 positions, model .* has a context of 64"),
        ({"max_new_tokens": None, "max_length": 66}, "need 65 positions"),
        ({"cache_implementation": "paged"}, "no continuous batching"),
        ({"temperature": 0.7}, "`do_sample` is not set to `True`. However, `temperature`"),
        ({"top_p": 0.5}, "However, `top_p`"),
        ({"length_penalty": 2.0}, "`num_beams` is set to"),
        ({"output_scores": True}, "return_dict_in_generate"),
        ({"max_length": 20}, "max_length: would be ignored beside max_new_tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds: .* pass input_ids"),
        ({"output_hidden_states": True}, "output_hidden_states: ask one of mixture.models"),
        ({"output_logprobs": True}, "output_logprobs: pass output_logits=True"),
        ({"assistant_early_exit": 1}, "no layer to leave at"),
        ({"temperatur": 1.0}, "not used by the model: .'temperatur'"),
        ({"attention_mask": torch.ones(1, 2, dtype=torch.int64)}, r"attention_mask: .* \(1, 3\)"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.int64)}, r"got \(2, 3\)"),
        ({"num_beams": 2, "diversity_penalty": 0.5}, "ignored without num_beam_groups"),
        ({"num_beams": 2, "low_memory": True}, "low_memory: would be ignored"),
        ({"cache_config": {"nbits": 4}}, "cache_config: would be ignored without cache_impl"),
        ({"max_matching_ngram_size": 3}, "ignored without prompt_lookup_num_tokens"),
        ({"num_assistant_tokens": 3}, "set it in assistant_model.generation_config"),
        ({"negative_prompt_ids": torch.ones(1, 2).long()}, "ignored without guidance_scale"),
        ({"mix_weight": 1.5}, r"mix_weight must be in \[0, 1\]"),
        ({"mix_weight": torch.tensor([float("nan")])}, r"mix_weight must be in \[0, 1\]"),
        ({"mix_weight": torch.zeros(2)}, r"expected shape \(1,\), one per row, or \(1, 1\)"),
        ({"mix_weight": 0.5, "guidance_scale": 1.5}, "would not see it"),
        (
            {"generation_config": GenerationConfig(temperature=0.3, max_new_tokens=4)},
            "However, `temperature`",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_compute(mixed, monkeypatch, changes, message):
    options = {"inputs": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 4, **PLAIN}
    refused(mixed, monkeypatch, message, **{**options, **changes})


def test_a_prompt_that_is_no_tensor(mixed, monkeypatch):
    refused(mixed, monkeypatch, r"input_ids: expected a tensor, got list", [[1]], error=TypeError)


def test_refused_caches_and_weights_of_several(monkeypatch, mixed):
    ids = torch.ones(1, 3, dtype=torch.int64)
    options = {"max_new_tokens": 8, **PLAIN}
    small = mixed.new_cache(max_cache_len=9)
    refused(mixed, monkeypatch, "room for 9 tokens, .* may read 10", ids, cache=small, **options)
    alone = mixed.base.generate
    with pytest.raises(pytest.fail.Exception):
        alone(ids, **options)  # the trap works
    two = mixture_of("llama", "gpt2", "qwen2", weight=(0.25, 0.4))
    over = torch.tensor([[0.7, 0.4]])
    refused(two, monkeypatch, "sums to more than 1", ids, mix_weight=over, **options)
    refused(two, monkeypatch, "sum to 1.1", ids, mix_weight=[0.7, 0.4], **options)
    for method in (mixed.generate_batch, mixed.init_continuous_batching):
        with pytest.raises(ValueError, match=r"each their own\. Pass a left-padded batch"):
            method([[1, 2]])
    with pytest.raises(ValueError, match="no continuous batching"):
        mixed.continuous_batching_context_manager()


def test_room_for_a_continued_sequence(mixed):
    """Counted alike when the whole sequence is passed again and when only its new token is."""
    ids = torch.tensor([prompts(1)[0]])
    first = mixed.generate(
        ids, max_new_tokens=4, cache=mixed.new_cache(20), return_dict_in_generate=True, **PLAIN
    )
    mask = torch.ones_like(first.sequences)  # 8 tokens, of which the cache holds 7
    for passed in (first.sequences, first.sequences[:, -1:]):
        options = {"attention_mask": mask, **PLAIN}
        with pytest.raises(ValueError, match="room for 20 tokens, the request may read 21"):
            mixed.generate(passed, max_new_tokens=14, cache=first[CACHE], **options)
        twin = copy.deepcopy(first[CACHE])
        found = mixed.generate(passed, max_new_tokens=13, cache=twin, **options)
        assert found.shape[1] == passed.shape[1] + 13
    with pytest.raises(ValueError, match="holds 7 tokens, input_ids 1; pass the whole"):
        mixed.generate(first.sequences[:, -1:], max_new_tokens=2, cache=first[CACHE], **PLAIN)


def test_defaults_of_the_checkpoint_are_not_options_of_the_caller(mixed):
    """A base that samples by default can still be asked for greedy decoding."""
    row = prompts(1)[0]
    before = mixed.generation_config
    try:
        mixed.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
        ids = torch.tensor([row])
        found = mixed.generate(ids, max_new_tokens=4, **PLAIN)
        assert found[0].tolist() == row + greedy(mixed, row, 4)
        changed = copy.deepcopy(mixed.generation_config)
        changed.do_sample, changed.max_new_tokens, changed.pad_token_id = False, 4, 0
        assert torch.equal(mixed.generate(ids, changed), found)
        torch.manual_seed(0)
        mixed.generate(ids, max_new_tokens=4, top_k=3, pad_token_id=0)  # applies: it samples
    finally:
        mixed.generation_config = before


def test_the_default_length_stops_at_the_shortest_context():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", context=12), 0.5)
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert mixture.generate(ids, **PLAIN).shape[1] <= 13
    with pytest.raises(ValueError, match="has a context of 12"):
        mixture.generate(ids, max_new_tokens=11, **PLAIN)
    assert mixture.generate(ids, max_new_tokens=10, **PLAIN).shape == (1, 13)
