"""mix_sample on a device: the draw at decoding sizes, and the mixture's log-probabilities of given
tokens at evaluation sizes."""

import functools
from collections.abc import Iterator

import baselines
import torch
from cases import BASELINE, SUBJECT, Provider, compiled, require
from mix_sample import FILTERS, LIMIT, TEMPERATURE, Z_LIMIT
from mixes import MEMORY_TEMPERATURE, MIX_WEIGHT

import mdkernels

from . import floors, mixes, peers
from .case import GpuCase, Plan, logprob_limit
from .device import Device
from .timing import no_grad

DECODE = {
    "full": ((1, 50257), (1, 151936), (64, 50257), (64, 151936)),
    "smoke": ((3, 1001),),
}
DRAWS = {"full": 16, "smoke": 8}  # per row and input set
GOLD = {"full": (4096, 151936), "smoke": (9, 1001)}
ALIGNMENT = {"full": (4096, 50257, 50304), "smoke": (9, 1001, 1024)}
GOLD_LIMIT = 2e-5


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for batch, vocab in DECODE[suite]:
        for filters in FILTERS:
            shape = {"B": batch, "V": vocab, "top_k": filters["top_k"]}
            build = functools.partial(_decode, suite, device, shape, filters)
            yield Plan("mix_sample", "decode", shape, "bf16", build)
    rows, vocab = GOLD[suite]
    build = functools.partial(_gold, suite, device, "gold", rows, (vocab,))
    yield Plan("mix_sample", "gold", {"N": rows, "V": vocab}, "bf16", build)
    rows, *vocabs = ALIGNMENT[suite]
    build = functools.partial(_gold, suite, device, "alignment", rows, tuple(vocabs))
    yield Plan("mix_sample", "alignment", {"N": rows, "V": vocabs[0]}, "bf16", build)


class Draws:
    """Compares many draws of a sampler with the float64 distribution: none below what the filters
    keep, and the mean log-probability where it has to be."""

    def __init__(self, sets: mixes.Sets, filters: dict):
        self.sets = sets
        self.rows = []
        for base, memory in sets.pairs:
            wanted = mixes.expected(base, memory, slice(None)) / TEMPERATURE
            kept = baselines.filter_logprobs(wanted, **filters)
            least = wanted.masked_fill(kept.isinf(), float("inf")).amin(1)
            logq = kept.log_softmax(1)
            finite = logq.masked_fill(kept.isinf(), 0.0)
            mean = (logq.exp() * finite).sum(1)
            variance = (logq.exp() * finite.square()).sum(1) - mean**2
            floor = float(logq[kept > -float("inf")].min())
            self.rows.append((wanted, least, logq, mean, float(variance.sum()), floor))

    def errors(self, draw, count: int) -> dict[str, float]:
        """`draw(i)` returns the tokens of every set."""
        below, total = 0.0, 0.0
        for i in range(count):
            for row, tokens in zip(self.rows, draw(i), strict=True):
                wanted, least, logq, mean, _, floor = row
                token = tokens[:, None]
                below = max(below, float((least[:, None] - wanted.gather(1, token)).max()))
                drawn = logq.gather(1, token).clamp(min=floor).squeeze(1)
                total += float((drawn - mean).sum())
        spread = (count * sum(row[4] for row in self.rows)) ** 0.5
        return {"below_kept": below, "z_score": abs(total) / spread}


