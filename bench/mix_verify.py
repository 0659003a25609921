"""mix_verify: four tokens that the memory drafted, accepted or replaced, per row."""

from collections.abc import Iterator

import baselines
import floors
import torch
from cases import BASELINE, SUBJECT, Case, Provider, nbytes, require
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT, Pair

import mdkernels

DRAFTED = 4
SHAPES = {"full": ((1, 50257), (8, 50257), (1, 151936)), "smoke": ((3, 1001),)}
FILTERS = (
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.0},
)
DRAWS = {"full": 32, "smoke": 8}  # verifications per row that the check makes, of other seeds
# Standard errors between the first places that are accepted and their expectation.
Z_LIMIT = 5.0


def cases(suite: str) -> Iterator[Case]:
    for batch, vocab in SHAPES[suite]:
        for dtype in ("fp32", "bf16"):
            for filters in FILTERS:
                yield case(suite, batch, vocab, dtype, filters)


def drafted(memory: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, DRAFTED) tokens that a memory with these (B, DRAFTED + 1, V) logits draws."""
    probs = (memory[:, :-1].double() / temperature).softmax(2).flatten(0, 1).cpu()
    generator = torch.Generator().manual_seed(9)
    return torch.multinomial(probs, 1, generator=generator).view(len(memory), -1).to(memory.device)


def first_rate(expected, memory, ids, temperature: float, filters: dict) -> torch.Tensor:
    """(B,) float64: how probably the first drafted token is accepted. `expected`: the mixture's
    (B, V) log-probabilities there."""
    filters = dict(filters)
    scores = expected / filters.pop("temperature")
    target = baselines.filter_logprobs(scores, **filters).log_softmax(1)
    draft = (memory[:, 0].double() / temperature).log_softmax(1)
    gold = ids[:, :1]
    return (target.gather(1, gold) - draft.gather(1, gold))[:, 0].exp().clamp(max=1.0)


def case(suite: str, batch: int, vocab: int, dtype: str, filters: dict) -> Case:
    places, draws = DRAFTED + 1, DRAWS[suite]
    pair = Pair(batch * places, vocab, dtype)
    base, memory = (x.view(batch, places, vocab) for x in (pair.base, pair.memory))
    temperature = MEMORY_TEMPERATURE * filters["temperature"]
    ids, seeds = drafted(memory, temperature), torch.arange(batch)
    options = {"memory_temperature": MEMORY_TEMPERATURE, **filters}

    def ours(backend="auto", wide=lambda x: x):
        with torch.no_grad():
            return mdkernels.mix_verify(
                wide(base), wide(memory), MIX_WEIGHT, ids, seeds=seeds, backend=backend, **options
            )

    def eager():
        with torch.no_grad():
            return baselines.mix_verify(base, memory, MIX_WEIGHT, ids, **options)

    calls = {"mdkernels": ours, "eager": eager}

    def check():
        pair.refresh()
        rate = first_rate(pair.expected().view(base.shape)[:, 0], memory, ids, temperature, filters)
        error = float((draws * (rate * (1 - rate)).sum()).sqrt().clamp(min=1.0))
        surplus, mismatched = dict.fromkeys(calls, 0.0), 0
        torch.manual_seed(8)  # the eager one's
        for draw in range(draws):
            seeds.copy_(torch.arange(batch) + draw * batch)
            for name, call in calls.items():
                surplus[name] += float((call()[0] > 0).sum() - rate.sum())
            if draw == 0:
                same = ours("reference", torch.Tensor.double).tokens == ours().tokens
                mismatched = int((~same).any(1).sum())
        found = {name: {"z_score": abs(surplus[name]) / error} for name in calls}
        found["mdkernels"]["rows_unlike_float64"] = float(mismatched)
        limits = {"z_score": Z_LIMIT, "rows_unlike_float64": 0.0}
        return {
            name: require(name, errors, {key: limits[key] for key in errors})
            for name, errors in found.items()
        }

    providers = [
        Provider(name, call, SUBJECT if name == "mdkernels" else BASELINE, pair.refresh)
        for name, call in calls.items()
    ]
    providers.append(floors.read(pair.base, pair.memory, prepare=pair.refresh))
    return Case(
        op="mix_verify",
        shape={"B": batch, "G": DRAFTED, "V": vocab, "top_k": filters["top_k"]},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(pair.base, pair.memory),
        floor="both logits read at all places; with top_k=50 also temperature 0.8, top_p=0.95",
    )
