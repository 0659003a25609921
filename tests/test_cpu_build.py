"""The CPU sources for aarch64, with clang, and without OpenMP: they compile without a warning."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
# All but the bindings, which need the headers of Python.
DRIVERS = [path.name for path in SOURCES.glob("*_driver.cpp")] + ["isa.cpp", "parallel.cpp"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]


def compiles(compilers: str, names: list[str], *flags: str) -> None:
    compiler = next(filter(shutil.which, compilers.split()), None)
    if compiler is None:
        pytest.skip(f"no {' or '.join(compilers.split())} here")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags]
    found = subprocess.run([*command, *names], cwd=SOURCES, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_for_aarch64():
    compiles("aarch64-linux-gnu-g++", ["kernels_neon.cpp", *DRIVERS], "-fopenmp")


def test_with_clang():
    # The runtime of its OpenMP is a package of its own.
    compiles("clang++", ["kernels_generic.cpp", *DRIVERS], "-Wno-unknown-pragmas")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_avx_with_clang():
    compiles("clang++", ["kernels_avx2.cpp"], "-mavx2", "-mfma", "-mf16c")
    compiles("clang++", ["kernels_avx512_bf16.cpp"], *AVX512, "-mavx512bf16")


def test_without_openmp():
    compiles("c++ g++ clang++", DRIVERS, "-Wno-unknown-pragmas")
