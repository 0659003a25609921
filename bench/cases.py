"""What a benchmark case is made of, and the synthetic inputs that several ops share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdkernels import SparseTargets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SUBJECT, BASELINE, PART, FLOOR = "subject", "baseline", "part", "floor"


class WrongResult(AssertionError):
    """A provider disagreed with float64; its speed is of no interest."""


@dataclass
class Provider:
    """One way to compute a case.

    `call` is timed; `prepare` runs before every sample and is not. A provider that consumes its
    input (in place) is not `repeatable`: every call needs its own `prepare`. `units`: how many
    calls of the op one `call` makes. `graph`: whether a CUDA graph can hold it.
    """

    name: str
    call: Callable[[], object]
    role: str = BASELINE
    prepare: Callable[[], None] | None = None
    repeatable: bool = True
    units: int = 1
    graph: bool = False


@dataclass
class Goal:
    """`subject` must be at least `factor` times faster than `baseline`, or, where `baseline` is
    the floor, take at most `factor` times as long as it. None in a regime: no goal there."""

    subject: str
    baseline: str
    factor: dict[str, float]


@dataclass
class Case:
    """One input of one op. `check` runs every provider once against float64 and returns its errors
    by provider, or raises `WrongResult`. `bytes_moved` is what the floor moves: the least traffic
    any implementation of the same contract needs."""

    op: str
    shape: dict[str, int]
    dtype: str
    providers: list[Provider]
    check: Callable[[], dict[str, dict[str, float]]]
    bytes_moved: int
    floor: str
    goals: list[Goal] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op} {shape} {self.dtype}"

    def subjects(self) -> list[Provider]:
        return [provider for provider in self.providers if provider.role == SUBJECT]


def require(provider: str, errors: dict[str, float], limits: dict[str, float]) -> dict:
    """Return `errors`, or raise if one exceeds its limit or is NaN."""
    for name, limit in limits.items():
        if not errors[name] <= limit:
            raise WrongResult(f"{provider}: {name} is {errors[name]:.3g}, more than {limit:.3g}")
    return errors


def compiled(function):
    """torch.compile for the one shape of a case. Forgets what earlier cases compiled: a second
    shape of the same function would otherwise count towards the limit after which it runs eager."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random_logits(rows: int, vocab: int, dtype: str, seed: int) -> Tensor:
    """randn * 3: a softmax about as peaked as a small language model's."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).to(DTYPES[dtype])


def random_targets(rows: int, vocab: int, seed: int) -> tuple[SparseTargets, Tensor]:
    """Ragged targets, 1..1023 distinct ids a row (lognormal, mean about 64), and labels that are
    the most probable target in half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(rows).log_normal_(3.6, 1.05, generator=generator)
    lengths = lengths.long().clamp(1, min(1023, vocab))
    lengths[0], lengths[-1] = min(1023, vocab), 1
    ids, probs = [], []
    for length in lengths.tolist():
        ids.append(torch.randperm(vocab, generator=generator)[:length])
        weights = torch.empty(length).exponential_(generator=generator).sort(descending=True)[0]
        probs.append(weights / weights.sum())
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::2] = torch.stack([row[0] for row in ids[::2]])
    return SparseTargets(offsets, torch.cat(ids).int(), torch.cat(probs)), labels
