"""logit_mix: the mixed log-probabilities of two models, written out in fp32."""

from collections.abc import Iterator

import baselines
import floors
from cases import BASELINE, SUBJECT, Case, Goal, Provider, compiled, nbytes, require
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT, Pair, shapes
from regimes import REGIMES

import mdkernels

GOALS = {"fp32": 5.5, "bf16": 6.5}
LIMIT = 2e-5  # absolute, on log-probabilities down to about -30
# torch adds a row of fp32 exponentials up in fp32: 4e-5 off at V=151936 on an AVX2 processor.
BASELINE_LIMIT = 1e-4


def cases(suite: str) -> Iterator[Case]:
    for batch, vocab, dtype in shapes(suite):
        yield case(suite, batch, vocab, dtype)


def case(suite: str, batch: int, vocab: int, dtype: str) -> Case:
    pair = Pair(batch, vocab, dtype)
    settings = (MIX_WEIGHT, MEMORY_TEMPERATURE)
    calls = {
        "mdkernels": pair.bind(
            mdkernels.logit_mix, MIX_WEIGHT, memory_temperature=MEMORY_TEMPERATURE
        ),
        "eager": pair.bind(baselines.mix, *settings),
    }
    if suite == "full":
        calls["compiled"] = pair.bind(compiled(baselines.mix), *settings)

    def check():
        wanted = pair.expected()
        errors = {}
        for name, call in calls.items():
            found = {"absolute": float((call() - wanted).abs().max())}
            limit = LIMIT if name == "mdkernels" else BASELINE_LIMIT
            errors[name] = require(name, found, {"absolute": limit})
        return errors

    providers = [
        Provider(name, call, SUBJECT if name == "mdkernels" else BASELINE, pair.refresh)
        for name, call in calls.items()
    ]
    providers.append(floors.mix(pair.base, pair.memory, pair.refresh))
    goals = [Goal("mdkernels", "eager", dict.fromkeys(REGIMES, GOALS[dtype]))]
    return Case(
        op="logit_mix",
        shape={"B": batch, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(pair.base, pair.memory) + 4 * batch * vocab,
        floor="both logits read, fp32 written to a reused buffer",
        goals=goals if suite == "full" else [],
    )
