"""Which backend runs, in which order that is decided, and what is said when one cannot."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import mdkernels
from mdkernels import BackendUnavailable, SparseTargets, backends, sparse_kl, token_logprobs
from mdkernels.ops import dispatch, native

CPU = native.load("_cpu")
ISAS = CPU.module.supported_isas() if CPU.module else []
needs_extension = pytest.mark.skipif(not ISAS, reason=f"no CPU extension: {CPU.reason}")


def chosen(op="sparse_kl", backend="auto", device="cpu", dtype=torch.float32) -> str:
    return dispatch.resolve(op, backend, device, dtype).__name__.rpartition(".")[2]


def python(code: str, **environment) -> subprocess.CompletedProcess:
    """A fresh interpreter with mdkernels importable."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(mdkernels.__file__)))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("MDK_BACKEND", raising=False)


@needs_extension
def test_auto_takes_the_first_that_can():
    assert chosen() == "cpu_kernels"
    assert chosen(dtype=torch.bfloat16) == "cpu_kernels"
    assert chosen(dtype=torch.float64) == "reference"
    assert chosen(device="xpu") == "reference"
    assert chosen("token_logprobs", dtype=torch.float64) == "reference"


@needs_extension
def test_argument_before_environment_before_priority(monkeypatch):
    monkeypatch.setenv("MDK_BACKEND", "reference")
    assert chosen() == "reference"
    assert chosen(backend="cpu") == "cpu_kernels"
    monkeypatch.setenv("MDK_BACKEND", "cpu")
    assert chosen() == "cpu_kernels"
    with pytest.raises(
        BackendUnavailable, match="backend 'cpu' cannot run sparse_kl here: it takes"
    ):
        chosen(dtype=torch.float64)  # named, so it does not fall through
    monkeypatch.setenv("MDK_BACKEND", "")
    assert chosen() == "cpu_kernels"
    monkeypatch.setenv("MDK_BACKEND", "auto")
    assert chosen() == "cpu_kernels"


@needs_extension
def test_environment_reaches_the_operator(monkeypatch):
    z, labels = torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 4])
    assert token_logprobs(z, labels).dtype == torch.float64
    monkeypatch.setenv("MDK_BACKEND", "cpu")
    with pytest.raises(
        BackendUnavailable, match="it takes float32, bfloat16, float16, not float64"
    ):
        token_logprobs(z, labels)
    assert token_logprobs(z, labels, backend="reference").dtype == torch.float64


@pytest.mark.parametrize("name", ["gpu", "CPU", "cpu ", "numpy"])
def test_unknown_names(monkeypatch, name):
    message = rf"backend: got '{name}'; expected 'auto' or one of cuda, triton, cpu, reference"
    z, labels = torch.zeros(2, 5), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=message):
        token_logprobs(z, labels, backend=name)
    monkeypatch.setenv("MDK_BACKEND", name)
    with pytest.raises(ValueError, match=message + r" .*MDK_BACKEND"):
        sparse_kl(z, SparseTargets.empty(2), labels)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_named_backend_that_cannot_run_says_why(backend):
    """Whatever the reason is on this machine, the table and the error give the same one."""
    rows = {(row.op, row.backend): row for row in backends()}
    row = rows["sparse_kl", backend]
    if row.available:
        pytest.skip(f"{backend} runs here")
    with pytest.raises(
        BackendUnavailable, match=f"backend '{backend}' cannot run sparse_kl here: "
    ):
        sparse_kl(torch.zeros(1, 3), SparseTargets.empty(1), torch.tensor([0]), backend=backend)
    assert row.reason
    assert row.reason in repr(backends())


def test_wrong_device_says_so():
    with pytest.raises(BackendUnavailable, match="it takes CPU tensors, not meta tensors"):
        dispatch.resolve("sparse_kl", "cpu", "meta", torch.float32)


def test_table_has_every_operator_and_backend():
    table = backends()
    assert {(row.op, row.backend) for row in table} == {
        (op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS
    }
    assert all(row.available == (row.reason == "") for row in table)
    reference = [row for row in table if row.backend == "reference"]
    assert all(row.available for row in reference), reference
    lines = repr(table).splitlines()
    assert lines[0].split() == ["op", "backend", "available"]
    assert len(lines) == 1 + len(table)


def test_priority_ends_with_the_reference():
    assert all(order[-1] == "reference" for order in dispatch.PRIORITY.values())
    assert dispatch.FALLBACK == ("reference",)


@pytest.mark.parametrize(
    "function", ["sparse_kl_forward", "sparse_kl_backward", "token_logprobs_forward"]
)
@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU", "MPS"])
def test_operators_are_callable_on_every_device(function, device):
    """The fallback is the reference, so a device nobody wrote kernels for must reach dispatch."""
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    assert has(f"mdk::{function}", device)


MISSING = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name == "mdkernels._cpu":
                raise {error}

    sys.meta_path.insert(0, Block())
    import torch, mdkernels
    labels = torch.tensor([0])
    assert mdkernels.token_logprobs(torch.zeros(1, 4), labels).exp().item() == 0.25
    try:
        mdkernels.token_logprobs(torch.zeros(1, 4), labels, backend="cpu")
    except mdkernels.BackendUnavailable as error:
        print(error)
    print(mdkernels.backends())
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModuleNotFoundError('no', name=name)", "the extension mdkernels._cpu is "),
        ("ImportError('libgomp.so.1: cannot open')", "does not load: libgomp.so.1: cannot open"),
    ],
)
def test_without_the_extension_auto_still_runs(error, message):
    result = python(MISSING.format(error=error))
    assert result.returncode == 0, result.stderr
    named, table = result.stdout.split("\n", 1)
    assert "backend 'cpu' cannot run token_logprobs here" in named
    assert message in named
    assert message in table


