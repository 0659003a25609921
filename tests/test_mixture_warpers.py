"""Processors and warpers in generate() of a mixture, against float64 decoding without a cache."""

import pytest
import torch
from mixture_fixtures import PLAIN, left_padded, mixture_of, oracle, prompts
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation import logits_process

NEW = 10


@pytest.fixture(scope="module")
def mixed():
    return mixture_of("llama", "gpt2")


WARPERS = {
    "none": ({}, []),
    "temperature": ({"temperature": 0.7}, [logits_process.TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 5}, [logits_process.TopKLogitsWarper(5)]),
    "top-p": ({"top_p": 0.6}, [logits_process.TopPLogitsWarper(0.6)]),
    "min-p": ({"min_p": 0.2}, [logits_process.MinPLogitsWarper(0.2)]),
    "typical": ({"typical_p": 0.5}, [logits_process.TypicalLogitsWarper(0.5)]),
    "epsilon": ({"epsilon_cutoff": 0.02}, [logits_process.EpsilonLogitsWarper(0.02)]),
    "eta": ({"eta_cutoff": 0.02}, [logits_process.EtaLogitsWarper(0.02)]),
    "repetition": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "n-gram": ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
    "all": (
        {"repetition_penalty": 1.3, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.TemperatureLogitsWarper(1.5),
            logits_process.TopKLogitsWarper(40),
            logits_process.TopPLogitsWarper(0.9),
            logits_process.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_sampling_with_every_warper(mixed, name):
    """The same draws as from the oracle's logits: scale and shape are what the warpers expect."""
    options, processors = WARPERS[name]
    row = prompts()[1]
    torch.manual_seed(3)
    found = mixed.generate(
        torch.tensor([row]),
        max_new_tokens=NEW,
        **{**PLAIN, "do_sample": True, "top_k": 0, **options},
    )
    torch.manual_seed(3)
    want = torch.tensor([row])
    for _ in range(NEW):
        scores = oracle(mixed, want[0].tolist())[1][-1:].float()
        scores = LogitsProcessorList(processors)(want, scores)
        want = torch.cat([want, torch.multinomial(scores.softmax(-1), 1)], 1)
    assert torch.equal(found, want)


def test_scores_logits_and_processors_see_the_base_scale(mixed):
    rows = prompts(2)
    ids, mask = left_padded(rows)
    minimum = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(ids.shape[1], 3, [9])])
    found = mixed.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        logits_processor=minimum,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **PLAIN,
    )
    for i, row in enumerate(rows):
        whole = row + found.sequences[i, -4:].tolist()
        want = oracle(mixed, whole[:-1])[1][-4:]
        torch.testing.assert_close(
            torch.stack(found.logits)[:, i].double(), want, atol=2e-5, rtol=0
        )
        assert [bool(step[i, 9] == -torch.inf) for step in found.scores] == [True] * 3 + [False]


def test_a_watermark_given_as_a_dict(mixed):
    """As generate() of any model takes it."""
    ids = torch.tensor(prompts()[:1])
    found = []
    for watermark in (WatermarkingConfig(bias=4.0), {"bias": 4.0}):
        options = {**PLAIN, "max_new_tokens": 4, "watermarking_config": watermark}
        found.append(mixed.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*found)
