"""mix_sample: one token per row from the filtered mixture; nothing of shape (B, V) is written."""

from collections.abc import Iterator

import baselines
import floors
import torch
from cases import BASELINE, SUBJECT, Case, Provider, nbytes, require
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT, Pair

import mdkernels

SHAPES = {"full": ((1, 50257), (32, 50257)), "smoke": ((3, 1001),)}
TEMPERATURE = 0.8
FILTERS = ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 50, "top_p": 0.95, "min_p": 0.0})
# How far a drawn token may lie below the least probable one that the filters keep: the boundary
# itself is subject to rounding.
LIMIT = 1e-4
DRAWS = {"full": 32, "smoke": 8}  # draws per row that the check makes, each with seeds of its own
# Standard errors between the mean log-probability of all draws and its expectation: a sampler that
# prefers likely tokens, or unlikely ones, fails.
Z_LIMIT = 5.0


def cases(suite: str) -> Iterator[Case]:
    for batch, vocab in SHAPES[suite]:
        for dtype in ("fp32", "bf16"):
            for filters in FILTERS:
                yield case(suite, batch, vocab, dtype, filters)


def case(suite: str, batch: int, vocab: int, dtype: str, filters: dict) -> Case:
    pair = Pair(batch, vocab, dtype)
    seeds, draws = torch.arange(batch), DRAWS[suite]
    options = {"memory_temperature": MEMORY_TEMPERATURE, "temperature": TEMPERATURE, **filters}
    calls = {
        "mdkernels": pair.bind(mdkernels.mix_sample, MIX_WEIGHT, seeds=seeds, **options),
        "eager": pair.bind(baselines.mix_sample, MIX_WEIGHT, **options),
    }

    def check():
        wanted = pair.expected() / TEMPERATURE
        kept = baselines.filter_logprobs(wanted, **filters)
        least = wanted.masked_fill(kept.isinf(), float("inf")).amin(1)
        logq = kept.log_softmax(1)
        mean = torch.xlogy(logq.exp(), logq.exp()).sum(1)
        variance = (logq.exp() * logq.masked_fill(kept.isinf(), 0.0).square()).sum(1) - mean**2
        below, total = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0.0)
        torch.manual_seed(8)  # the eager sampler's
        for draw in range(draws):
            seeds.copy_(torch.arange(batch) + draw * batch)
            for name, call in calls.items():
                token = call()[:, None]
                below[name] = max(
                    below[name], float((least[:, None] - wanted.gather(1, token)).max())
                )
                # A token just below the boundary counts as the least probable one that is kept.
                drawn = logq.gather(1, token).clamp(min=float(logq[kept > -float("inf")].min()))
                total[name] += float((drawn.squeeze(1) - mean).sum())
        error = float((draws * variance.sum()).sqrt())
        return {
            name: require(
                name,
                {"below_kept": below[name], "z_score": abs(total[name]) / error},
                {"below_kept": LIMIT, "z_score": Z_LIMIT},
            )
            for name in calls
        }

    providers = [
        Provider(name, call, SUBJECT if name == "mdkernels" else BASELINE, pair.refresh)
        for name, call in calls.items()
    ]
    providers.append(floors.read(pair.base, pair.memory, prepare=pair.refresh))
    return Case(
        op="mix_sample",
        shape={"B": batch, "V": vocab, "top_k": filters["top_k"]},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(pair.base, pair.memory),
        floor="both logits read; temperature 0.8, with top_k=50 also top_p=0.95",
    )
