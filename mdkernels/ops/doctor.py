"""What is installed, what runs, and why the rest does not: the text behind `mdkernels doctor`."""

import importlib.metadata
import os
import platform
import sys

import torch

from . import native
from .dispatch import PRIORITY, backends

PACKAGES = ("mdkernels", "torch", "triton", "transformers", "numpy", "faiss-cpu", "faiss-gpu")
VARIABLES = ("MDK_BACKEND", "MDK_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def _versions() -> list[str]:
    lines = [f"python        {sys.version.split()[0]} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:<14}{version}")
    return lines


def _cpu() -> list[str]:
    extension = native.load("_cpu")
    lines = [f"torch threads {torch.get_num_threads()} (torch.set_num_threads changes it)"]
    if extension.module is None:
        return [*lines, f"_cpu          missing: {extension.reason}"]
    module = extension.module
    try:
        isa = module.isa()
    except ValueError as error:
        isa = f"none: {error}"
    return [
        *lines,
        f"CPU kernels   {isa}{'' if module.openmp else ', built without OpenMP: on one thread'}",
        f"  compiled    {', '.join(module.compiled_isas())}",
        f"  runnable    {', '.join(module.supported_isas())}",
    ]


def _gpu() -> list[str]:
    extension = native.load("_cuda")
    build = torch.version.cuda or "none: a CPU build of torch"
    lines = [f"_cuda         {extension.reason or 'loaded'}"]
    if extension.module is not None:
        try:
            devices = f"{extension.module.device_count()} devices"
        except RuntimeError as error:  # no driver, an old one, or no device: its own words
            devices = str(error)
        lines += [f"  compiled    {extension.module.architectures}", f"  runnable    {devices}"]
    lines.append(f"torch CUDA    {build}")
    if torch.cuda.is_available():
        lines += [
            f"GPU {index}         {torch.cuda.get_device_name(index)}"
            for index in range(torch.cuda.device_count())
        ]
    else:
        lines.append("GPU           none visible to torch")
    return lines


def report() -> str:
    """The whole report as text."""
    environment = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    order = [f"{device:<14}{' > '.join(names)}" for device, names in PRIORITY.items()]
    sections = [
        ("versions", _versions()),
        ("cpu", _cpu()),
        ("gpu", _gpu()),
        ("environment", environment or ["none of " + ", ".join(VARIABLES) + " is set"]),
        ("order of backends by device", order),
        ("backends", repr(backends()).splitlines()),
    ]
    return "\n\n".join("\n".join([f"[{title}]", *lines]) for title, lines in sections)
