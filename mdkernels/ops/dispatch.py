"""The one dispatch point: which backend runs an operator, and why the others do not.

Order of choice: the ``backend=`` argument, then the environment variable ``MDK_BACKEND``, then the
priority list of the device. A named backend runs or raises `BackendUnavailable`; only ``"auto"``
falls through the list. No other file decides between backends.

A backend of an operator is a module ``mdkernels.ops.<op>.<backend>_kernels`` (``reference`` for the
eager one) whose functions have the same signatures as the operator's torch.library schemas, without
the trailing ``backend``. It may define ``DTYPES``, the logits dtypes it takes,
``DIFFERENTIABLE = True`` if autograd can record its functions (only asked of operators without an
``autograd.Function``), ``PLAIN = True`` if they take what `logit_mix.arguments.plain` finds, and
``LACKS``, what it cannot do of what an operator may be asked to, each with the reason.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from . import native

# Operators made of torch's matrix products and the kernels of another one.
COMPOSED = {"linear_sparse_kl": "sparse_kl", "linear_token_logprobs": "token_logprobs"}
OPS = (
    *("sparse_kl", "token_logprobs", *COMPOSED),
    *("logit_mix", "mix_argmax", "mix_sample", "mix_verify", "knn_targets"),
)
BACKENDS = ("cuda", "triton", "cpu", "reference")

# Fastest first. cpu before reference: bench/results/*/sparse_kl.json and its siblings. triton
# before cuda: neither has been measured on a GPU yet, and of the two Triton leaves less to
# hand-written synchronisation; the first results under bench/results/nvidia-*/ decide.
PRIORITY = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
FALLBACK = ("reference",)  # any other device


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def _device_reason(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type` in this process, or None."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device_type != "cpu":
            return f"it takes CPU tensors, not {device_type} tensors"
        extension = native.load("_cpu")
        if extension.module is None:
            return extension.reason
        extension.module.isa()  # raises ValueError for an MDK_CPU_ISA that cannot run
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'mdkernels[triton]')"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need the interpreter: set TRITON_INTERPRET=1 before the import"
        if device_type not in ("cpu", "cuda"):
            return f"it takes CUDA tensors, not {device_type} tensors"
        return None
    if device_type != "cuda":
        return f"it takes CUDA tensors, not {device_type} tensors"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return native.load("_cuda").reason


def _module_name(op: str, backend: str) -> str:
    stem = "reference" if backend == "reference" else f"{backend}_kernels"
    return f"mdkernels.ops.{COMPOSED.get(op, op)}.{stem}"


@functools.cache
def _unavailable(op: str, backend: str, device_type: str) -> str | None:
    try:
        found = importlib.util.find_spec(_module_name(op, backend)) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"{op} has no {backend} implementation"
    return _device_reason(backend, device_type)


def _module_reason(
    module: ModuleType, dtype: torch.dtype, differentiable: bool, need: str | None
) -> str | None:
    dtypes = getattr(module, "DTYPES", None)
    if dtypes is not None and dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
    if differentiable and not getattr(module, "DIFFERENTIABLE", False):
        return (
            "an input requires grad and it computes no gradient; detach the inputs, use "
            "torch.no_grad(), or another backend"
        )
    return getattr(module, "LACKS", {}).get(need)


@functools.cache
def resolve_requested(
    op: str,
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    differentiable: bool = False,
    need: str | None = None,
) -> ModuleType:
    """`resolve` where MDK_BACKEND is known to be unset; asking costs half a microsecond."""
    if requested not in (*BACKENDS, "auto"):
        raise ValueError(
            f"backend: got {requested!r}; expected 'auto' or one of {', '.join(BACKENDS)} "
            "(argument backend= or environment variable MDK_BACKEND)"
        )
    automatic = requested == "auto"
    candidates = PRIORITY.get(device_type, FALLBACK) if automatic else (requested,)
    reasons = []
    for backend in candidates:
        reason = _unavailable(op, backend, device_type)
        if reason is None:
            module = importlib.import_module(_module_name(op, backend))
            reason = _module_reason(module, dtype, differentiable, need)
            if reason is None:
                return module
        reasons.append(f"backend {backend!r} cannot run {op} here: {reason}")
    raise BackendUnavailable("; ".join(reasons))


def resolve(
    op: str,
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    *,
    differentiable: bool = False,
    need: str | None = None,
) -> ModuleType:
    """The module that runs `op` on such tensors. Pure apart from reading MDK_BACKEND.

    `differentiable` asks for one whose functions autograd can record, `need` for one that does not
    have it among its ``LACKS``.
    """
    if requested == "auto":
        requested = os.environ.get("MDK_BACKEND") or "auto"
    return resolve_requested(op, requested, device_type, dtype, differentiable, need)


_library = torch.library.Library("mdk", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _in_memory(value):
    """An argument; the tensors that it is or lists become memory that a pointer can be taken of."""
    if type(value) is list:
        return [_in_memory(item) for item in value]
    if type(value) not in _PLAIN:
        return value
    if value._is_zerotensor():
        return value.new_zeros(value.shape).zero_()
    return value.resolve_neg()


def watched() -> bool:
    """Whether anything between the caller and the kernel wants to see a registered operator: a
    mode, a transform, a tracer, the profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def define(op: str, function: str, schema: str, fake, mutates: bool = False, need=None, body=None):
    """Register ``mdk::<op>_<function>`` and return what calls it, the only way to a backend.

    `schema` is the signature after the name; its last argument must be ``str backend``, and its
    first tensor decides device and dtype. With `mutates`, that first tensor is written in place.
    `need` maps the arguments to what the backend must be able to do (see `resolve`), or None.
    `body(module, *arguments)` stands in for the backend's function of this name: that of an
    operator which is composed of the functions of a backend.

    An eager call goes to the backend directly: the dispatcher's boxing of the arguments costs more
    than a decode-sized kernel (27 of 60 us on one Zen 3 core). Whatever has to see the operator
    still does: see `watched`, and tensor subclasses in any place.
    """
    name = f"{op}_{function}"
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        first, backend = args[0], args[-1]
        what = None if need is None else need(*args)
        module = resolve(op, backend, first.device.type, first.dtype, need=what)
        if body is None:
            result = getattr(module, function)(*args[:-1])
        else:
            result = body(module, *args[:-1])
        if mutates and not first.is_inference():
            # Writing through a raw pointer is invisible to autograd; this makes a stale saved
            # tensor an error instead of a wrong gradient.
            torch.autograd.graph.increment_version(first)
        return result

    # One kernel for all devices, since `run` chooses; what has no backend of its own gets the
    # reference.
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mdk::{name}", fake, lib=_library)
    overload = getattr(torch.ops.mdk, name).default
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    places = [i for i, kind in enumerate(kinds) if "Tensor" in kind]

    def call(*args):
        if torch.compiler.is_compiling():
            return overload(*args)
        plain = True
        for i in places:
            value = args[i]
            for tensor in value if type(value) is list else (value,):
                if tensor is None:
                    continue
                if type(tensor) not in _PLAIN:
                    plain = False
                elif tensor.is_neg() or tensor._is_zerotensor():
                    # Not what its data pointer says: a negation that is still to be done, or the
                    # zeros without memory of forward-mode differentiation.
                    return call(*map(_in_memory, args))
        return run(*args) if plain and not watched() else overload(*args)

    return call


