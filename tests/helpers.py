"""Backends to test, problems that can fail, and the oracle.

The oracle is dense and shares no code with the package: plain torch on (N, V) tensors with its
autograd, run in float64 for the truth and in float32 for "plain torch at that dtype".
"""

import contextlib
import dataclasses
import functools
import os

import cuda_host
import numpy as np
import torch
import torch.nn.functional as F

from mdkernels import BackendUnavailable, SparseTargets, backends
from mdkernels.ops import dispatch, native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PTX_TRITON = os.environ.get("MDK_PTX_TRITON") == "1"  # see ptx/triton_host.py
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE = -100
U32 = 2.0**-24  # unit roundoff of fp32


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run an operator: a backend, for native CPU code an instruction set, a device."""

    op: str
    backend: str
    isa: str | None
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    @property
    def checks_values(self) -> bool:
        """Whether ids and labels out of range are errors; elsewhere they make their row NaN."""
        return self.backend in ("cpu", "reference") and self.device == "cpu"

    def additions(self, vocab: int) -> float:
        """How many numbers one after the other go into a partial sum of a row. The kernels sum
        blocks of 4096 in four vectors, and blocks in fp64; torch sums a row in one or two."""
        if self.backend == "reference":
            return vocab / 8
        return min(vocab, 4096) / (
            4 * {"avx2": 8, "avx512": 16, "avx512_bf16": 16}.get(self.isa, 4)
        )

    def dtypes(self) -> list[torch.dtype]:
        taken = []
        for dtype in DTYPES:
            # The interpreter truncates fp32 to bf16 where hardware rounds to nearest.
            if self.backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
                continue
            try:
                dispatch.resolve(self.op, self.backend, self.device, dtype)
            except BackendUnavailable:
                continue
            taken.append(dtype)
        return taken


@functools.cache
def variants(op: str) -> tuple[Variant, ...]:
    if cuda_host.PATH:
        return (Variant(op, "cuda", None, "cpu"),)
    if PTX_TRITON:
        return (Variant(op, "triton", None, "cpu"),)
    found = []
    for row in backends():
        if row.op != op or not row.available:
            continue
        on_gpu = row.backend == "cuda" or (row.backend == "triton" and not INTERPRETED)
        isas = native.load("_cpu").module.supported_isas() if row.backend == "cpu" else [None]
        device = "cuda" if on_gpu else "cpu"
        found += [Variant(op, row.backend, isa, device) for isa in isas]
    return tuple(found)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- logits


def _one_above(z, gap):
    """The last third of the row holds one logit `gap` above the maximum: far from its start."""
    rows, vocab = z.shape
    where = (2 * vocab) // 3 + torch.arange(rows) % max(vocab // 3, 1)
    z[torch.arange(rows), where.clamp(max=vocab - 1)] = z.amax(1) + gap
    return z


def _masked(z, keep):
    return z.masked_fill(~keep, -torch.inf)


def _head_masked(z):
    keep = torch.arange(z.shape[1]) >= min(700, z.shape[1] - 1)
    return _masked(z, keep)


LOGITS = {
    "normal": lambda z: z,
    "peaked": lambda z: 6 * z,
    "one_3_above": lambda z: _one_above(z, 3.0),
    "one_25_above": lambda z: _one_above(z, 25.0),
    "one_38_above": lambda z: _one_above(z, 38.0),
    "one_80_above": lambda z: _one_above(z, 80.0),
    "shifted_1e4": lambda z: z + 1e4,
    "shifted_-1e4": lambda z: z - 1e4,
    "shifted_2^24": lambda z: (4 * z).round() + 2.0**24,
    "flat": lambda z: torch.zeros_like(z),
    "rising": lambda z: torch.linspace(-300, 300, z.shape[1]).expand_as(z) + z,
    "falling": lambda z: torch.linspace(300, -300, z.shape[1]).expand_as(z) + z,
    "masked": lambda z: _masked(z, torch.rand(z.shape, generator=_seeded(5)) < 0.7),
    "head_masked": _head_masked,
    "one_survivor": lambda z: _masked(z, torch.arange(z.shape[1]) == z.shape[1] // 2),
    "all_lowest": lambda z: torch.full_like(z, -torch.inf),  # replaced by finfo.min below
    "some_lowest": lambda z: _masked(z, torch.arange(z.shape[1]) % 3 == 1),
}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0):
    z = LOGITS[kind](torch.randn(rows, vocab, generator=_seeded(seed)))
    lowest = torch.finfo(dtype).min
    if kind.endswith("lowest"):
        return z.to(dtype).clamp(min=lowest)
    return z.to(dtype)


# ---- targets and labels


def csr(rows, dtype=torch.float32) -> SparseTargets:
    """SparseTargets from a list of (ids, probs) rows."""
    ids = [torch.as_tensor(i, dtype=torch.int32).reshape(-1) for i, _ in rows]
    probs = [torch.as_tensor(p, dtype=torch.float64).reshape(-1) for _, p in rows]
    offsets = np.cumsum([0] + [len(i) for i in ids])
    none_i, none_p = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.float64)
    return SparseTargets(
        torch.as_tensor(offsets, dtype=torch.int64),
        torch.cat([none_i, *ids]),
        torch.cat([none_p, *probs]).to(dtype),
    )


def ragged_targets(logits, seed: int = 1, probs_dtype=torch.float32):
    """Rows of all sorts (empty, one-hot, repeated ids, zero and subnormal probabilities, all V ids,
    mass below and above 1, ignored) on ids whose logit is finite, and labels to go with them."""
    draw = _seeded(seed)
    rows, vocab = logits.shape
    entries, labels = [], []
    for row in range(rows):
        alive = logits[row].float().isfinite().nonzero().squeeze(1)
        if len(alive) == 0:
            alive = torch.arange(vocab)

        def pick(count, alive=alive):
            return alive[torch.randint(len(alive), (count,), generator=draw)]

        label = (alive[0], alive[-1], pick(1)[0])[row % 3]
        sort = row % 8
        if sort == 0:
            ids, p = alive[:0], torch.empty(0)
        elif sort == 1:
            ids, p = label[None], torch.ones(1)
        elif sort == 5 and vocab <= 10000:
            ids = torch.arange(vocab)[torch.isin(torch.arange(vocab), alive)]
            p = 3.0 * torch.rand(len(ids), generator=draw).softmax(0)
        else:
            count = int(torch.randint(1, 1024, (1,), generator=draw)) if sort != 7 else 5
            ids = pick(count) if sort != 3 else pick(7).repeat(20)
            p = torch.rand(len(ids), generator=draw) ** 4
            p /= p.sum() * (1.0 if sort != 3 else 1.4)
            if sort == 4:
                p[::3], p[1::7] = 0.0, 1e-41
        entries.append((ids, p))
        labels.append(IGNORE if sort == 6 else int(label))
    return csr(entries, probs_dtype), torch.tensor(labels, dtype=torch.int64)


@dataclasses.dataclass
class Problem:
    logits: torch.Tensor
    targets: SparseTargets
    labels: torch.Tensor | None


def problem(kind="normal", rows=8, vocab=67, dtype=torch.float32, probs=torch.float32, seed=0):
    logits = make_logits(kind, rows, vocab, dtype, seed)
    return Problem(logits, *ragged_targets(logits, seed + 1, probs))


def on(p: Problem, variant: Variant):
    """(logits, targets, labels) on the device of a variant."""
    labels = None if p.labels is None else p.labels.to(variant.device)
    return p.logits.to(variant.device), p.targets.to(variant.device), labels


# ---- oracles


@dataclasses.dataclass
class Truth:
    kl: torch.Tensor
    ce: torch.Tensor
    grad: torch.Tensor | None  # of sum(kl_coef * kl + ce_coef * ce)


def dense_probs(targets: SparseTargets, vocab: int) -> torch.Tensor:
    """(N, V) float64, repeated ids summed; by numpy, entry by entry."""
    offsets = targets.row_offsets.cpu().numpy()
    out = np.zeros((len(offsets) - 1, vocab))
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    np.add.at(out, (rows, targets.token_ids.cpu().numpy()), targets.probs.double().cpu().numpy())
    return torch.from_numpy(out)


def dense_losses(p: Problem, dtype, kl_coef=None, ce_coef=None, ignore=IGNORE) -> Truth:
    """kl and ce per row in plain dense torch at `dtype`, and the gradient by its autograd."""
    z = p.logits.detach().cpu().to(dtype).requires_grad_()
    probs = dense_probs(p.targets, z.shape[1]).to(dtype)
    logq = F.log_softmax(z, 1)
    kl = torch.where(probs > 0, probs * (probs.log() - logq), 0.0).sum(1)
    ce = torch.zeros_like(kl)
    if p.labels is not None:
        labels = p.labels.cpu()
        kl = kl.where(labels != ignore, 0.0)
        ce = F.nll_loss(logq, labels, ignore_index=ignore, reduction="none")
    if kl_coef is None:
        return Truth(kl.detach(), ce.detach(), None)
    kl_coef, ce_coef = (
        torch.as_tensor(c, dtype=torch.float64).to(dtype) for c in (kl_coef, ce_coef)
    )
    (kl_coef * kl + ce_coef * ce).sum().backward()
    return Truth(kl.detach(), ce.detach(), z.grad)
