"""Which windows each process reads in each optimizer step, and how much they count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .batches import WindowBatches
from .distributed import Processes
from .train_config import TrainConfig


@dataclass(frozen=True)
class Part:
    """One forward pass of one process: windows [first, stop) of the endless sequence of epochs."""

    first: int
    stop: int
    share: float
    """Its scored rows by those of the whole step, all processes together; 0 for a filler."""


class Schedule:
    """Cuts the sequence of windows into steps, a step into forward passes, those by process.

    With n processes, forward pass i of a step covers n * batch_size windows, of which process r
    takes the r-th n-th. The last step of a run may be short; a process that is left without windows
    in it repeats one that does not count, because gradients are exchanged by all or none.
    """

    def __init__(self, data: WindowBatches, config: TrainConfig, processes: Processes):
        self.data, self.rank, self.size = data, processes.rank, config.batch_size
        self.per_forward = config.batch_size * processes.count
        self.per_step = self.per_forward * config.grad_accum
        if config.max_steps is not None:
            self.steps, self.windows = config.max_steps, config.max_steps * self.per_step
        else:
            # As written: in floats 1.1 * 100 is a little more than 110.
            self.windows = math.ceil(Fraction(str(config.epochs)) * len(data))
            self.steps = math.ceil(self.windows / self.per_step)
        if config.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: {config.warmup_steps} are more than the {self.steps} steps of this "
                "run, which would never reach lr; lower it"
            )

    def epochs(self, step: int) -> float:
        """Passes over the corpus up to and with `step`."""
        return min(step * self.per_step, self.windows) / len(self.data)

    def parts(self, step: int) -> list[Part]:
        """The forward passes of this process in `step`, counted from 1."""
        begin = (step - 1) * self.per_step
        end = min(begin + self.per_step, self.windows)
        rows = self._rows(begin, end)
        parts = []
        for forward in range(begin, end, self.per_forward):
            first = min(forward + self.rank * self.size, end)
            stop = min(first + self.size, end)
            if first == stop:
                parts.append(Part(begin, begin + 1, 0.0))
            else:
                parts.append(Part(first, stop, self._rows(first, stop) / rows))
        return parts

    def ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """(first, stop) of every forward pass of this process behind step `start`."""
        for step in range(start + 1, self.steps + 1):
            for part in self.parts(step):
                yield part.first, part.stop

    def _rows(self, first: int, stop: int) -> int:
        return int(np.diff(self.data.picked(first, stop), axis=1).sum())
