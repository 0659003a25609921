"""knn_targets on a device, against the official dense scatter with its loop over rows."""

import functools
from collections.abc import Iterator

import baselines
import torch
from cases import BASELINE, SUBJECT, Provider, nbytes, require
from knn_targets import LIMIT, LIMITS, TEMPERATURE, as_targets, synthetic
from torch import Tensor

import mdkernels

from . import floors
from .case import GpuCase, Plan
from .device import Device

SHAPES = {"full": ((16384, 1024, 50257, 1 << 24),), "smoke": ((33, 64, 1001, 4096),)}
BLOCK = 256


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for rows, k, vocab, entries in SHAPES[suite]:
        shape = {"N": rows, "K": k, "V": vocab, "R": entries}
        build = functools.partial(_case, device, shape)
        yield Plan("knn_targets", "targets", shape, "fp32", build)


def _expected(distances, neighbor_ids, values, vocab: int, part: slice) -> Tensor:
    """The dense distribution of some rows in float64."""
    own = torch.arange(part.start, part.stop, device=distances.device)[:, None]
    weights = (-distances[part].double() / TEMPERATURE).masked_fill(
        neighbor_ids[part] == own, float("-inf")
    )
    dense = torch.zeros(len(weights), vocab, dtype=torch.float64, device=distances.device)
    return dense.scatter_add_(1, values[neighbor_ids[part]], weights.softmax(1))


def _case(device: Device, shape: dict) -> GpuCase:
    rows, k, vocab, entries = shape.values()
    distances, neighbor_ids, values = (
        tensor.to(device.type) for tensor in synthetic(rows, k, vocab, entries)
    )
    wide = values.long()  # what torch can index with; converting is not charged to the baselines
    own = torch.arange(rows, device=device.type)
    official = (distances, neighbor_ids, wide, TEMPERATURE, vocab)
    options = {"temperature": TEMPERATURE, "exclude_ids": own}
    calls = {
        backend: functools.partial(
            mdkernels.knn_targets, distances, neighbor_ids, values, backend=backend, **options
        )
        for backend in device.backends("knn_targets")
    }
    mine = set(calls)
    calls["torch_sort"] = functools.partial(
        baselines.sorted_knn, distances, neighbor_ids, wide, TEMPERATURE, own
    )
    calls["official_one_shot"] = functools.partial(baselines.official_knn, *official)
    calls["official_batches_of_32"] = functools.partial(
        baselines.official_knn_batches, *official, size=32
    )

    def check(provider: Provider) -> dict[str, float]:
        found, worst = as_targets(calls[provider.name]()).to(device.type), 0.0
        for start in range(0, rows, BLOCK):
            part = slice(start, min(start + BLOCK, rows))
            wanted = _expected(distances, neighbor_ids, wide, vocab, part)
            dense = found.rows(part.start, part.stop).to_dense(vocab).double()
            error = (dense - wanted).abs().max()
            worst = max(worst, float(error)) if error.isfinite() else float("nan")
        limit = LIMITS.get(provider.name, LIMIT)
        return require(provider.name, {"absolute": worst}, {"absolute": limit})

    providers = [
        Provider(name, call, SUBJECT if name in mine else BASELINE) for name, call in calls.items()
    ]
    providers.append(floors.read(device, [[distances, neighbor_ids]]))
    return GpuCase(
        op="knn_targets",
        kind="targets",
        shape=shape,
        dtype="fp32",
        providers=providers,
        check=check,
        bytes_moved=nbytes(distances, neighbor_ids),
        floor="distances and ids read; neither the gather of values nor the result is in it",
        seconds=8.0,
    )
