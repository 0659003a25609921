"""generate() of a mixture, mode by mode, against float64 decoding without a cache."""

import copy
from itertools import chain

import pytest
import torch
from mixture_fixtures import (
    PAIRS,
    PLAIN,
    beam_search,
    greedy,
    left_padded,
    mixture_of,
    oracle,
    prompts,
)
from pipeline_fixtures import tiny_model, tiny_tokenizer
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE, MixtureCache

NEW = 10

# Every one of these has to give the greedy tokens.
GREEDY_MODES = {
    "plain": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 3},
    "chunked static": {"prefill_chunk_size": 3, "cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "one token of top-k": {"do_sample": True, "top_k": 1, "temperature": 2.0},
}


@pytest.fixture(params=PAIRS, ids="-".join)
def mixture(request):
    return mixture_of(*request.param)


@pytest.fixture(scope="module")
def mixed():
    return mixture_of("llama", "gpt2")


@pytest.mark.parametrize("mode", GREEDY_MODES)
def test_greedy(mixture, mode):
    row = prompts()[2]
    options = {**PLAIN, **GREEDY_MODES[mode]}
    found = mixture.generate(torch.tensor([row]), max_new_tokens=NEW, **options)
    assert found[0].tolist() == row + greedy(mixture, row, NEW)


@pytest.mark.parametrize("mode", ["plain", "static", "no cache", "chunked prefill"])
def test_a_left_padded_batch_equals_each_row_alone(mixture, mode):
    rows = prompts()
    ids, mask = left_padded(rows)
    options = {**PLAIN, **GREEDY_MODES[mode]}
    found = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    assert found[:, -NEW:].tolist() == [greedy(mixture, row, NEW) for row in rows]


def test_assisted(mixture):
    row = prompts()[1]
    other = MemoryMixture(mixture.base, mixture.memories, 0.2)
    for assistant in (mixture.memories[0], mixture.base, other):
        for options in ({}, {"mix_weight": 0.2}):
            found = mixture.generate(
                torch.tensor([row]),
                assistant_model=assistant,
                max_new_tokens=NEW,
                **PLAIN,
                **options,
            )
            weights = [options["mix_weight"]] if options else None
            assert found[0].tolist() == row + greedy(mixture, row, NEW, weights=weights)


def test_two_memories():
    mixture = mixture_of("llama", "gpt2", "qwen2", weight=(0.25, 0.4))
    rows = prompts()
    ids, mask = left_padded(rows)
    weights = torch.tensor([[0.5, 0.1], [0.0, 1.0], [0.2, 0.2]])
    for mode in ("plain", "static", "chunked prefill"):
        options = {**PLAIN, **GREEDY_MODES[mode], "attention_mask": mask, "max_new_tokens": NEW}
        found = mixture.generate(ids, **options)
        assert found[:, -NEW:].tolist() == [greedy(mixture, row, NEW) for row in rows]
        found = mixture.generate(ids, mix_weight=weights, **options)
        assert found[:, -NEW:].tolist() == [
            greedy(mixture, row, NEW, weights=own)
            for row, own in zip(rows, weights.double().tolist(), strict=True)
        ]


def test_a_sliding_window_beside_full_attention():
    """Layers of different kinds in one cache; the prompt alone is longer than the window."""
    config = MistralConfig(sliding_window=4, **tiny_model("llama").config.to_dict())
    base = MistralForCausalLM(config).eval()
    base.load_state_dict(tiny_model("llama").state_dict())
    mixture = MemoryMixture(base, tiny_model("gpt2", seed=1), 0.5)
    assert mixture.new_cache().is_sliding == [True, True, False, False]
    rows = prompts()
    ids, mask = left_padded(rows)
    want = [greedy(mixture, row, NEW) for row in rows]
    modes = [GREEDY_MODES[mode] for mode in ("plain", "static", "chunked prefill")]
    for options in (*modes, {"cache": mixture.new_cache()}, {"cache": mixture.new_cache(40)}):
        found = mixture.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, **{**PLAIN, **options}
        )
        assert found[:, -NEW:].tolist() == want
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": mixture.memories[0]}):
        found = mixture.generate(torch.tensor([rows[2]]), max_new_tokens=NEW, **PLAIN, **options)
        assert found[0, -NEW:].tolist() == want[2]
    found = mixture.generate(torch.tensor([rows[2]]), max_new_tokens=6, num_beams=3, **PLAIN)
    assert found[0].tolist() == beam_search(mixture, rows[2], 6, 3)[0][0]


def test_classifier_free_guidance(mixed):
    row, negative = prompts()[1], [5, 6, 7]
    found = mixed.generate(
        torch.tensor([row]),
        guidance_scale=1.5,
        negative_prompt_ids=torch.tensor([negative]),
        max_new_tokens=6,
        **PLAIN,
    )
    with_row, without = list(row), list(negative)
    for _ in range(6):
        logprobs = [oracle(mixed, ids)[0][-1] for ids in (with_row, without)]
        token = int((1.5 * logprobs[0] - 0.5 * logprobs[1]).argmax())
        with_row, without = [*with_row, token], [*without, token]
    assert found[0].tolist() == with_row


def test_a_mask_is_inferred_from_the_padding_token(mixed):
    rows = prompts()
    ids, mask = left_padded(rows)
    ids = ids.masked_fill(mask == 0, 0)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found = mixed.generate(ids, eos_token_id=None, **options)
    assert found[:, -NEW:].tolist() == [greedy(mixed, row, NEW) for row in rows]
    with pytest.raises(ValueError, match="no row may be all padding"):
        mixed.generate(torch.zeros(2, 3, dtype=torch.int64), eos_token_id=None, **options)


