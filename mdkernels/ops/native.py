"""Loads the native extensions once, and keeps the reason when one cannot be loaded.

Importing mdkernels never fails because of a missing or broken extension; using a backend that needs
it does, with the reason.
"""

import functools
import importlib
from types import ModuleType

import torch  # first: its OpenMP runtime must be the one the extension binds to

_EXCHANGE = "__dlpack_c_exchange_api__"  # DLPack's table of functions in C


class Native:
    """An extension module, or the reason why there is none."""

    def __init__(self, module: ModuleType | None, reason: str | None):
        self.module = module
        self.reason = reason


@functools.cache
def load(name: str) -> Native:
    """Load ``mdkernels.<name>`` (``_cpu`` or ``_cuda``)."""
    try:
        module = importlib.import_module(f"mdkernels.{name}")
        if name == "_cpu" and hasattr(torch.Tensor, _EXCHANGE):  # torch 2.10
            module.accept_tensors(torch.Tensor, getattr(torch.Tensor, _EXCHANGE))
        return Native(module, None)
    except ModuleNotFoundError as error:
        if error.name != f"mdkernels.{name}":
            raise
        return Native(None, f"the extension mdkernels.{name} {_why_missing(name)}")
    except ImportError as error:
        return Native(None, f"the extension mdkernels.{name} does not load: {error}")


def _why_missing(name: str) -> str:
    try:
        from mdkernels import _build_info
    except ImportError:
        return "is not built: run `pip install .` (or `pip install -e .` in a source checkout)"
    if name == "_cuda":
        return f"was {_build_info.CUDA}"
    return "is missing although a build was recorded: reinstall the package"


# Codes shared with csrc/cpu/kernels.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: torch.Tensor | None) -> int:
    """The data pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def gpu(tensor: torch.Tensor) -> int:
    """The number of the device of a CUDA tensor."""
    return tensor.get_device()


def stream(tensor: torch.Tensor) -> tuple[int, int]:
    """The device of a CUDA tensor and its current stream: the first arguments of every operator of
    the CUDA extension."""
    index = tensor.get_device()
    # torch.cuda.current_stream() builds an object around this number in a few times the time.
    return index, torch._C._cuda_getCurrentRawStream(index)


def empty_huge(like: torch.Tensor, shape, dtype=None) -> torch.Tensor:
    """An uninitialised tensor on the device of `like`; on a CPU it asks for 2 MB pages when large.

    A fresh 100 MB output in 4 KB pages costs 25000 page faults, several times the kernel that
    fills it.
    """
    out = like.new_empty(shape, dtype=dtype or like.dtype)
    if out.nbytes >= 4 << 20 and out.device.type == "cpu":
        extension = load("_cpu").module
        if extension is not None:
            extension.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
