"""The built CUDA extension, without a GPU: what it needs, what it says without a driver, and what
its kernels use."""

import json
import os
import subprocess
import sys

import cuda_resources
import pytest
import torch

from mdkernels.ops import dispatch, doctor, native

LIBRARY = cuda_resources.extension()
CUOBJDUMP = cuda_resources.tool("cuobjdump")
built = pytest.mark.skipif(LIBRARY is None, reason="mdkernels._cuda is not built (no nvcc?)")
# Another version of the compiler allocates a little differently; a spill is an error with any.
SLACK = 4


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@built
@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump (CUDA toolkit or triton)")
def test_no_kernel_spills_or_grows():
    found = cuda_resources.usage(CUOBJDUMP, LIBRARY)
    baseline = json.loads(cuda_resources.BASELINE.read_text())
    assert found.keys() == baseline.keys()
    for architecture, kernels in found.items():
        expected = baseline[architecture]
        update = "run tests/cuda_resources.py --update and look at the difference"
        assert kernels.keys() == expected.keys(), f"{architecture}: {update}"
        for name, numbers in kernels.items():
            where = f"{name} on {architecture}: {numbers}"
            assert numbers["stack"] == numbers["local"] == 0, where
            assert numbers["reg"] <= expected[name]["reg"] + SLACK, f"{where}; {update}"


@built
def test_needs_neither_torch_nor_a_driver_library():
    needed = run("readelf", "-d", str(LIBRARY))
    assert "NEEDED" in needed
    for library in ("libcuda.so", "libcudart", "libtorch", "libc10"):
        assert library not in needed
    symbols = run("nm", "-D", "--undefined-only", str(LIBRARY))
    assert "PyModule" in symbols
    for symbol in ("c10", "torch", "cuLaunchKernel"):
        assert symbol not in symbols


@built
def test_imports_without_a_driver_and_says_what_is_missing():
    code = (
        "from mdkernels.ops import native\n"
        "m = native.load('_cuda').module\n"
        "assert '80' in m.architectures and '90' in m.architectures\n"
        "print(m.device_count())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode != 0
    assert "RuntimeError: CUDA error" in result.stderr
    assert "driver" in result.stderr or "no CUDA-capable device" in result.stderr


@built
def test_doctor_shows_the_build():
    report = doctor.report()
    module = native.load("_cuda").module
    assert f"compiled    {module.architectures}" in report


def test_without_a_device_the_backend_says_so():
    with pytest.raises(dispatch.BackendUnavailable, match="takes CUDA tensors, not cpu tensors"):
        dispatch.resolve("sparse_kl", "cuda", "cpu", torch.float32)
