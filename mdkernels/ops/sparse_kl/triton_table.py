"""Launch parameters of the Triton kernels, by row length. No autotuning: a table is the same on
every run and machine, compiles once, and can be read."""

from typing import NamedTuple

import triton

from ..triton_rows import INTERPRETED


class Launch(NamedTuple):
    block: int  # bytes of a row per iteration: a multiple of 16 bytes a thread
    warps: int
    entries: int = 1024  # targets of a row held in registers; longer rows take a slower path
    few: int = 64  # up to so many are compared each with each to find repeated ids


# Row bytes up to which a line holds. One row of 151936 bf16 logits per multiprocessor of an H200
# fits the second-level cache, two do not: 32 warps of more than 32 registers leave room for one.
TABLE = (
    (4 << 10, Launch(4 << 10, 4)),
    (64 << 10, Launch(16 << 10, 8)),
    (160 << 10, Launch(16 << 10, 16)),
    (1 << 62, Launch(32 << 10, 32)),
)
# An interpreted iteration costs milliseconds whatever its size.
INTERPRETER = Launch(64 << 10, 4)


def launch(vocab: int, itemsize: int) -> Launch:
    size = vocab * itemsize
    if INTERPRETED:
        return INTERPRETER._replace(block=max(64, min(64 << 10, triton.next_power_of_2(size))))
    return next(row for limit, row in TABLE if size <= limit)
