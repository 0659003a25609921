"""mix_verify on a device: four tokens per request that the memory drafted."""

import functools
from collections.abc import Iterator

import baselines
import torch
from cases import BASELINE, SUBJECT, Provider, compiled, require
from mix_verify import DRAFTED, FILTERS, Z_LIMIT, drafted, first_rate
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT

import mdkernels

from . import floors, mixes
from .case import GpuCase, Plan
from .device import Device
from .timing import no_grad

DECODE = {"full": ((1, 50257), (1, 151936), (16, 151936)), "smoke": ((3, 1001),)}
DRAWS = {"full": 16, "smoke": 8}  # per request and input set


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for batch, vocab in DECODE[suite]:
        for filters in FILTERS:
            shape = {"B": batch, "G": DRAFTED, "V": vocab, "top_k": filters["top_k"]}
            build = functools.partial(_decode, suite, device, shape, filters)
            yield Plan("mix_verify", "decode", shape, "bf16", build)


def _decode(suite: str, device: Device, shape: dict, filters: dict) -> GpuCase:
    batch, vocab, places = shape["B"], shape["V"], DRAFTED + 1
    sets = mixes.Sets(batch * places, vocab, "bf16", device.type, several=True)
    temperature = MEMORY_TEMPERATURE * filters["temperature"]
    views = [[x.view(batch, places, vocab) for x in pair] for pair in sets.pairs]
    ids = [drafted(memory, temperature) for _, memory in views]
    # Seeds of their own for every set: equal ones would give equal rows the same luck.
    seeds = torch.arange(batch * len(views), device=device.type).view(len(views), batch).unbind()
    offsets = torch.zeros(batch, dtype=torch.int64, device=device.type)
    options = {"memory_temperature": MEMORY_TEMPERATURE, **filters}

    def ours(backend):
        def call():
            return [
                mdkernels.mix_verify(
                    *pair, MIX_WEIGHT, x, seeds=own, offsets=offsets, backend=backend, **options
                )
                for pair, x, own in zip(views, ids, seeds, strict=True)
            ]

        return no_grad(call)

    def eager(function):
        def call():
            return [
                function(*pair, MIX_WEIGHT, x, **options)
                for pair, x in zip(views, ids, strict=True)
            ]

        return no_grad(call)

    calls = {backend: ours(backend) for backend in device.backends("mix_verify")}
    mine = set(calls)
    calls["eager"] = eager(baselines.mix_verify)
    if suite == "full" and not filters["top_k"]:
        calls["compiled"] = eager(compiled(baselines.mix_verify))

    def check(provider: Provider) -> dict[str, float]:
        torch.manual_seed(8)  # of those that take no seed
        rates = []
        for (base, memory), x in zip(views, ids, strict=True):
            expected = mixes.expected(base[:, 0], memory[:, 0], slice(None))
            rates.append(first_rate(expected, memory, x, temperature, filters))
        rate, surplus = torch.cat(rates), 0.0
        for i in range(DRAWS[suite]):
            offsets.fill_(i * places)
            accepted = torch.cat([out[0] for out in provider.call()])
            surplus += float((accepted > 0).sum() - rate.sum())
        offsets.zero_()
        error = float((DRAWS[suite] * (rate * (1 - rate)).sum()).sqrt().clamp(min=1.0))
        return require(provider.name, {"z_score": abs(surplus) / error}, {"z_score": Z_LIMIT})

    units = len(views)
    providers = [
        Provider(
            name,
            call,
            SUBJECT if name in mine else BASELINE,
            units=units,
            graph=name in mine,  # multinomial reads a flag on the host
        )
        for name, call in calls.items()
    ]
    providers.append(floors.read(device, [list(pair) for pair in sets.pairs]))
    return GpuCase(
        op="mix_verify",
        kind="decode",
        shape=shape,
        dtype="bf16",
        providers=providers,
        check=check,
        bytes_moved=sets.bytes_per_call,
        floor="both logits read at all places; with top_k=50 also temperature 0.8, top_p=0.95",
        outputs=lambda provider: 8 * batch * (places + 1) * units,
        regimes=("stream", "graph"),
        count_launches=True,
        seconds=2.0,
    )
