"""Compiles Triton kernels for GPUs that are not there, from their real launch sites.

A fake driver says which GPU is current, and every launch becomes a warm-up: the specialisation of
the arguments, launch parameters and compiler options are those of the real call, and nothing runs.
The launchers are called on CPU tensors of a few rows."""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
# Dynamic shared memory a block may ask for, in bytes.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
REGISTER_FILE = 65536  # registers of a multiprocessor, all that one block can have
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class FakeDriver:
    """A GPU of compute capability `arch`, as far as the compiler asks."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # compiled kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@dataclasses.dataclass
class Kernel:
    name: str
    arch: int
    registers: int
    warps: int
    stack: int  # bytes; more than 0 is a spill or an array the compiler could not keep in registers
    local: int  # instructions that access it
    shared: int
    wide: int  # 16-byte global accesses
    sass: str


@contextlib.contextmanager
def compiling(arch: int):
    """Collects (name, compiled kernel) of every launch inside, compiled for `arch`."""
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup=False, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    driver.set_active(FakeDriver(arch))
    JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(None)  # the real one, when it is asked for


def inspect(name: str, kernel, arch: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.M)
    return Kernel(
        name=name,
        arch=arch,
        registers=int(found[1]),
        warps=kernel.metadata.num_warps,
        stack=int(found[2]),
        local=sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes),
        shared=kernel.metadata.shared,
        wide=sum(op.split(".")[0] in ("LDG", "STG") and ".128" in op for op in opcodes),
        sass=sass,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stderr}")
    return done.stdout
