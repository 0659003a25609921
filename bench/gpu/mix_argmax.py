"""mix_argmax on a device: the greedy token of the mixture at decoding sizes."""

import functools
from collections.abc import Iterator

import baselines
from cases import BASELINE, SUBJECT, Provider, compiled, require
from mix_argmax import LIMIT
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT

import mdkernels

from . import floors, mixes
from .case import GpuCase, Plan, logprob_limit
from .device import Device

SHAPES = {
    "full": ((1, 50257), (1, 151936), (8, 151936), (64, 50257), (64, 151936)),
    "smoke": ((3, 1001),),
}


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for batch, vocab in SHAPES[suite]:
        build = functools.partial(_case, suite, device, batch, vocab, "bf16")
        yield Plan("mix_argmax", "decode", {"B": batch, "V": vocab}, "bf16", build)


def _case(suite: str, device: Device, batch: int, vocab: int, dtype: str) -> GpuCase:
    sets = mixes.Sets(batch, vocab, dtype, device.type, several=True)
    settings = (MIX_WEIGHT, MEMORY_TEMPERATURE)
    calls = {
        backend: sets.bind(
            mdkernels.mix_argmax, MIX_WEIGHT, memory_temperature=MEMORY_TEMPERATURE, backend=backend
        )
        for backend in device.backends("mix_argmax")
    }
    mine = set(calls)
    calls["eager"] = sets.bind(baselines.mix_argmax, *settings)
    calls["eager_probs"] = sets.bind(baselines.mix_argmax_probs, *settings)
    if suite == "full" and vocab == max(SHAPES[suite])[1] and batch != 8:  # compiling takes seconds
        calls["compiled"] = sets.bind(compiled(baselines.mix_argmax), *settings)

    def check(provider: Provider) -> dict[str, float]:
        worst = 0.0
        for (base, memory), token in zip(sets.pairs, provider.call(), strict=True):
            for part in mixes.parts(base):
                wanted = mixes.expected(base, memory, part)
                chosen = wanted.gather(1, token[part, None]).squeeze(1)
                worst = max(worst, float((wanted.amax(1) - chosen).max()))
        limit = logprob_limit(provider, LIMIT)
        return require(provider.name, {"shortfall": worst}, {"shortfall": limit})

    units = len(sets.pairs)
    providers = [
        Provider(name, call, SUBJECT if name in mine else BASELINE, units=units, graph=True)
        for name, call in calls.items()
    ]
    providers.append(floors.read(device, [list(pair) for pair in sets.pairs]))
    return GpuCase(
        op="mix_argmax",
        kind="decode",
        shape={"B": batch, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=sets.bytes_per_call,
        floor="both logits read",
        outputs=lambda provider: 8 * batch * units,
        regimes=("stream", "graph"),
        count_launches=True,
        seconds=2.0,
    )
