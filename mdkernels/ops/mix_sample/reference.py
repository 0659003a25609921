"""mix_sample in eager torch: the specification, order of the filters as in Hugging Face."""

import math

import torch
from torch import Tensor

from ..logit_mix import reference as logit_mix
from ..logit_mix.arguments import (
    find_weight_fault,
    mixture_width,
    raise_row_fault,
    weights_valid,
)
from .philox import COMPONENTS, exponentials


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
    scores = filter_scores(scores, top_k, top_p, min_p)
    # The fastest of independent exponential clocks with these rates: a token wins with probability
    # proportional to its rate, and needs no normaliser for it.
    clocks = exponentials(seeds, offsets, scores.shape[1]) / scores.exp().double()
    return clocks.argmin(1).masked_fill(undefined, -1)


def choose(
    base_logits, memory_logits, row_weights, weights, memory_temperature, seeds, offsets
) -> Tensor:
    raise_row_fault(find_weight_fault(row_weights), row_weights)
    memories = len(memory_logits)
    if row_weights is None:
        shares = torch.tensor(weights, dtype=torch.float64, device=seeds.device).expand(
            len(seeds), -1
        )
        undefined = torch.zeros_like(seeds, dtype=torch.bool)
    else:
        total = row_weights.double().sum(1)
        # Rounded to the precision of the weights, so that 0.7 + 0.2 + 0.1 is 1.
        rest = (1.0 - total.to(row_weights.dtype).double()).clamp(min=0.0)
        shares = torch.cat([rest[:, None], row_weights.double()], 1)
        undefined = ~weights_valid(row_weights)
    clocks = exponentials(seeds, offsets, 1 + memories, COMPONENTS) / shares
    ids = torch.arange(1, 1 + memories, device=seeds.device)
    chosen = (clocks.argmin(1, keepdim=True) == ids).float()
    return chosen.masked_fill(undefined[:, None], math.nan)


def logprobs(
    base_logits, memory_logits, row_weights, weights, memory_temperature, tokens
) -> Tensor:
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    width = mixture_width(base_logits, memory_logits)
    rows = [logit_mix.forward(*arguments, base_scale=False)]
    for model in logit_mix.log_softmaxes(base_logits, memory_logits, memory_temperature):
        missing = width - model.shape[1]
        rows.append(torch.nn.functional.pad(model, (0, missing), value=-math.inf))
    known = ((tokens >= 0) & (tokens < width))[:, None]  # -1: nothing could be drawn
    gold = torch.where(known, tokens[:, None], 0)
    return torch.cat([row.gather(1, gold) for row in rows], 1).masked_fill(~known, math.nan)


def filter_scores(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
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
