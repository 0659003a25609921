"""mix_sample in eager torch: the specification, order of the filters as in Hugging Face."""

import math

import torch
from torch import Tensor

from ..logit_mix import reference as logit_mix
from ..logit_mix.arguments import mixture_width, raise_row_fault
from .philox import exponentials


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> Tensor:
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    logprobs = logit_mix.forward(*arguments, base_scale=False)
    if not logprobs.shape[0]:
        return seeds.clone()
    undefined = logprobs[:, 0].isnan()
    if undefined.device.type == "cpu" and bool(undefined.any()):
        raise_row_fault(("nan_row", int(undefined.nonzero()[0, 0]), 0), row_weights)
    scores = (logprobs - logprobs.amax(1, keepdim=True)) / temperature
    scores = _filter(scores, top_k, top_p, min_p)
    # The fastest of independent exponential clocks with these rates: a token wins with probability
    # proportional to its rate, and needs no normaliser for it.
    clocks = exponentials(seeds, offsets, scores.shape[1]) / scores.exp().double()
    return clocks.argmin(1).masked_fill(undefined, -1)


def logprobs(
    base_logits, memory_logits, row_weights, weights, memory_temperature, tokens
) -> Tensor:
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    width = mixture_width(base_logits, memory_logits)
    rows = [logit_mix.forward(*arguments, base_scale=False)]
    for model in logit_mix.log_softmaxes(base_logits, memory_logits, memory_temperature):
        missing = width - model.shape[1]
        rows.append(torch.nn.functional.pad(model, (0, missing), value=-math.inf))
    gold = tokens[:, None]
    return torch.cat([row.gather(1, gold) for row in rows], 1)


def _filter(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """-inf for what is not kept. Scores have their maximum at 0."""
    if 0 < top_k < scores.shape[1]:
        kth = scores.topk(top_k).values[:, -1:]  # ties of the k-th stay
        scores = scores.masked_fill(scores < kth, -math.inf)
    if top_p < 1.0:
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        probs = ranked.double().softmax(1)
        drop = probs.cumsum(1) - probs >= top_p  # the mass ranked before already suffices
        drop[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    if min_p > 0.0:
        scores = scores.masked_fill(scores.exp() < min_p, -math.inf)
    return scores
