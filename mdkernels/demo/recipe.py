"""What the demo trains, on how much text: one recipe for the figures, a tiny one for CI."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..train_config import resolve_device


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one demo. Lengths in tokens; base and memory have the same architecture."""

    name: str
    vocab_size: int
    context: int
    hidden_size: int
    layers: int
    heads: int
    mlp_size: int

    batch_size: int
    """Windows of `context` tokens per optimizer step."""
    base_steps: int
    base_lr: float
    domain_tokens: int
    """The text that datastore and memories are made of: a prefix of the domain's train files."""
    epochs: int
    memory_lr: float
    evaluations: int
    """Points of a memory run at which it is scored; the last is its end."""

    num_neighbors: int
    temperature: float
    """In units of the mean squared distance of two keys."""
    valid_tokens: int
    test_tokens: int

    min_gain: float
    """Nats per token by which the mixture must beat the base for the demo to pass."""
    min_gain_over_ce: float | None
    """The same over the CE-only mixture of equal size and steps; None: not judged."""
    compile: bool
    """torch.compile the trunk on a CPU with a C++ compiler: 10 s, then steps 1.2 times as fast."""
    seed: int = 0

    @property
    def memory_steps(self) -> int:
        windows = -(-self.domain_tokens // self.context)
        return -(-windows * self.epochs // self.batch_size)


FULL = Recipe(
    name="full",
    vocab_size=4096,
    context=256,
    hidden_size=256,
    layers=4,
    heads=4,
    mlp_size=704,
    batch_size=8,
    base_steps=450,
    base_lr=3e-3,
    domain_tokens=65536,
    epochs=13,
    memory_lr=1e-3,
    evaluations=4,
    num_neighbors=1024,
    temperature=0.05,
    valid_tokens=12288,
    test_tokens=40960,
    min_gain=0.5,
    min_gain_over_ce=0.03,
    compile=True,
)

SHORT = Recipe(
    name="short",
    vocab_size=1024,
    context=128,
    hidden_size=128,
    layers=2,
    heads=2,
    mlp_size=256,
    batch_size=8,
    base_steps=200,
    base_lr=3e-3,
    domain_tokens=16384,
    epochs=6,
    memory_lr=1e-3,
    evaluations=2,
    num_neighbors=128,
    temperature=0.05,
    valid_tokens=8192,
    test_tokens=8192,
    min_gain=0.1,
    min_gain_over_ce=None,
    compile=False,
)


@dataclass(frozen=True)
class Machine:
    """How the demo computes here; part of what decides whether an earlier result can be reused."""

    device: str
    dtype: str
    """Arithmetic of the trunk and LM head: "bfloat16" autocast where the hardware has it."""
    compile: bool

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.dtype == "bfloat16" else None


def this_machine(recipe: Recipe) -> Machine:
    """A GPU if torch sees one, in bf16; else the CPU, in bf16 if it computes that natively."""
    device = str(resolve_device("auto"))
    if device != "cpu":
        # Steps of milliseconds: compiling would take longer than it saves.
        return Machine(device, "bfloat16", False)
    dtype = "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return Machine(device, dtype, recipe.compile and compiler is not None)


def cpu_flags() -> set[str]:
    """Instruction set flags of the first processor, as Linux spells them."""
    return set(_cpuinfo(("flags", "Features")).split())


def cpu_name() -> str:
    return _cpuinfo(("model name", "CPU part")) or "unknown CPU"


def _cpuinfo(names: tuple[str, ...]) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
