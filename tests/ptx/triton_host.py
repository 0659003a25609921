"""Puts the Triton backend on the CPU: every launch is compiled for sm_90 from its real launch site,
and its PTX translated (translate.py) and run on the launch's own arguments.

With MDK_PTX_TRITON=1, conftest calls `install`; the backend "triton" then takes CPU tensors.
"""

import ctypes
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "triton_compile")]

ARCHITECTURE = 90
FORMATS = {"i1": "<b", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q"}
FORMATS |= {"fp32": "<f", "fp64": "<d"}


def install() -> None:
    import objects
    import offline
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from mdkernels.ops import dispatch

    run, reason = JITFunction.run, dispatch._device_reason
    libraries = {}

    def launch(self, *args, grid, warmup=False, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        if kernel.hash not in libraries:
            libraries[kernel.hash] = ctypes.CDLL(str(objects.linked(kernel.asm["ptx"])))
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        start(libraries[kernel.hash], kernel, values, grid)
        return kernel

    def device_reason(backend, device_type):
        if backend == "triton":
            return None if device_type == "cpu" else "the translation takes CPU tensors"
        return reason(backend, device_type)

    driver.set_active(offline.FakeDriver(ARCHITECTURE))
    JITFunction.run = launch
    dispatch._device_reason = device_reason


def start(lib, kernel, values, grid) -> None:
    """The parameters are the arguments that were not specialised away, and two scratch buffers."""
    parameters = bytearray()

    def push(packed: bytes):
        parameters.extend(b"\0" * (-len(parameters) % len(packed)) + packed)

    def argument(kind, value):
        if isinstance(kind, tuple):
            for pair in zip(kind, value, strict=True):
                argument(*pair)
        elif kind.startswith("*"):
            push(struct.pack("<Q", 0 if value is None else value.data_ptr()))
        elif kind != "constexpr":
            push(struct.pack(FORMATS[kind], value))

    for name, kind in kernel.src.signature.items():
        argument(kind, values.get(name))
    for _scratch in range(2):
        push(struct.pack("<Q", 0))
    blocks = grid(values) if callable(grid) else grid
    if any(n != 1 for n in blocks[1:]):
        raise ValueError(f"a grid of {blocks}, expected one dimension")
    lib.ptx_launch.restype = ctypes.c_char_p
    error = lib.ptx_launch(
        kernel.metadata.name.encode(),
        ctypes.c_int64(blocks[0]),
        ctypes.c_int(32 * kernel.metadata.num_warps),
        ctypes.c_size_t(kernel.metadata.shared),
        ctypes.create_string_buffer(bytes(parameters), len(parameters)),
    )
    if error:
        raise RuntimeError(error.decode())