def _decode(suite: str, device: Device, shape: dict, filters: dict) -> GpuCase:
    batch, vocab = shape["B"], shape["V"]
    sets = mixes.Sets(batch, vocab, "bf16", device.type, several=True)
    # Seeds of their own for every set: equal ones would give equal tokens the same luck.
    rows = torch.arange(batch * len(sets.pairs), device=device.type)
    seeds = rows.view(len(sets.pairs), batch).unbind()
    offsets = torch.zeros(batch, dtype=torch.int64, device=device.type)
    options = {"memory_temperature": MEMORY_TEMPERATURE, "temperature": TEMPERATURE, **filters}

    def ours(backend):
        def call():
            return [
                mdkernels.mix_sample(
                    *pair, MIX_WEIGHT, seeds=own, offsets=offsets, backend=backend, **options
                )
                for pair, own in zip(sets.pairs, seeds, strict=True)
            ]

        return no_grad(call)

    calls = {backend: ours(backend) for backend in device.backends("mix_sample")}
    mine = set(calls)
    calls["eager"] = sets.bind(baselines.mix_sample_race, MIX_WEIGHT, **options)
    calls["eager_multinomial"] = sets.bind(baselines.mix_sample, MIX_WEIGHT, **options)
    if suite == "full" and vocab == max(DECODE[suite])[1] and not filters["top_k"]:
        calls["compiled"] = sets.bind(compiled(baselines.mix_sample_race), MIX_WEIGHT, **options)
    for name, sampler in peers.mix_samplers().items():
        calls[name] = sets.bind(sampler, MIX_WEIGHT, **options)

    def check(provider: Provider) -> dict[str, float]:
        torch.manual_seed(8)  # of the samplers that take no seed

        def draw(i: int):
            offsets.fill_(i)
            return provider.call()

        found = Draws(sets, filters).errors(draw, DRAWS[suite])
        offsets.zero_()
        limits = {"below_kept": logprob_limit(provider, LIMIT), "z_score": Z_LIMIT}
        return require(provider.name, found, limits)

    units = len(sets.pairs)
    providers = [
        Provider(
            name,
            call,
            SUBJECT if name in mine else BASELINE,
            units=units,
            # multinomial reads a flag on the host, others draw their seed there
            graph=name in mine | {"eager", "compiled"},
        )
        for name, call in calls.items()
    ]
    providers.append(floors.read(device, [list(pair) for pair in sets.pairs]))
    return GpuCase(
        op="mix_sample",
        kind="decode",
        shape=shape,
        dtype="bf16",
        providers=providers,
        check=check,
        bytes_moved=sets.bytes_per_call,
        floor="both logits read; temperature 0.8, with top_k=50 also top_p=0.95",
        outputs=lambda provider: 8 * batch * units,
        regimes=("stream", "graph"),
        count_launches=True,
        seconds=2.0,
    )


def _gold(suite: str, device: Device, kind: str, rows: int, vocabs: tuple) -> GpuCase:
    generator = torch.Generator().manual_seed(4)
    calls, data = {}, {}
    mine = set()
    for vocab, suffix in zip(vocabs, ("", "_v50304"), strict=False):
        sets = mixes.Sets(rows, vocab, "bf16", device.type, several=False)
        tokens = torch.randint(0, vocab, (rows,), generator=generator).to(device.type)
        for backend in device.backends("mix_sample"):
            name = backend + suffix
            calls[name] = functools.partial(_gold_logprobs, *sets.pairs[0], tokens, backend)
            data[name] = (*sets.pairs[0], tokens)
            mine.add(name)
    base, memory, tokens = data[device.backends("mix_sample")[0]]
    settings = (MIX_WEIGHT, MEMORY_TEMPERATURE)
    if kind == "gold":
        arguments = (base, memory, *settings, tokens)
        calls["eager"] = lambda: baselines.mix(base, memory, *settings).gather(1, tokens[:, None])
        calls["eager_gather"] = functools.partial(baselines.mix_gather, *arguments)
        if suite == "full":
            calls["compiled"] = functools.partial(compiled(baselines.mix_gather), *arguments)

    def check(provider: Provider) -> dict[str, float]:
        own_base, own_memory, own_tokens = data.get(provider.name, (base, memory, tokens))
        found, worst = calls[provider.name]()[:, 0], 0.0
        for part in mixes.parts(own_base):
            wanted = mixes.expected(own_base, own_memory, part)
            error = (found[part] - wanted.gather(1, own_tokens[part, None]).squeeze(1)).abs().max()
            worst = max(worst, float(error)) if error.isfinite() else float("nan")
        limit = logprob_limit(provider, GOLD_LIMIT)
        return require(provider.name, {"absolute": worst}, {"absolute": limit})

    providers = [
        Provider(name, no_grad(call), SUBJECT if name in mine else BASELINE)
        for name, call in calls.items()
    ]
    providers.append(floors.read(device, [[base, memory]]))
    return GpuCase(
        op="mix_sample",
        kind=kind,
        shape={"N": rows, "V": vocabs[0]},
        dtype="bf16",
        providers=providers,
        check=check,
        bytes_moved=base.numel() * 2 * base.element_size(),
        floor="both logits read",
        outputs=lambda provider: 12 * rows,
        seconds=3.0,
    )


def _gold_logprobs(base, memory, tokens, backend: str):
    """What mix_sample(return_logprobs=True) calls for the tokens it drew."""
    weights = [1.0 - MIX_WEIGHT, MIX_WEIGHT]
    return torch.ops.mdk.mix_sample_logprobs(
        base, [memory], None, weights, MEMORY_TEMPERATURE, tokens, backend
    )
