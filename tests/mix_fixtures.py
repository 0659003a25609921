"""What the tests of the mixture operators share: backends, cases, a float64 oracle.

Import the operators from here: on a machine with a GPU their tensors travel to it for the backends
that run there, so that every test covers these as well.

The oracle is numpy in probability space: sum_k w_k softmax(x_k / t), no log-sum-exp in common with
the code under test. Inputs are rounded to the dtype under test first, so it sees what the op sees.
"""

import functools
import os
import signal

import cuda_host
import numpy as np
import pytest
import torch
from helpers import INTERPRETED, PTX_TRITON, threads

import mdkernels
from mdkernels.ops import native

extension = native.load("_cpu").module
ISAS = extension.supported_isas() if extension else []
no_cuda_here = pytest.mark.skipif(bool(cuda_host.PATH), reason="the CUDA kernels run on the host")
needs_cpu = pytest.mark.skipif(extension is None, reason="the CPU extension is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 17, 33, 2049, 5003)  # around vectors, parts and blocks; none is even but for 0
TINY = 1e-290  # stands in for a probability of 0 before the logarithm

AVAILABLE = {
    row.backend for row in mdkernels.backends() if row.op == "mix_sample" and row.available
}
ON_GPU = {name for name in ("cuda", "triton") if name in AVAILABLE}
if INTERPRETED or PTX_TRITON:
    ON_GPU.discard("triton")
if cuda_host.PATH:
    AVAILABLE.add("cuda")
if PTX_TRITON:
    AVAILABLE.add("triton")
# None of these looks at values on the host: a bad row is marked, not raised.
UNCHECKED = AVAILABLE & {"cuda", "triton"}


def fewer(backend: str, many, few):
    """`many`, but `few` where a GPU is imitated: that takes milliseconds per row."""
    imitated = {"triton": INTERPRETED or PTX_TRITON, "cuda": cuda_host.PATH}.get(backend)
    return few if imitated else many


def place(x, backend: str):
    """`x` on the GPU for a backend that needs it there: same storage, strides and offset."""
    if backend not in ON_GPU:
        return x
    if isinstance(x, (list, tuple)):
        return type(x)(place(item, backend) for item in x)
    if not isinstance(x, torch.Tensor):
        return x
    if x.device.type == "cuda" or x.numel() == 0:
        return x.cuda()
    whole = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return whole.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)


def _placed(op):
    @functools.wraps(op)
    def run(*args, backend="auto", **options):
        options = {name: place(value, backend) for name, value in options.items()}
        out = op(*place(args, backend), backend=backend, **options)
        if backend not in ON_GPU:
            return out
        return out.cpu() if isinstance(out, torch.Tensor) else type(out)(*(x.cpu() for x in out))

    return run


logit_mix = _placed(mdkernels.logit_mix)
mix_argmax = _placed(mdkernels.mix_argmax)
mix_sample = _placed(mdkernels.mix_sample)
mix_verify = _placed(mdkernels.mix_verify)


@pytest.fixture(params=["reference", *ISAS, *sorted(UNCHECKED)])
def backend(request):
    """The backend, with every instruction set of the CPU extension in turn. One thread: waking a
    second one on a busy machine costs more than these sizes compute; see `threads`."""
    with threads(1):
        if request.param not in ISAS:
            yield request.param
            return
        before = extension.isa()
        extension.set_isa(request.param)
        yield "cpu"
        extension.set_isa(before)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(rows, width, dtype=torch.float32, seed=0, spread=3.0):
    return (torch.randn(rows, width, generator=generator(seed)) * spread).to(dtype)


def pair(rows, width, dtype=torch.float32, seed=0, memory_width=None):
    """Base and memory that agree on part of their preferences, as two models of one text do."""
    base = torch.randn(rows, width, generator=generator(seed)) * 3
    memory = torch.randn(rows, memory_width or width, generator=generator(seed + 1)) * 3
    common = min(base.shape[1], memory.shape[1])
    memory[:, :common] += 0.5 * base[:, :common]
    return base.to(dtype), memory.to(dtype)


def softmax(x: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    x = x.double().numpy() / temperature
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)


def mixture(base, memories, weights, memory_temperature=1.0) -> np.ndarray:
    """(N, max width) float64 probabilities. `weights`: (N, memories) array-like."""
    memories = memories if isinstance(memories, list) else [memories]
    weights = np.broadcast_to(np.asarray(weights, float), (len(base), len(memories)))
    width = max(x.shape[1] for x in (base, *memories))
    total = np.zeros((len(base), width))
    total[:, : base.shape[1]] += (1 - weights.sum(1))[:, None] * softmax(base)
    for k, memory in enumerate(memories):
        part = softmax(memory, memory_temperature)
        total[:, : memory.shape[1]] += weights[:, k, None] * part
    return total


def log(p: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(p > 0, np.log(np.maximum(p, TINY)), -np.inf))


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute error where the truth is finite; everything else has to agree exactly."""
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    rest = ~finite & ~want.isnan()
    assert torch.equal(got[rest].double(), want[rest].double())
    return float((got[finite].double() - want[finite]).abs().max()) if finite.any() else 0.0


def same_after_fork(run) -> bool:
    """Whether `run()` gives in a forked child what it gives here. The child compares with numpy:
    torch's own thread pool does not survive a fork, which is what is tested here of ours."""
    want = run().numpy()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang ends the child, not the test run
        os._exit(0 if np.array_equal(run().numpy(), want) else 1)
    return os.waitpid(child, 0)[1] == 0
