"""linear_sparse_kl on a device, at the widths of GPT-2 small and Qwen2.5-0.5B."""

import functools
import importlib.util
from collections.abc import Iterator

from cases import BASELINE, FLOOR, SUBJECT, Provider, nbytes
from linear_sparse_kl import Layer

from .case import GpuCase, Plan
from .device import Device

SHAPES = {"full": ((8192, 768, 50257), (8192, 896, 151936)), "smoke": ((9, 16, 1001),)}


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for rows, width, vocab in SHAPES[suite]:
        shape = {"N": rows, "D": width, "V": vocab}
        build = functools.partial(_case, suite, device, shape)
        yield Plan("linear_sparse_kl", "layer", shape, "bf16", build)


def _case(suite: str, device: Device, shape: dict) -> GpuCase:
    layer = Layer(*shape.values(), "bf16", device.type)
    functions = {
        backend: functools.partial(layer.ours, backend)
        for backend in device.backends("linear_sparse_kl")
    }
    mine = set(functions)
    functions["sparse_eager"] = layer.sparse_eager
    functions["official"] = layer.official
    functions["linear_cross_entropy"] = layer.linear_cross_entropy
    if suite == "full":
        functions["sparse_compiled"] = layer.sparse_compiled()
        if importlib.util.find_spec("liger_kernel") is not None:
            functions["liger_linear_cross_entropy"] = _liger(layer)
    steps = {name: layer.step(function) for name, function in functions.items()}
    ce_only = ("linear_cross_entropy", "liger_linear_cross_entropy")

    def check(provider: Provider) -> dict[str, float]:
        kind = "linear_cross_entropy" if provider.name in ce_only else provider.name
        return layer.errors(kind, steps[provider.name])

    providers = [
        Provider(name, step, SUBJECT if name in mine else BASELINE) for name, step in steps.items()
    ]
    providers.append(Provider("floor", layer.products(), FLOOR))
    gradients = nbytes(layer.hidden, layer.weight)
    return GpuCase(
        op="linear_sparse_kl",
        kind="layer",
        shape=shape,
        dtype="bf16",
        providers=providers,
        check=check,
        bytes_moved=layer.bytes_moved(),
        floor="the three matrix products alone",
        outputs=lambda provider: gradients,
        seconds=6.0,
    )


def _liger(layer: Layer):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(layer.weight, layer.hidden, layer.labels)
