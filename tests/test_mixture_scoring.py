"""Continuations scored by a mixture, against the float64 mixture of full logits."""

import pytest
import torch
from mixture_fixtures import VOCAB, greedy, mixture_of, oracle
from pipeline_fixtures import tiny_model

from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_scoring import MixtureScorer


def expected(mixture, context, continuation, longest=None):
    ids = [*context, *continuation]
    read = ids[:-1] if longest is None else ids[:-1][-longest:]
    logprobs = oracle(mixture, read)[0][-len(continuation) :]
    gold = logprobs[torch.arange(len(continuation)), torch.tensor(continuation)]
    return float(gold.sum()), logprobs.argmax(1).tolist() == list(continuation)


def check(found, wanted):
    for (logprob, is_greedy), (gold, best) in zip(found, wanted, strict=True):
        assert logprob == pytest.approx(gold, abs=2e-5)
        assert is_greedy == best


def draw(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "families", [("gpt2", "gpt2"), ("llama", "gpt2"), ("qwen2", "llama", "gpt2")], ids="-".join
)
def test_ragged_requests_equal_the_oracle(families, batch_size):
    """Among them several answers to one context, a greedy one, and one that is greedy but for its
    last token."""
    mixture = mixture_of(*families, weight=0.6 if len(families) == 2 else (0.3, 0.45))
    contexts = draw(9, 1, 23, 4)
    requests = list(zip(contexts, draw(3, 1, 7, 5, seed=1), strict=True))
    requests += [(contexts[2], [token]) for token in (5, 9, 5)]
    best = greedy(mixture, contexts[0], 4)
    requests += [(contexts[0], best), (contexts[0], [*best[:3], (best[3] + 1) % VOCAB])]
    # The first two read the same tokens as the last ones, but score fewer of them.
    requests += [(contexts[0] + best[:3], best[3:])]
    scorer = MixtureScorer(mixture)
    scorer.chunk = 4
    wanted = [expected(mixture, *request) for request in requests]
    assert [greedy for _, greedy in wanted].count(True) == 2
    check(scorer.scores(requests, batch_size=batch_size), wanted)


def test_requests_that_read_the_same_tokens_share_a_forward_pass(monkeypatch):
    scorer = MixtureScorer(mixture_of("llama", "gpt2"))
    seen = []
    for model in scorer.models:
        forward = model.base_model.forward
        monkeypatch.setattr(
            model.base_model,
            "forward",
            lambda *a, forward=forward, **k: seen.append(k["input_ids"].shape) or forward(*a, **k),
        )
    (context,) = draw(6)
    scorer.scores([(context, [token]) for token in range(5)], batch_size=2)
    assert seen == [(1, 6), (1, 6)]


@pytest.mark.parametrize(("weight", "live"), [(0.0, 0), (1.0, 1)])
def test_a_model_of_weight_zero_is_not_run(weight, live):
    models = [tiny_model("llama"), tiny_model("gpt2", seed=1)]
    mixture = MemoryMixture(*models, weight, 1.3)
    wanted = [expected(mixture, [3, 4], [5, 6])]
    with torch.no_grad():
        for parameter in models[1 - live].parameters():
            parameter.fill_(torch.nan)
    check(MixtureScorer(mixture).scores([([3, 4], [5, 6])]), wanted)


def test_weights_and_temperature_are_those_of_the_mixture_at_the_call():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.0)
    scorer = MixtureScorer(mixture)
    requests = list(zip(draw(5, 3), draw(2, 6, seed=1), strict=True))
    for weight, temperature in ((0.0, 1.0), (0.4, 1.0), (0.4, 1.7), (1.0, 1.7)):
        mixture.mix_weight, mixture.memory_temperature = weight, temperature
        check(scorer.scores(requests), [expected(mixture, *request) for request in requests])


def test_padded_vocabularies_are_scored_over_the_common_ids():
    wide, narrow = tiny_model("llama", vocab_size=384), tiny_model("gpt2", seed=1)
    requests = list(zip(draw(5, 3), draw(2, 6, seed=1), strict=True))
    for pair in ((wide, narrow), (narrow, wide)):
        mixture = MemoryMixture(*pair, 0.5)
        wanted = [expected(mixture, *request) for request in requests]
        check(MixtureScorer(mixture).scores(requests), wanted)


def test_long_contexts_lose_their_beginning_and_what_fits_does_not():
    mixture = mixture_of("llama", "gpt2")
    scorer = MixtureScorer(mixture)
    assert scorer.context == 64
    for length, longest in ((80, 64), (61, 64), (62, 64), (30, 16)):
        request = (draw(length)[0], [7, 8, 9, 10])
        found = scorer.scores([request], max_length=None if longest == 64 else longest)
        check(found, [expected(mixture, *request, longest)])


def test_bfloat16_models_keep_the_temperature_exact():
    models = [tiny_model("llama").bfloat16(), tiny_model("gpt2", seed=1).bfloat16()]
    mixture = MemoryMixture(*models, 0.6, 1.7)
    (context, continuation) = draw(9, 12)
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        base, memory = (model(ids[:, :-1]).logits[0, -12:].double() for model in models)
    p = 0.4 * base.softmax(1) + 0.6 * (memory / 1.7).softmax(1)
    gold = float(p.log().gather(1, ids[0, -12:, None]).sum())
    ((found, _),) = MixtureScorer(mixture).scores([(context, continuation)])
    assert found == pytest.approx(gold, abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (([], [1]), {}, "the context of request 0 is empty"),
        (([1], []), {}, "the continuation of request 0 is empty"),
        (([1], [2] * 65), {}, "has 65 tokens, at most 64 can be scored"),
        (([1], [2]), {"max_length": 65}, "max_length: expected 1 to 64"),
        (([1], [2]), {"max_length": 0}, "max_length: expected 1 to 64"),
    ],
)
def test_bad_requests(request_, options, message):
    with pytest.raises(ValueError, match=message):
        MixtureScorer(mixture_of("llama", "gpt2")).scores([request_], **options)


def test_no_requests():
    assert MixtureScorer(mixture_of("llama", "gpt2")).scores([]) == []
