"""A case on the GPU: one input of one op, its providers, and a check of each against float64."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import DTYPES, SUBJECT, Provider
from torch import Tensor


@dataclass
class GpuCase:
    """`check(provider)` runs it once and returns its errors, or raises `cases.WrongResult`; a
    provider without a check of its own (the floor) is `unchecked`. `bytes_moved` is the least
    traffic that the contract needs per call; `outputs` is how much of a provider's peak memory is
    its result."""

    op: str
    kind: str
    shape: dict[str, int]
    dtype: str
    providers: list[Provider]
    check: Callable[[Provider], dict[str, float]]
    bytes_moved: int
    floor: str
    outputs: Callable[[Provider], int] = lambda provider: 0
    regimes: tuple[str, ...] = ("stream",)
    count_launches: bool = False
    seconds: float = 3.0
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return case_key(self)


def case_key(case) -> str:
    """What tells a case of an op from the others; for a `Plan` and a `GpuCase` alike."""
    shape = " ".join(f"{name}={value}" for name, value in case.shape.items())
    return f"{case.op} {case.kind} {shape} {case.dtype}"


@dataclass
class Plan:
    """A case that is not built yet: its inputs take gigabytes, and a finished case is skipped."""

    op: str
    kind: str
    shape: dict[str, int]
    dtype: str
    build: Callable[[], GpuCase]

    @property
    def key(self) -> str:
        return case_key(self)


def random_logits(rows: int, vocab: int, dtype: str, seed: int, device: str) -> Tensor:
    """randn * 3, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(rows, vocab, dtype=DTYPES[dtype], device=device)
    step = max(1, (1 << 28) // vocab)
    for start in range(0, rows, step):
        part = out[start : start + step]
        part.copy_(torch.randn(part.shape, generator=generator, device=device) * 3)
    return out


def logprob_limit(provider: Provider, ours: float) -> float:
    """Absolute error allowed to log-probabilities: torch's fp32 normalisers lose a digit at a
    vocabulary of 151936, which does not make a baseline wrong."""
    return ours if provider.role == SUBJECT else max(ours, 1e-4)


def blocks(rows: int, vocab: int) -> list[slice]:
    """Row ranges of about 2^25 entries: 256 MB in float64."""
    step = max(1, (1 << 25) // vocab)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