class BackendRow(NamedTuple):
    op: str
    backend: str
    available: bool
    reason: str  # why not; empty when available


class BackendTable(list):
    """A list of `BackendRow` that prints as a table."""

    def __repr__(self) -> str:
        lines = [f"{'op':<23}{'backend':<11}available"]
        for row in self:
            state = "yes" if row.available else f"no: {row.reason}"
            lines.append(f"{row.op:<23}{row.backend:<11}{state}")
        return "\n".join(lines)


def backends() -> BackendTable:
    """Every op with every backend: available on this machine, or the reason why not.

    A backend counts as available when it runs on its natural device: cpu on CPU tensors, cuda and
    triton on CUDA tensors (triton on CPU tensors under TRITON_INTERPRET=1).
    """
    table = BackendTable()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for op in OPS:
        for backend in BACKENDS:
            on_gpu = backend == "cuda" or (backend == "triton" and not interpreted)
            try:
                reason = _unavailable(op, backend, "cuda" if on_gpu else "cpu")
            except ValueError as error:  # an MDK_CPU_ISA that cannot run: the table still prints
                reason = str(error)
            if reason is None and on_gpu and not torch.cuda.is_available():
                reason = "no CUDA device is visible to torch"
            table.append(BackendRow(op, backend, reason is None, reason or ""))
    return table
