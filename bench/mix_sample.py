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
DRAWS = 64  # draws per row that the check makes, each with seeds of its own


def cases(suite: str) -> Iterator[Case]:
    for batch, vocab in SHAPES[suite]:
        for dtype in ("fp32", "bf16"):
            for filters in FILTERS:
                torch._dynamo.reset()
                yield case(batch, vocab, dtype, filters)


def case(batch: int, vocab: int, dtype: str, filters: dict) -> Case:
    pair = Pair(batch, vocab, dtype)
    seeds = torch.arange(batch)
    sampling = {"temperature": TEMPERATURE, **filters}
    ours = {"memory_temperature": MEMORY_TEMPERATURE, **sampling}
    eager = {"memory_temperature": MEMORY_TEMPERATURE, **sampling}
    calls = {
        "mdkernels": pair.bind(mdkernels.mix_sample, MIX_WEIGHT, seeds=seeds, **ours),
        "eager": pair.bind(baselines.mix_sample, MIX_WEIGHT, **eager),
    }

    def check():
        wanted = pair.expected() / TEMPERATURE
        kept = baselines.filter_logprobs(wanted, **filters)
        least = wanted.masked_fill(kept.isinf(), float("inf")).amin(1)
        errors = dict.fromkeys(calls, 0.0)
        for draw in range(DRAWS):
            seeds.copy_(torch.arange(batch) + draw * batch)
            for name, call in calls.items():
                drawn = wanted.gather(1, call()[:, None]).squeeze(1)
                errors[name] = max(errors[name], float((least - drawn).max()))
        return {
            name: require(name, {"below_kept": error}, {"below_kept": LIMIT})
            for name, error in errors.items()
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