@needs_extension
def test_unknown_instruction_set():
    """Importing never fails, the first use says what is wrong, and the table can still be read."""
    result = python(
        """
        import torch, mdkernels
        try:
            mdkernels.token_logprobs(torch.zeros(1, 4), torch.tensor([0]))
        except ValueError as error:
            print(error)
        assert mdkernels.token_logprobs(
            torch.zeros(1, 4), torch.tensor([0]), backend="reference"
        ).isfinite().all()
        print(mdkernels.backends())
        """,
        MDK_CPU_ISA="AVX2",
    )
    assert result.returncode == 0, result.stderr
    message = "MDK_CPU_ISA: unknown instruction set 'AVX2'; expected auto or one of generic, "
    first, table = result.stdout.split("\n", 1)
    assert message in first
    assert message in table
    assert "reference  yes" in table


@needs_extension
def test_instruction_set_of_another_machine():
    missing = sorted(set(CPU.module.compiled_isas()) - set(ISAS))
    if not missing:
        pytest.skip("this processor runs every instruction set that was compiled")
    with pytest.raises(ValueError, match=f"this processor cannot run '{missing[0]}'; it supports"):
        CPU.module.set_isa(missing[0])


@needs_extension
@pytest.mark.parametrize("name", [*ISAS, "auto", ""])
def test_forced_instruction_set(name):
    """The extension alone: it needs no torch, so neither does asking it."""
    code = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("_cpu", {CPU.module.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.isa())
    """
    result = python(code, MDK_CPU_ISA=name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (name if name in ISAS else ISAS[-1])


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _mix():
    return mdkernels.logit_mix(torch.zeros(2, 5), torch.ones(2, 5), 0.25)


def test_whoever_has_to_see_the_operator_sees_it():
    """An eager call skips the dispatcher, but not where a mode, a tracer, the profiler listens."""
    with _Seen() as seen:
        found = _mix()
    assert "mdk.logit_mix_forward.default" in seen.names
    assert torch.equal(found, _mix())
    assert "torch.ops.mdk.logit_mix_forward" in make_fx(_mix)().code
    with torch.profiler.profile() as profile:
        _mix()
    assert any("mdk::logit_mix_forward" in event.name for event in profile.events())
    with FakeTensorMode() as fake:
        shape = mdkernels.logit_mix(
            fake.from_tensor(torch.zeros(2, 5)), fake.from_tensor(torch.zeros(2, 7)), 0.5
        ).shape
    assert shape == (2, 7)


def test_an_eager_call_goes_to_the_backend_directly(monkeypatch):
    _mix()
    with monkeypatch.context() as patch:
        patch.setattr(torch._ops.OpOverload, "__call__", None)
        assert _mix().shape == (2, 5)


# What `torch.Tensor` can also be: memory that is not the value. Read as it lies, it gave the wrong
# sign, numbers out of nowhere, or a crash.
_OPAQUE = {
    "negated": lambda x: (-x)._neg_view(),
    "zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "wrapper": lambda x: TwoTensor(x, x),
}


@pytest.mark.parametrize("kind", _OPAQUE)
@pytest.mark.parametrize("place", ["base", "memory", "weight", "logits", "labels", "probs"])
def test_a_tensor_whose_memory_is_not_its_value(kind, place):
    """In every place of an operator, not only in the first one."""
    given = {
        "base": torch.randn(3, 37),
        "memory": torch.randn(3, 37),
        "weight": torch.tensor([0.25, 0.5, 0.75]),
        "logits": torch.randn(3, 37),
        "labels": torch.tensor([1, 2, 3]),
        "probs": torch.tensor([0.5, 0.25, 0.25]),
    }

    def results():
        targets = SparseTargets(
            torch.tensor([0, 1, 1, 3]), torch.tensor([4, 5, 6], dtype=torch.int32), given["probs"]
        )
        if place in ("base", "memory", "weight"):
            yield mdkernels.logit_mix(given["base"], given["memory"], given["weight"])
            yield mdkernels.mix_argmax(given["base"], given["memory"], given["weight"])
        else:
            yield from mdkernels.sparse_kl(given["logits"], targets, given["labels"])
            yield mdkernels.token_logprobs(given["logits"], given["labels"])

    opaque = _OPAQUE[kind](given[place])
    given[place] = torch.zeros_like(given[place]) if kind == "zeros" else given[place]
    expected = list(results())
    given[place] = opaque
    for found, wanted in zip(results(), expected, strict=True):
        found = found.a if isinstance(found, TwoTensor) else found
        torch.testing.assert_close(found, wanted)


def test_negated_logits_are_refused_in_place():
    logits = torch.randn(3, 37, requires_grad=True)
    negated = torch._neg_view(logits * 1)
    with pytest.raises(ValueError, match="lazy negation"):
        sparse_kl(negated, SparseTargets.empty(3), torch.arange(3), inplace=True)


def test_an_upstream_gradient_that_is_a_negation():
    logits, labels = torch.randn(3, 37, requires_grad=True), torch.arange(3)
    grads = []
    for make in (torch.neg, torch._neg_view):
        (grad,) = torch.autograd.grad(token_logprobs(logits, labels), logits, make(torch.ones(3)))
        grads.append(grad)
    torch.testing.assert_close(*grads)
