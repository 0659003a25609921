"""Measured memory floors: each is a provider of its case, timed in the same rounds, on the same
buffers and after the same `prepare` as the kernels it is compared with.

Torch's own elementwise ops do not reach the memory's speed (`add_` does not prefetch and pays a
dispatch), so the floors are C++ loops (floors.cpp), compiled once per machine. Each floor tries a
few prefetch distances, and ordinary and streaming stores where it writes elsewhere, and keeps the
fastest: "best achievable" has to be the best that we know.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch  # before the library: it must bind to torch's OpenMP runtime
from cases import FLOOR, Provider, nbytes
from machine import REPOSITORY, cpu
from torch import Tensor

SOURCE = Path(__file__).with_name("floors.cpp")
CACHE = REPOSITORY / "build" / "bench"
AHEAD = (0, 1024, 4096)  # bytes
GATHER_AHEAD = (0, 16, 64)  # places
TRIES = 5


def compile_command() -> list[str]:
    """g++ (or $CXX) for this machine. Old compilers' -march=native does not know new processors,
    so AVX-512 is asked for by name where the processor has it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the memory floors need a C++ compiler: install g++ or set CXX")
    flags = ["-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
    if "avx512f" in cpu().get("flags", "").split():
        flags += ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"]
    # Vectors wider than the ISA make gcc warn about their ABI; they never cross a call here.
    return [*compiler.split(), *flags, "-Wno-psabi"]


@functools.cache
def library() -> ctypes.CDLL:
    """floors.cpp, compiled or from the cache under build/."""
    command = compile_command()
    key = hashlib.sha256(SOURCE.read_bytes() + repr((command, cpu().get("flags"))).encode())
    path = CACHE / f"floors-{key.hexdigest()[:16]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"compiling {SOURCE.name} failed:\n{done.stderr}")
        partial.replace(path)
    loaded = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    word, flag = ctypes.c_uint64, ctypes.c_bool
    signatures = {
        "floor_inplace": (None, [pointer, size, word, size, number]),
        "floor_read": (word, [pointer, size, size, number]),
        "floor_read2": (word, [pointer, pointer, size, size, number]),
        "floor_mix": (None, [pointer, pointer, pointer, size, number, size, flag, number]),
        "floor_copy": (None, [pointer, pointer, size, size, flag, number]),
        "floor_gather": (word, [pointer, pointer, pointer, size, size, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _fastest(calls: list, prepare) -> Provider:
    """The call with the smallest median of a few interleaved tries, as the floor provider."""
    seconds = [[] for _ in calls]
    for _ in range(TRIES + 1):
        for call, times in zip(calls, seconds, strict=True):
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    medians = [sorted(times[1:])[TRIES // 2] for times in seconds]
    best = calls[medians.index(min(medians))]
    return Provider("floor", best, FLOOR, prepare)


def inplace(data: Tensor, prepare=None) -> Provider:
    """Read every byte of `data` and write it back changed."""
    run, threads = library().floor_inplace, torch.get_num_threads()
    calls = [
        functools.partial(run, data.data_ptr(), nbytes(data), 1, ahead, threads) for ahead in AHEAD
    ]
    provider = _fastest(calls, prepare)
    provider.repeatable = prepare is None
    return provider


def read(*tensors: Tensor, prepare=None) -> Provider:
    """Read one tensor, or two of one size side by side."""
    threads = torch.get_num_threads()
    run = library().floor_read if len(tensors) == 1 else library().floor_read2
    pointers = [tensor.data_ptr() for tensor in tensors]
    size = nbytes(tensors[0])
    calls = [functools.partial(run, *pointers, size, ahead, threads) for ahead in AHEAD]
    return _fastest(calls, prepare)


def mix(first: Tensor, second: Tensor, prepare=None) -> Provider:
    """Read two matrices and write one fp32 matrix of their shape, into a reused buffer."""
    out = torch.empty(first.numel() + 16, dtype=torch.float32)
    widen = 4 // first.element_size()
    run, threads = library().floor_mix, torch.get_num_threads()
    pointers = (first.data_ptr(), second.data_ptr(), out.data_ptr(), nbytes(first), widen)
    calls = [
        functools.partial(run, *pointers, ahead, stream, threads)
        for ahead, stream in itertools.product(AHEAD, (False, True))
    ]
    provider = _fastest(calls, prepare)
    best = provider.call
    provider.call = lambda: (best(), out)[0]  # keeps `out` alive as long as the provider
    return provider


def gather(weights: Tensor, ids: Tensor, table: Tensor, prepare=None) -> Provider:
    """Read weights (fp32) and ids (int64), and table[ids] (int32)."""
    pointers = (weights.data_ptr(), ids.data_ptr(), table.data_ptr(), ids.numel())
    run, threads = library().floor_gather, torch.get_num_threads()
    calls = [functools.partial(run, *pointers, places, threads) for places in GATHER_AHEAD]
    return _fastest(calls, prepare)


def bandwidth(size: int) -> dict[str, float]:
    """GB/s (bytes read plus bytes written) of read, in-place and copy over `size` bytes, with one
    thread and with all, best of a few tries and variants: the machine's own figures."""
    lib, threads = library(), torch.get_num_threads()
    first, second = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    kinds = {
        "read": (1, [(lib.floor_read, (first.data_ptr(), size, a)) for a in AHEAD]),
        "inplace": (2, [(lib.floor_inplace, (first.data_ptr(), size, 1, a)) for a in AHEAD]),
        "copy": (
            2,
            [
                (lib.floor_copy, (first.data_ptr(), second.data_ptr(), size, a, stream))
                for a, stream in itertools.product(AHEAD, (False, True))
            ],
        ),
    }
    result = {"bytes": size}
    for name, (passes, variants) in kinds.items():
        for count in sorted({1, threads}):
            best = float("inf")
            for run, arguments in variants * 3:
                start = time.perf_counter()
                run(*arguments, count)
                best = min(best, time.perf_counter() - start)
            result[f"{name}_x{count}_gb_per_s"] = round(passes * size / best / 1e9, 1)
    return result
