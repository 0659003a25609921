"""mix_verify in eager torch: the specification."""

import math

import torch
from torch import Tensor

from ..logit_mix import reference as logit_mix
from ..logit_mix.arguments import find_weight_fault
from ..mix_sample.arguments import filtered
from ..mix_sample.philox import ACCEPT, RESIDUAL, TOKENS, exponentials
from ..mix_sample.reference import filter_scores
from .arguments import find_draft_fault, raise_fault


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    draft_ids,
    draft_lengths,
    draft_memory,
    draft_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> tuple[Tensor, Tensor]:
    raise_fault(find_weight_fault(row_weights), row_weights, draft_ids, 0)
    batch, most = draft_ids.shape
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    logprobs = logit_mix.forward(*arguments, base_scale=False)
    width = logprobs.shape[1]
    raise_fault(find_draft_fault(draft_ids, draft_lengths, width), row_weights, draft_ids, width)
    if not batch:
        return draft_lengths.clone(), draft_ids.new_empty((0, most + 1))
    undefined = logprobs[:, 0].isnan().view(batch, most + 1)
    if temperature == 0.0:
        best = logprobs.argmax(1).masked_fill(logprobs[:, 0].isnan(), -1).view(batch, most + 1)
        accepted, tokens = accept_greedy(best, draft_ids, draft_lengths)
        undefined = undefined.gather(1, accepted[:, None])[:, 0]
    else:
        target = logprobs
        if temperature != 1.0 or filtered(top_k, top_p, min_p):
            scores = (logprobs - logprobs.amax(1, keepdim=True)) / temperature
            target = filter_scores(scores, top_k, top_p, min_p).log_softmax(1)
        memory = memory_logits[draft_memory].to(target.dtype) / draft_temperature
        draft = torch.nn.functional.pad(
            memory.log_softmax(1), (0, width - memory.shape[1]), value=-math.inf
        )
        target, draft = (x.view(batch, most + 1, width) for x in (target, draft))

        # E >= log q' - log v with E ~ Exp(1) has the probability min(1, v / q').
        ids = draft_ids.clamp(0, width - 1)[..., None]
        surplus = (draft[:, :most].gather(2, ids) - target[:, :most].gather(2, ids))[..., 0]
        place = torch.arange(most, device=draft_ids.device)
        streams = (seeds[:, None].expand(-1, most), offsets[:, None] + place)
        clocks = exponentials(*(x.reshape(-1) for x in streams), 1, ACCEPT).view(batch, most)
        known = (draft_ids >= 0) & (draft_ids < width)
        accepted = count(known & (clocks >= surplus), draft_lengths)

        row = torch.arange(batch, device=draft_ids.device)
        target, draft = target[row, accepted].exp(), draft[row, accepted].exp()
        rejected = accepted < draft_lengths
        undefined = undefined[row, accepted] | (rejected & draft[:, 0].isnan())
        residual = (target - draft).clamp(min=0.0)
        # What rounding took from the residual altogether: the target itself is as good.
        left = residual.amax(1) >= torch.finfo(torch.float32).tiny
        rest = torch.where((rejected & left)[:, None], residual, target)
        where = (seeds, offsets + accepted, width)
        clocks = torch.where(
            rejected[:, None], exponentials(*where, RESIDUAL), exponentials(*where, TOKENS)
        )
        tokens = emit(accepted, draft_ids, (clocks / rest.double()).argmin(1))
    if undefined.device.type == "cpu" and bool(undefined.any()):
        row = int(undefined.nonzero()[0, 0])
        raise_fault(("undefined", row, int(accepted[row])), row_weights, draft_ids, width)
    ends = torch.arange(most + 1, device=draft_ids.device) == accepted[:, None]
    return accepted, tokens.masked_fill(ends & undefined[:, None], -1)


def accept_greedy(best, draft_ids, draft_lengths) -> tuple[Tensor, Tensor]:
    """`best`: (B, G + 1), the most probable token of each place or -1. (num_accepted, tokens)"""
    same = (best[:, :-1] == draft_ids) & (draft_ids >= 0)
    accepted = count(same, draft_lengths)
    return accepted, emit(accepted, draft_ids, best.gather(1, accepted[:, None])[:, 0])


def count(accepted: Tensor, draft_lengths: Tensor) -> Tensor:
    """(B,): how many of the first tokens are accepted, all before the first that is not."""
    place = torch.arange(accepted.shape[1], device=accepted.device)
    return (accepted & (place < draft_lengths[:, None])).long().cumprod(1).sum(1)


def emit(accepted: Tensor, draft_ids: Tensor, following: Tensor) -> Tensor:
    """(B, G + 1): the accepted tokens, the one that follows them, then -1."""
    place = torch.arange(draft_ids.shape[1] + 1, device=draft_ids.device)
    tokens = torch.cat([draft_ids, following[:, None]], 1)
    tokens = torch.where(place == accepted[:, None], following[:, None], tokens)
    return tokens.masked_fill(place > accepted[:, None], -1)
