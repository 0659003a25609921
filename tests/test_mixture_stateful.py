"""Models that keep a state instead of keys and values: decoded as they are alone, or refused."""

import functools

import pytest
import torch
from mixture_fixtures import PLAIN, greedy, left_padded, prompts
from pipeline_fixtures import tiny_model
from stateful_models import stateful_model

from mdkernels.decode import decode
from mdkernels.fast_decode import fast_decode
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE

# Whether the base keeps a state, or the memory does, or both.
MIXTURES = ["mamba+llama", "llama+mamba", "mamba+mamba", "jamba+llama", "qwen3_next+llama"]
FAST = {"custom_generate": fast_decode}


@functools.cache
def mixture_named(names) -> MemoryMixture:
    models = [
        tiny_model(name, seed=i) if name in ("gpt2", "llama") else stateful_model(name, seed=i)
        for i, name in enumerate(names.split("+"))
    ]
    return MemoryMixture(*models, 0.6)


@functools.cache
def expected(names, new=6):
    return [greedy(mixture_named(names), row, new) for row in prompts()]


@pytest.mark.parametrize("names", MIXTURES)
def test_padded_rows_decode_as_they_would_alone(names):
    """Mamba multiplies what it reads with its mask, which must not be that of the whole text."""
    mixture = mixture_named(names)
    ids, mask = left_padded(prompts())
    for options in ({}, {"cache_implementation": "static"}, FAST):
        found = mixture.generate(ids, attention_mask=mask, max_new_tokens=6, **PLAIN, **options)
        assert found[:, -6:].tolist() == expected(names), options
    assert decode(mixture, ids, mask, max_new_tokens=6)[:, -6:].tolist() == expected(names)


@pytest.mark.parametrize("names", ["llama+mamba", "mamba+mamba", "mamba2+mamba2", "jamba+llama"])
def test_a_row_without_padding(names):
    mixture = mixture_named(names)
    ids = torch.tensor(prompts()[-1:])
    for fast in ({}, FAST):
        for cache in ({}, {"cache_implementation": "static"}, {CACHE: mixture.new_cache(40)}):
            found = mixture.generate(ids, max_new_tokens=6, **PLAIN, **fast, **cache)
            assert found[:, -6:].tolist() == expected(names)[-1:], (fast, cache)


@pytest.mark.parametrize("names", ["mamba+mamba", "jamba+llama", "qwen3_next+llama"])
@pytest.mark.parametrize("own", [False, True])
def test_a_cache_is_continued(names, own):
    """With several tokens at once, too, where Mamba would start from an empty state."""
    mixture = mixture_named(names)
    ids = torch.tensor(prompts()[-1:])
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, **PLAIN, **FAST}
    given = {CACHE: mixture.new_cache()} if own else {}
    first = mixture.generate(ids, **options, **given)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    found = mixture.generate(ids, **{CACHE: first[CACHE]}, **options).sequences
    assert found[0, -4:].tolist() == greedy(mixture, ids[0].tolist(), 4)


@pytest.mark.parametrize("names", ["llama+mamba", "jamba+llama", "qwen3_next+llama"])
def test_a_prompt_in_pieces(names):
    mixture = mixture_named(names)
    ids = torch.tensor(prompts()[-1:])
    options = {"max_new_tokens": 6, "prefill_chunk_size": 3, **PLAIN}
    found = mixture.generate(ids, **options, **FAST)
    assert found[:, -6:].tolist() == expected(names)[-1:]
    if names.startswith("qwen3_next"):
        assert torch.equal(mixture.generate(ids, **options), found)
        return
    with pytest.raises(ValueError, match=r"cache: model \w+ .* reads 3 tokens at once as if noth"):
        mixture.generate(ids, **options)


def test_padding_that_would_reach_a_state_is_refused():
    mixture = mixture_named("jamba+llama")
    ids, mask = left_padded(prompts())
    options = {"max_new_tokens": 6, "prefill_chunk_size": 2, **PLAIN, **FAST}
    with pytest.raises(ValueError, match=r"attention_mask: holds padding .* prefill_chunk_size"):
        mixture.generate(ids, attention_mask=mask, **options)


def test_states_alone_are_not_read_again_by_generate():
    """transformers passes the whole text again where no layer counts tokens."""
    mixture = mixture_named("mamba+mamba")
    cache, ids = mixture.new_cache(), torch.tensor(prompts()[:1])
    options = {"max_new_tokens": 2, **PLAIN}
    longer = mixture.generate(ids, **{CACHE: cache}, **options)
    assert cache.get_seq_length() == longer.shape[1] - 1
    with pytest.raises(ValueError, match=r"cache: none of its models counts .* \(5 tokens\)"):
        mixture.generate(longer, **{CACHE: cache}, **options)
    cache.reset()
    assert torch.equal(mixture.generate(ids, **{CACHE: cache}, **options), longer)


def test_what_a_state_cannot_do_is_refused():
    mixture = mixture_named("llama+mamba")
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, **PLAIN}
    with pytest.raises(ValueError, match=r"draft_tokens: got 2 .* keep a state .* pass 0"):
        mixture.generate(ids, draft_tokens=2, **options, **FAST)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        mixture.generate(ids, prompt_lookup_num_tokens=2, **options)


def test_padding_in_a_static_cache_of_the_fast_loop_is_refused():
    """Such rows would come out otherwise than alone."""
    mixture = mixture_named("llama+mamba")
    ids, mask = left_padded(prompts())
    static = {"max_new_tokens": 6, "cache_implementation": "static", **PLAIN, **FAST}
    with pytest.raises(ValueError, match=r"cache: static, with padded rows .* keep a state"):
        mixture.generate(ids, attention_mask=mask, **static)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("rwkv", r"memory: RwkvForCausalLM takes no \w+, .* would forget"),
        ("xlstm", r"memory: xLSTMForCausalLM (keeps .* in a cache of its own kind|takes no )"),
        ("minimax", r"memory: MiniMaxForCausalLM keeps .* in a cache of its own kind"),
    ],
)
def test_a_family_without_a_cache_that_others_share_is_refused(family, message):
    with pytest.raises(TypeError, match=message):
        MemoryMixture(tiny_model("llama"), stateful_model(family), 0.5)
