"""KL to a sparse kNN target plus cross-entropy, forward and backward. Derivation: README.md."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks, dispatch
from ..sparse_targets import SparseTargets
from .reduction import REDUCTIONS, combine, wide_dtype


class SparseKLOutput(NamedTuple):
    """All in nats, fp32 (fp64 for fp64 logits); scalars, or (N,) with reduction="none"."""

    loss: Tensor  # kl_weight * kl + (1 - kl_weight) * ce
    kl: Tensor  # KL(target || softmax(logits))
    ce: Tensor  # -log softmax(logits)[label]


_SPARSE = "Tensor row_offsets, Tensor token_ids, Tensor probs, Tensor? labels, int ignore_index"


def _fake_forward(logits, row_offsets, token_ids, probs, labels, ignore_index, backend):
    rows = logits.new_empty(logits.shape[0], dtype=wide_dtype(logits))
    return rows, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.float64)


def _fake_backward(logits, *args):
    return logits.new_empty(logits.shape)


def _fake_loss_grad_(logits, *args):
    reduction = args[-2]
    shape = logits.shape[:1] if reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=wide_dtype(logits))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


_forward = dispatch.define(
    "sparse_kl",
    "forward",
    f"(Tensor logits, {_SPARSE}, str backend) -> (Tensor kl, Tensor ce, Tensor lse)",
    _fake_forward,
)
_backward = dispatch.define(
    "sparse_kl",
    "backward",
    f"(Tensor logits, {_SPARSE}, Tensor lse, Tensor kl_coef, Tensor ce_coef, str backend)"
    " -> Tensor",
    _fake_backward,
)
_loss_grad_ = dispatch.define(
    "sparse_kl",
    "loss_grad_",
    f"(Tensor(a!) logits, {_SPARSE}, float kl_weight, str reduction, str backend)"
    " -> (Tensor loss, Tensor kl, Tensor ce)",
    _fake_loss_grad_,
    mutates=True,
)
scale_ = dispatch.define(
    "sparse_kl",
    "scale_",
    "(Tensor(a!) grad, Tensor factor, str backend) -> ()",
    lambda grad, factor, backend: None,
    mutates=True,
)


class _Rows(torch.autograd.Function):
    """(kl, ce) per row; the gradient is computed in the backward, into a new tensor."""

    @staticmethod
    def forward(ctx, logits, row_offsets, token_ids, probs, labels, ignore_index, backend):
        sparse = (row_offsets, token_ids, probs, labels, ignore_index)
        kl, ce, lse = _forward(logits, *sparse, backend)
        ctx.save_for_backward(logits, row_offsets, token_ids, probs, labels, lse)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        return kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl, dce):
        *tensors, lse = ctx.saved_tensors
        dlogits = _backward(*tensors, ctx.ignore_index, lse, dkl, dce, ctx.backend)
        return dlogits, None, None, None, None, None, None


class _InPlace(torch.autograd.Function):
    """(loss, kl, ce) where the logits become d(loss)/d(logits) already in the forward."""

    @staticmethod
    def forward(ctx, logits, *arguments):
        loss, kl, ce = _loss_grad_(logits, *arguments)
        ctx.save_for_backward(logits)
        ctx.backend, ctx.num_arguments = arguments[-1], len(arguments)
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dkl, _dce):
        (grad,) = ctx.saved_tensors
        scale_(grad, dloss, ctx.backend)
        return (grad, *(None,) * ctx.num_arguments)


def sparse_kl(
    logits: Tensor,
    targets: SparseTargets,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
) -> SparseKLOutput:
    """The Memory Decoder loss (arXiv 2508.09874, eq. 4-6) against sparse targets.

    Equivalent to, with p = targets.to_dense(V) and dense (N, V) tensors that are never built here::

        q = logits.float().log_softmax(1)
        kl = (xlogy(p, p) - p * q).sum(1)               # forward KL(p || q), teacher first
        ce = F.cross_entropy(logits.float(), labels, reduction="none")
        loss = (kl_weight * kl + (1 - kl_weight) * ce).mean()

    Args:
        logits: (N, V) fp32, bf16 or fp16 (fp64: reference backend), unnormalised; unit stride
            within a row, any row stride. Arithmetic is fp32 whatever the dtype.
        targets: N rows of (token_ids, probs). Repeated ids add up, the mass of a row need not be 1
            (mass m gives sum p log p - sum p z + m lse), a row without targets has kl 0. No
            gradient flows to it.
        labels: (N,) int64 in [0, V), or ignore_index; None needs kl_weight=1.
        kl_weight: the paper's beta, the official code's --alpha; in [0, 1].
        ignore_index: rows with this label have kl = ce = 0, no gradient, and do not count.
        reduction: "mean" over the rows whose label is not ignore_index (0 if there is none),
            "sum", or "none" for (N,) outputs.
        inplace: overwrite the logits with the gradient of `loss` during the forward: one read and
            one write in all, no second (N, V) tensor. The logits must be an intermediate result
            that nobody else reads; kl and ce are then not differentiable. Without a gradient to
            compute, the logits are left alone. The gradient is rounded to the dtype of the logits
            before the upstream gradient multiplies it: under fp16 loss scaling entries below 6e-8
            vanish, so use inplace=False there (bf16 and fp32 have the range).
        backend: "auto", "cpu", "triton", "cuda" or "reference"; see `mdkernels.backends`.

    Returns:
        SparseKLOutput(loss, kl, ce) in nats.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value outside the above. Ids, labels and
            offsets are checked on the CPU; on a GPU an id out of range makes its row NaN.
        BackendUnavailable: the named backend cannot run here.
    """
    checks.logits_matrix("logits", logits)
    kl_weight = check_loss(targets, labels, kl_weight, ignore_index, reduction, logits=logits)
    sparse = (targets.row_offsets, targets.token_ids, targets.probs, labels, ignore_index)

    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        _check_inplace(logits)
        return SparseKLOutput(*_InPlace.apply(logits, *sparse, kl_weight, reduction, backend))
    kl, ce = _Rows.apply(logits, *sparse, backend)
    return SparseKLOutput(*combine(kl, ce, labels, ignore_index, kl_weight, reduction))


def check_loss(targets, labels, kl_weight, ignore_index, reduction, **scored: Tensor) -> float:
    """Check what belongs to the loss, for one (N, ...) tensor by its name; returns kl_weight."""
    ((name, tensor),) = scored.items()
    if not isinstance(targets, SparseTargets):
        raise TypeError(
            f"targets: expected SparseTargets, got {type(targets).__name__}; build one with "
            "SparseTargets.from_dense or .from_padded"
        )
    rows = tensor.shape[0]
    if targets.num_rows != rows:
        raise ValueError(f"targets: {targets.num_rows} rows for {rows} rows of {name}")
    if targets.device != tensor.device:
        raise ValueError(f"targets: on {targets.device}, {name} on {tensor.device}; use .to()")
    if labels is not None:
        checks.integer_vector("labels", labels, rows, tensor.device, of=name)
    checks.integer("ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    kl_weight = checks.probability("kl_weight", kl_weight)
    if labels is None and kl_weight != 1.0:
        raise ValueError(f"labels: required unless kl_weight is 1, got None with {kl_weight}")
    return kl_weight


def _check_inplace(logits: Tensor) -> None:
    # As torch's own in-place operations decide it.
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "inplace=True: logits is a leaf that requires grad or a view of one, so its values are "
            "a parameter; use inplace=False, or pass an intermediate result"
        )
    if not torch.compiler.is_compiling() and logits.is_neg():
        raise ValueError(
            "inplace=True: logits is a lazy negation of other memory (is_neg() is true); use "
            "inplace=False or .resolve_neg()"
        )
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"inplace=True: rows of logits overlap in memory (strides {logits.stride()}); "
            "use inplace=False or .contiguous()"
        )