@pytest.mark.parametrize("mode", ["plain", "static", "no cache"])
def test_beams(mixture, mode):
    rows = prompts(2)
    ids, mask = left_padded(rows)
    options = {**PLAIN, **GREEDY_MODES[mode], "num_beams": 3, "num_return_sequences": 2}
    found = mixture.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    for i, row in enumerate(rows):
        for k, (want, score) in enumerate(beam_search(mixture, row, 6, 3)[:2]):
            assert found.sequences[2 * i + k, -6:].tolist() == want[-6:]
            # length_penalty 1: per generated token
            assert float(found.sequences_scores[2 * i + k]) == pytest.approx(score / 6, abs=1e-5)


def test_beams_and_returned_sequences_with_a_weight_per_row(mixed):
    rows, weights = prompts(2), torch.tensor([0.1, 0.95])
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "mix_weight": weights, "max_new_tokens": 6}
    found = mixed.generate(ids, num_beams=3, **options, **PLAIN)
    for i, row in enumerate(rows):
        assert (
            found[i, -6:].tolist() == beam_search(mixed, row, 6, 3, [float(weights[i])])[0][0][-6:]
        )
    torch.manual_seed(5)
    sampling = {**PLAIN, "do_sample": True}
    several = mixed.generate(ids, num_return_sequences=3, **options, **sampling)
    torch.manual_seed(5)
    repeated = {
        "attention_mask": mask.repeat_interleave(3, 0),
        "mix_weight": weights.repeat_interleave(3, 0),
    }
    want = mixed.generate(ids.repeat_interleave(3, 0), **{**options, **repeated}, **sampling)
    assert torch.equal(several, want)
    torch.manual_seed(5)
    other = mixed.generate(
        ids, num_return_sequences=3, **{**options, "mix_weight": 0.5}, **sampling
    )
    assert not torch.equal(several, other)


def test_eos_ends_each_row_and_pads_it(mixture):
    rows = prompts()
    ids, mask = left_padded(rows)
    eos = greedy(mixture, rows[0], 4)[-1]
    found = mixture.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=3,
    )[:, ids.shape[1] :].tolist()
    want = [greedy(mixture, row, NEW, eos=eos) for row in rows]
    longest = max(map(len, want))
    assert min(map(len, want)) < longest
    assert found == [row + [3] * (longest - len(row)) for row in want]


def test_streamers_and_stopping_criteria(mixed):
    row = prompts()[1]
    want = greedy(mixed, row, NEW)

    class Collect(BaseStreamer):
        seen, ended = None, False

        def put(self, value):
            self.seen = [*(self.seen or []), value.flatten().tolist()]

        def end(self):
            self.ended = True

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= len(row) + 6)

    for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        streamer = Collect()
        found = mixed.generate(
            torch.tensor([row]), streamer=streamer, max_new_tokens=NEW, **PLAIN, **options
        )
        assert streamer.ended
        assert list(chain(*streamer.seen)) == found[0].tolist() == row + want
        stopped = mixed.generate(
            torch.tensor([row]),
            stopping_criteria=StoppingCriteriaList([After()]),
            max_new_tokens=NEW,
            **PLAIN,
            **{k: v for k, v in options.items() if k != "prompt_lookup_num_tokens"},
        )
        assert stopped[0].tolist() == row + want[:6]
    tokenizer = tiny_tokenizer()
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    mixed.generate(torch.tensor([row]), streamer=text, max_new_tokens=NEW, **PLAIN)
    assert "".join(text) == tokenizer.decode(want)
    for token in want:
        piece = tokenizer.decode([token])
        if piece.isascii() and piece.strip():
            break
    cut = mixed.generate(
        torch.tensor([row]), stop_strings=[piece], tokenizer=tokenizer, max_new_tokens=NEW, **PLAIN
    )
    assert cut[0].tolist() == row + want[: want.index(token) + 1]


@pytest.mark.parametrize("static", [None, 40])
def test_continue_from_a_cache(mixture, static):
    rows = prompts()
    ids, mask = left_padded(rows)
    cache = mixture.new_cache(static)
    first = mixture.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        cache=cache,
        return_dict_in_generate=True,
        **PLAIN,
    )
    assert first[CACHE] is cache
    assert isinstance(cache, MixtureCache)
    grown = torch.cat([mask, mask.new_ones(3, 4)], 1)
    # The whole sequence again, or only what the cache has not seen: the last token.
    twin = copy.deepcopy(cache)
    for passed, used in ((first.sequences, cache), (first.sequences[:, -1:], twin)):
        found = mixture.generate(
            passed, attention_mask=grown, max_new_tokens=6, cache=used, **PLAIN
        )
        assert found[:, -6:].tolist() == [greedy(mixture, row, NEW)[4:] for row in rows]


def test_custom_generate_receives_cache_weights_and_processors(mixed):
    rows = prompts(2)
    ids, mask = left_padded(rows)
    weights = torch.tensor([0.2, 0.8])

    def loop(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        own=None,
        **model_kwargs,
    ):
        assert own == "mine"
        assert isinstance(model_kwargs[CACHE], MixtureCache)
        assert model_kwargs["mix_weight"].shape == (2, 1)
        while not stopping_criteria(input_ids, None).all():
            length = None if not model_kwargs[CACHE].get_seq_length() else 1
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=length, **model_kwargs
            )
            out = model(**inputs)
            picked = logits_processor(input_ids, out.logits[:, -1]).argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, picked], 1)
            model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
        return input_ids

    found = mixed.generate(
        ids,
        attention_mask=mask,
        custom_generate=loop,
        own="mine",
        mix_weight=weights,
        max_new_tokens=NEW,
        **PLAIN,
    )
    for i, row in enumerate(rows):
        assert found[i, -NEW:].tolist() == greedy(mixed, row, NEW, weights=[float(weights[i])])
