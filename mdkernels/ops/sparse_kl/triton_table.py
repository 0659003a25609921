"""Launch parameters of the Triton kernels, by row length. No autotuning: a table is the same on
every run and machine, compiles once, and can be read."""

from typing import NamedTuple

import triton

from ..triton_rows import INTERPRETED


class Launch(NamedTuple):
    block: int  # bytes of a row per iteration; over the threads, what each has in flight at once
    warps: int
    entries: int = 1024  # targets of a row held in registers; longer rows take a slower path
    few: int = 64  # up to so many are compared each with each to find repeated ids
    step: int = 4  # where ids repeat, each entry is compared with so many at a time
    registers: int = 64  # a thread: 1024 threads fill the register file of a multiprocessor


# The first line whose row bytes suffice. With 1024 threads on a multiprocessor an H200 has 132 rows
# of 304 kB (151936 bf16 logits) or 264 of 100 kB (50257) in flight, which its second-level cache of
# 50 MB holds until they are read again.
TABLE = (
    (4 << 10, Launch(4 << 10, 4, entries=256, registers=96)),
    (160 << 10, Launch(32 << 10, 16)),
    (1 << 62, Launch(64 << 10, 32)),
)
INTERPRETER = Launch(64 << 10, 4, step=512)


def launch(vocab: int, itemsize: int) -> Launch:
    size = vocab * itemsize
    if INTERPRETED:  # an interpreted iteration costs milliseconds whatever its size
        return INTERPRETER._replace(block=max(64, min(64 << 10, triton.next_power_of_2(size))))
    return next(row for limit, row in TABLE if size <= limit)
