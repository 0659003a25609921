"""Mixtures and references of the decoding tests.

Tokens are compared for equality in float64: in fp32 a pass over several tokens rounds differently
from one over a single token, and a near tie may then fall either way.
"""

import copy
import functools
import itertools

import numpy as np
import torch
from mix_sample_oracle import processed
from mixture_fixtures import mixture_of
from pipeline_fixtures import tiny_model

from mdkernels.decode_loop import run
from mdkernels.decode_rows import Request, Sampling
from mdkernels.mixture import MemoryMixture


@functools.cache
def double_mixture(*families, **options) -> MemoryMixture:
    """`mixture_of` in float64. Shared between tests: leave it as it is."""
    source = mixture_of(*families, **options)
    models = [copy.deepcopy(model).double() for model in source.models]
    return MemoryMixture(models[0], models[1:], source.mix_weight, source.memory_temperature)


def small_vocabulary(vocab=5, weight=0.4, temperature=1.2) -> MemoryMixture:
    """A mixture whose next tokens can be enumerated."""
    models = [
        tiny_model(name, vocab_size=vocab, seed=i) for i, name in enumerate(("llama", "gpt2"))
    ]
    return MemoryMixture(models[0], models[1], weight, temperature)


@torch.no_grad()
def joint(mixture, prompt, places, **filters):
    """fp64 (V,) * places: the probability of every continuation, filters applied at each place."""
    models = [copy.deepcopy(model).double() for model in mixture.models]
    weights = [1 - sum(mixture.mix_weight), *mixture.mix_weight]
    heat = [1.0, *[mixture.memory_temperature] * len(mixture.memories)]
    vocab = mixture.config.vocab_size
    total = np.ones(())
    for place in range(places):
        rows = [[*prompt, *more] for more in itertools.product(range(vocab), repeat=place)]
        p = sum(
            w * (model(torch.tensor(rows)).logits[:, -1] / t).softmax(1)
            for w, t, model in zip(weights, heat, models, strict=True)
        )
        q, clear = processed(p.numpy(), **filters)
        assert clear.all()
        q = (q / q.sum(1, keepdims=True)).reshape([vocab] * (place + 1))
        total = total[..., None] * q
    return total


def fixed_distributions(base_logits, memory_logits, weight) -> MemoryMixture:
    """A mixture whose models give these (V,) logits behind any text."""
    models = []
    for logits in (base_logits, memory_logits):
        model = tiny_model("llama", vocab_size=len(logits), context=2048).double()
        with torch.no_grad():
            model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0].clone()
            hidden = model.model(torch.tensor([[0]]))[0][0, 0]
            model.lm_head.weight[:] = logits[:, None] * hidden / hidden.square().sum()
        models.append(model)
    return MemoryMixture(models[0], models[1], weight)


def decoded(mixture, ids, mask=None, *, new, draft=0, seeds=None, emit=None, eos=(), **filters):
    """`run` without generate() around it: what the decoding loop returns, statistics included."""
    sampling = None if seeds is None else Sampling(seeds, **filters)
    return run(
        Request(
            mixture=mixture,
            input_ids=ids,
            fresh=ids.shape[1],
            mask=mask,
            cache=mixture.new_cache(),
            max_new_tokens=new,
            sampling=sampling,
            draft_tokens=draft,
            emit=emit,
            eos=eos,
        )
    )
