"""token_logprobs on a device: large evaluation batches, and what an odd vocabulary costs."""

import functools
from collections.abc import Iterator

import baselines
import torch
from cases import BASELINE, SUBJECT, Provider, compiled, nbytes, require
from token_logprobs import LIMIT
from torch import Tensor

import mdkernels

from . import floors
from .case import GpuCase, Plan, blocks, logprob_limit, random_logits
from .device import Device
from .timing import no_grad

SHAPES = {"full": (4096, 151936), "smoke": (9, 1001)}
ALIGNMENT = {"full": (4096, 50257, 50304), "smoke": (9, 1001, 1024)}


def plans(suite: str, device: Device) -> Iterator[Plan]:
    rows, vocab = SHAPES[suite]
    for dtype in ("bf16", "fp32"):
        build = functools.partial(_case, suite, device, "gold", rows, (vocab,), dtype)
        yield Plan("token_logprobs", "gold", {"N": rows, "V": vocab}, dtype, build)
    rows, *vocabs = ALIGNMENT[suite]
    build = functools.partial(_case, suite, device, "alignment", rows, tuple(vocabs), "bf16")
    yield Plan("token_logprobs", "alignment", {"N": rows, "V": vocabs[0]}, "bf16", build)


def _expected(logits: Tensor, labels: Tensor) -> Tensor:
    gold = []
    for part in blocks(*logits.shape):
        z = logits[part].double()
        gold.append(z.gather(1, labels[part, None]).squeeze(1) - z.logsumexp(1))
    return torch.cat(gold)


def _case(suite, device: Device, kind: str, rows: int, vocabs: tuple, dtype: str) -> GpuCase:
    generator = torch.Generator().manual_seed(4)
    inputs = {}
    for vocab in vocabs:
        labels = torch.randint(0, vocab, (rows,), generator=generator).to(device.type)
        inputs[vocab] = random_logits(rows, vocab, dtype, 3, device.type), labels
    logits, labels = inputs[vocabs[0]]
    calls, data = {}, {}
    for vocab, suffix in zip(vocabs, ("", "_v50304"), strict=False):
        for backend in device.backends("token_logprobs"):
            name = backend + suffix
            calls[name] = functools.partial(
                mdkernels.token_logprobs, *inputs[vocab], backend=backend
            )
            data[name] = inputs[vocab]
    mine = set(calls)
    if kind == "gold":
        calls["eager"] = lambda: baselines.gather_minus_logsumexp(logits, labels)
        calls["log_softmax_gather"] = lambda: baselines.log_softmax_gather(logits, labels)
        if suite == "full":
            function = compiled(baselines.gather_minus_logsumexp)
            calls["compiled"] = lambda: function(logits, labels)

    def check(provider: Provider) -> dict[str, float]:
        wanted = _expected(*data.get(provider.name, (logits, labels)))
        found = {"absolute": float((calls[provider.name]() - wanted).abs().max())}
        return require(provider.name, found, {"absolute": logprob_limit(provider, LIMIT)})

    providers = [
        Provider(name, no_grad(call), SUBJECT if name in mine else BASELINE)
        for name, call in calls.items()
    ]
    providers.append(floors.read(device, [[logits]]))
    return GpuCase(
        op="token_logprobs",
        kind=kind,
        shape={"N": rows, "V": vocabs[0]},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(logits),
        floor="logits read",
        outputs=lambda provider: 12 * rows,  # fp32 log-probabilities, fp64 lse
    )
