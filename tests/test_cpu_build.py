"""The CPU sources for aarch64, with clang, and without OpenMP: they compile without a warning."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
# All but the bindings, which need the headers of Python.
DRIVERS = [path.name for path in SOURCES.glob("*_driver.cpp")] + ["isa.cpp", "parallel.cpp"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]


def compiles(compilers: str, names: list[str], *flags: str) -> None:
    compiler = next(filter(shutil.which, compilers.split()), None)
    if compiler is None:
        pytest.skip(f"no {' or '.join(compilers.split())} here")
    command = [compiler, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", *flags]
    for name in names:
        one = [*command, "-c", name, "-o", "/dev/null"]
        found = subprocess.run(one, cwd=SOURCES, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_for_aarch64():
    compiles("aarch64-linux-gnu-g++", ["kernels_neon.cpp", *DRIVERS], "-fopenmp", "-fsyntax-only")


def test_drivers_with_clang():
    # The runtime of its OpenMP is a package of its own.
    compiles("clang++", DRIVERS, "-Wno-unknown-pragmas", "-fsyntax-only")


def test_without_openmp():
    compiles("c++ g++ clang++", DRIVERS, "-Wno-unknown-pragmas", "-fsyntax-only")


KERNELS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX2 + AVX512,
    "avx512_bf16": [*AVX2, *AVX512, "-mavx512bf16"],
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("isa", KERNELS)
def test_kernels_with_clang(isa):
    # With code: that is when clang looks whether an intrinsic is part of the instruction set.
    compiles("clang++", [f"kernels_{isa}.cpp"], *KERNELS[isa])
