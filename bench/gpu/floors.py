"""Memory roofs of a device, measured: a copy or a read of as many bytes as a case has to move, as a
provider in the same rounds. Each tries the ways we know and keeps the fastest."""

import statistics

import torch
from cases import FLOOR, Provider
from torch import Tensor

from .device import Device

TRIES = 5


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as int32, without the last one to three."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat[: flat.numel() // 4 * 4].view(torch.int32)


def _fastest(device: Device, calls: list, units: int = 1) -> Provider:
    medians = []
    for call in calls:
        call()  # compiles, allocates
        device.synchronize()
        medians.append(statistics.median(device.seconds(call, 1, None) for _ in range(TRIES)))
    best = calls[medians.index(min(medians))]
    return Provider("floor", best, FLOOR, units=units, graph=True)


def copy(device: Device, source: Tensor, target: Tensor) -> Provider:
    """Read `source` and write `target`, which is as large."""
    a, b = _words(source), _words(target)
    return _fastest(device, [lambda: b.copy_(a), lambda: torch.bitwise_not(a, out=b)])


def read(device: Device, sets: list[list[Tensor]]) -> Provider:
    """Read every tensor of every set once; one set is one call."""
    words = [_words(tensor) for tensors in sets for tensor in tensors]
    ways = [torch.amax]
    if device.type == "cuda":
        try:
            from .read_kernel import read as kernel
        except ImportError:  # no triton beside torch
            pass
        else:
            ways.append(kernel)
    calls = [lambda way=way: [way(tensor) for tensor in words] for way in ways]
    return _fastest(device, calls, units=len(sets))


def bandwidth(device: Device, size: int) -> dict[str, float]:
    """The device's own figures over buffers of `size` bytes: GB/s, bytes read plus written."""
    first, second = (torch.ones(size // 4, dtype=torch.int32, device=device.type) for _ in range(2))
    result = {"bytes": size}
    for name, provider, passes in (
        ("copy", copy(device, first, second), 2),
        ("read", read(device, [[first]]), 1),
    ):
        times = [device.seconds(provider.call, 1, None) for _ in range(2 * TRIES)]
        result[f"{name}_gb_per_s"] = round(passes * size / statistics.median(times) / 1e9, 1)
    del first, second
    device.release()
    return result
