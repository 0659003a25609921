"""Puts the CUDA backend on the CPU: the kernels' own source, compiled for the host.

With MDK_CUDA_SHIM=<path of the extension built by tests/cuda_host.sh>, `install` makes it the
extension of the backend "cuda", which then takes CPU tensors. The launchers, the dispatch and the
operator tests run unchanged, on blocks of 64 threads: what a block costs here is its threads. The
launch tables' own choices are the subject of test_cuda_host.py. An extension that
tests/ptx/objects.py has linked runs what nvcc made of the kernels, by the launch tables.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from mdkernels.ops import dispatch, native

PATH = os.environ.get("MDK_CUDA_SHIM", "")
FROM_PTX = Path(PATH).parent.name == "ptx"
# PTX knows of clusters or not, as it was compiled; the shim's device may change between tests.
CLUSTERS = not FROM_PTX or int(os.environ.get("MDK_SHIM_DEVICE", "90").split(",")[0]) >= 90


def force(monkeypatch, kernels, launch: tuple) -> None:
    """Takes the launch parameters (threads, blocks of a cluster, ...) instead of the table's."""
    if launch[1] > 1 and not CLUSTERS:
        pytest.skip("clusters of blocks need compute capability 9.0")
    monkeypatch.setattr(kernels, "LAUNCH", launch)


def install() -> None:
    spec = importlib.util.spec_from_file_location("_cuda", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load, reason = native.load, dispatch._device_reason

    def load_shim(name):
        return native.Native(module, None) if name == "_cuda" else load(name)

    def device_reason(backend, device_type):
        if backend == "cuda":
            return None if device_type == "cpu" else "the shim takes CPU tensors"
        return reason(backend, device_type)

    from mdkernels.ops.sparse_kl import cuda_kernels as sparse_kl
    from mdkernels.ops.token_logprobs import cuda_kernels as token_logprobs

    if not FROM_PTX:
        sparse_kl.LAUNCH, token_logprobs.LAUNCH = (64, 0, 0), (64, 0)
    native.load = load_shim
    native.gpu = lambda tensor: 0
    native.stream = lambda tensor: (0, 0)
    dispatch._device_reason = device_reason
