"""mix_argmax: the greedy token of the mixture; nothing of shape (B, V) is written."""

from collections.abc import Iterator

import baselines
import floors
from cases import BASELINE, SUBJECT, Case, Goal, Provider, compiled, nbytes, require
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT, Pair, shapes
from regimes import REGIMES

import mdkernels

GOAL = 15
# The chosen token may fall short of the best log-probability by what rounding leaves undecided.
LIMIT = 2e-5


def cases(suite: str) -> Iterator[Case]:
    for batch, vocab, dtype in shapes(suite):
        yield case(suite, batch, vocab, dtype)


def case(suite: str, batch: int, vocab: int, dtype: str) -> Case:
    pair = Pair(batch, vocab, dtype)
    settings = (MIX_WEIGHT, MEMORY_TEMPERATURE)
    calls = {
        "mdkernels": pair.bind(
            mdkernels.mix_argmax, MIX_WEIGHT, memory_temperature=MEMORY_TEMPERATURE
        ),
        "eager": pair.bind(baselines.mix_argmax, *settings),
        "eager_probs": pair.bind(baselines.mix_argmax_probs, *settings),
    }
    if suite == "full":
        calls["compiled"] = pair.bind(compiled(baselines.mix_argmax), *settings)

    def check():
        wanted = pair.expected()
        errors = {}
        for name, call in calls.items():
            chosen = wanted.gather(1, call()[:, None]).squeeze(1)
            found = {"shortfall": float((wanted.amax(1) - chosen).max())}
            errors[name] = require(name, found, {"shortfall": LIMIT})
        return errors

    providers = [
        Provider(name, call, SUBJECT if name == "mdkernels" else BASELINE, pair.refresh)
        for name, call in calls.items()
    ]
    providers.append(floors.read(pair.base, pair.memory, prepare=pair.refresh))
    goals = [Goal("mdkernels", "eager", dict.fromkeys(REGIMES, GOAL))]
    return Case(
        op="mix_argmax",
        shape={"B": batch, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(pair.base, pair.memory),
        floor="both logits read",
        goals=goals if suite == "full" else [],
    )
