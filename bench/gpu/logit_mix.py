"""logit_mix on a device: the mixed log-probabilities of two models, written out in fp32."""

import functools
from collections.abc import Iterator

import baselines
from cases import BASELINE, SUBJECT, Provider, compiled, require
from logit_mix import LIMIT
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT

import mdkernels

from . import floors, mixes
from .case import GpuCase, Plan, logprob_limit
from .device import Device

SHAPES = {
    "full": ((1, 151936), (64, 50257), (64, 151936), (2048, 151936)),
    "smoke": ((3, 1001),),
}


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for batch, vocab in SHAPES[suite]:
        build = functools.partial(_case, suite, device, batch, vocab, "bf16")
        yield Plan("logit_mix", "mix", {"B": batch, "V": vocab}, "bf16", build)


def _case(suite: str, device: Device, batch: int, vocab: int, dtype: str) -> GpuCase:
    small = batch <= 64
    sets = mixes.Sets(batch, vocab, dtype, device.type, several=small)
    settings = (MIX_WEIGHT, MEMORY_TEMPERATURE)
    calls = {
        backend: sets.bind(
            mdkernels.logit_mix, MIX_WEIGHT, memory_temperature=MEMORY_TEMPERATURE, backend=backend
        )
        for backend in device.backends("logit_mix")
    }
    mine = set(calls)
    calls["eager"] = sets.bind(baselines.mix, *settings)
    if suite == "full" and vocab == max(SHAPES[suite])[1]:  # compiling takes seconds
        calls["compiled"] = sets.bind(compiled(baselines.mix), *settings)

    def check(provider: Provider) -> dict[str, float]:
        worst = 0.0
        for (base, memory), found in zip(sets.pairs, provider.call(), strict=True):
            for part in mixes.parts(base):
                error = (found[part] - mixes.expected(base, memory, part)).abs().max()
                worst = max(worst, float(error)) if error.isfinite() else float("nan")
        limit = logprob_limit(provider, LIMIT)
        return require(provider.name, {"absolute": worst}, {"absolute": limit})

    units = len(sets.pairs)
    providers = [
        Provider(name, call, SUBJECT if name in mine else BASELINE, units=units, graph=True)
        for name, call in calls.items()
    ]
    written = [[base, memory, found] for (base, memory), found in zip(
        sets.pairs, calls["eager"](), strict=True)]  # fmt: skip
    providers.append(floors.read(device, written))
    return GpuCase(
        op="logit_mix",
        kind="mix",
        shape={"B": batch, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=sets.bytes_per_call + 4 * batch * vocab,
        floor="as many bytes read as the op reads and writes",
        outputs=lambda provider: 4 * batch * vocab * units,
        regimes=("stream", "graph") if small else ("stream",),
        count_launches=small,
    )
