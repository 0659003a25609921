"""A cache that grows in place gives what a DynamicCache gives, whatever is done to it."""

import copy

import torch
from pipeline_fixtures import tiny_model
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from mdkernels.growing_cache import GrowingLayer, growing_cache


def test_every_operation_of_a_dynamic_cache():
    config = tiny_model("llama").config
    generator = torch.Generator().manual_seed(0)
    grown, plain = growing_cache(config), DynamicCache(config=config)
    rows = 3

    def both(act):
        for cache in (grown, plain):
            act(cache)
        for ours, theirs in zip(grown.layers, plain.layers, strict=True):
            assert isinstance(ours, GrowingLayer)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        assert grown.get_seq_length() == plain.get_seq_length()

    def append(count):
        states = torch.randn(2, 2, rows, 1, count, 16, generator=generator)

        def act(cache):
            for layer, (keys, values) in enumerate(states):
                cache.update(keys, values, layer)

        both(act)

    for count in (5, 1, 70, 1, 40, 1):
        append(count)
    both(lambda cache: cache.crop(-3))
    append(2)
    both(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    append(1)
    both(lambda cache: cache.batch_select_indices(torch.tensor([2, 1])))
    rows = 2
    append(3)
    both(lambda cache: cache.batch_repeat_interleave(2))
    rows = 4
    append(1)
    other = copy.deepcopy(grown)
    append(1)
    assert other.get_seq_length() == grown.get_seq_length() - 1
    before = grown.layers[0].keys.clone()
    other.update(torch.ones(4, 1, 1, 16), torch.ones(4, 1, 1, 16), 0)
    assert torch.equal(grown.layers[0].keys, before)
    for cache in (grown, plain):
        cache.reset()
    if not plain.get_seq_length():  # before transformers 5.24 the length, and so the rows, stay
        rows = 3
    append(2)


def test_keys_stay_where_they_are():
    cache = growing_cache(tiny_model("llama").config)
    places = set()
    for _ in range(60):
        cache.update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_a_sliding_window_stays_one():
    config = MistralConfig(sliding_window=4, **tiny_model("llama").config.to_dict())
    assert {type(layer) for layer in growing_cache(config).layers} == {DynamicSlidingWindowLayer}
