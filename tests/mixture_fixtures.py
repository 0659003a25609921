"""Mixtures of tiny models, and what they must do: float64, one step after the other, no cache."""

import copy
import functools

import torch
from pipeline_fixtures import tiny_model

from mdkernels.mixture import MemoryMixture

PAIRS = (("gpt2", "gpt2"), ("llama", "llama"), ("qwen2", "qwen2"), ("llama", "gpt2"))
WEIGHT, TEMPERATURE = 0.6, 1.3
VOCAB = 320
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@functools.cache
def mixture_of(*families, weight=WEIGHT, temperature=TEMPERATURE) -> MemoryMixture:
    """Base, then memories. Shared between tests: leave it as it is."""
    models = [tiny_model(family, seed=i) for i, family in enumerate(families)]
    return MemoryMixture(models[0], models[1:], weight, temperature)


@functools.cache
def _doubled(mixture):
    return [copy.deepcopy(model).double() for model in mixture.models]


@torch.no_grad()
def oracle(mixture, ids, weights=None):
    """fp64 (T, V): log p behind every position of one unpadded row, and (T, V) the same on the
    base's scale. V is the base's width; ids that a model lacks have -inf."""
    weights = list(mixture.mix_weight) if weights is None else weights
    logits = [model(torch.tensor([ids])).logits[0] for model in _doubled(mixture)]
    full, width = logits[0].shape[1], min(one.shape[1] for one in logits)
    p = (1 - sum(weights)) * logits[0][:, :width].softmax(1)
    for weight, one in zip(weights, logits[1:], strict=True):
        p = p + weight * (one[:, :width] / mixture.memory_temperature).softmax(1)
    logprobs = torch.full((len(ids), full), -torch.inf, dtype=torch.float64)
    logprobs[:, :width] = p.log()
    return logprobs, logprobs + logits[0][:, :width].logsumexp(1, keepdim=True)


def greedy(mixture, ids, new, *, weights=None, eos=None):
    """The new tokens."""
    ids = list(ids)
    for done in range(new):
        ids.append(int(oracle(mixture, ids, weights)[0][-1].argmax()))
        if ids[-1] == eos:
            return ids[-1 - done :]
    return ids[-new:]


def beam_search(mixture, ids, new, beams, weights=None):
    """[(tokens, sum of log p)], best first; nothing ends early, so all are of one length."""
    alive = [(list(ids), 0.0)]
    for _ in range(new):
        grown = []
        for row, score in alive:
            best = oracle(mixture, row, weights)[0][-1].topk(beams)
            grown += [
                ([*row, int(token)], score + float(value))
                for value, token in zip(*best, strict=True)
            ]
        alive = sorted(grown, key=lambda found: -found[1])[:beams]
    return alive


def prompts(count=3, seed=0):
    """Rows of 4, 7, 10, ... ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCAB, (4 + 3 * i,), generator=generator).tolist() for i in range(count)
    ]


def left_padded(rows):
    """(ids, mask); the padding is a token that would change every result if it were read."""
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
