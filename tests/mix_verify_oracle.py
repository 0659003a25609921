"""What mix_verify has to emit, in float64 and place by place, sharing no code with the package."""

import numpy as np
import torch
from mix_fixtures import mixture, softmax
from mix_sample_oracle import AMBIGUOUS, exponentials, processed

ROUNDING = 4e-6  # of an fp32 probability, relative


def distributions(base, memories, weights, draft_temperature, memory_temperature=1.0, draft=0):
    """(v, q): (B, G + 1, V) of the mixture and of the draft."""
    memories = memories if isinstance(memories, list) else [memories]
    places = base.shape[1]
    if isinstance(weights, torch.Tensor):
        weights = weights.repeat_interleave(places, 0).numpy().reshape(-1, len(memories))
    flat = [x.flatten(0, 1) for x in (base, *memories)]
    v = mixture(flat[0], flat[1:], weights, memory_temperature)
    q = np.zeros_like(v)
    one = softmax(flat[1 + draft], draft_temperature)
    q[:, : one.shape[1]] = one
    return tuple(x.reshape(len(base), places, -1) for x in (v, q))


def drafts(q, seed):
    """(B, G) tokens drawn from q, with numpy's own generator."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(q[:, :-1], 2)
    u = rng.random(cumulative.shape[:2])[..., None] * cumulative[..., -1:]
    return torch.from_numpy((cumulative <= u).sum(2))


def race(low, high, seed, offset, stream):
    """The winner by the middle of the rates' bounds, and whether it wins whatever they are."""
    e = exponentials([seed], [offset], len(low), stream)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        clocks, earliest, latest = e / ((low + high) / 2), e / high, e / low
    token = int(clocks.argmin())
    earliest[token] = np.inf
    return token, bool(latest[token] < earliest.min(initial=np.inf))


def verify(v, q, ids, lengths, seeds, offsets, **filters):
    """(num_accepted, tokens, clear), `clear` where fp32 rounding cannot change either."""
    batch, places, _ = v.shape
    counts, tokens = np.zeros(batch, int), np.full((batch, places), -1)
    clear = np.ones(batch, bool)
    for row in range(batch):
        for i in range(places):
            target, sure = processed(v[row, i : i + 1], **filters)
            target = target[0] / target.sum()
            clear[row] &= sure[0]
            counts[row] = i
            where = (seeds[row], offsets[row] + i)
            if i == lengths[row]:
                margin = target * AMBIGUOUS
                token, sure = race(target - margin, target + margin, *where, 0)
                break
            x = ids[row, i]
            with np.errstate(divide="ignore", invalid="ignore"):
                gap = np.log(q[row, i, x]) - np.log(target[x])
            e = exponentials(*([w] for w in where), 1, 4)[0, 0]
            clear[row] &= not np.isfinite(gap) or abs(e - gap) > AMBIGUOUS * (1 + abs(gap))
            if e >= gap:
                tokens[row, i] = x
                continue
            margin = ROUNDING * np.maximum(target, q[row, i])
            left = target - q[row, i]
            low, high = np.maximum(left - margin, 0), np.maximum(left + margin, 0)
            token, sure = race(low, high, *where, 6)
            break
        tokens[row, i] = token
        clear[row] &= sure
    return torch.from_numpy(counts), torch.from_numpy(tokens), torch.from_numpy(clear)
