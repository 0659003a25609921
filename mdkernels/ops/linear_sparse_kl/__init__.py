"""sparse_kl on hidden @ weight.T without the (N, V) logits. Derivation: README.md."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, linear
from ..sparse_kl import SparseKLOutput, check_loss, scale_
from ..sparse_kl.reduction import combine, valid_rows, wide_dtype
from ..sparse_targets import SparseTargets
from . import chunks

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor row_offsets, Tensor token_ids, Tensor probs, Tensor? labels, int ignore_index"
)
_HOW = "int chunk_rows, ScalarType dtype, str backend"


def _fake_forward(hidden, *args):
    kl = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
    return kl, torch.empty_like(kl)


def _fake_gradient(hidden, weight, bias, *args):
    *_, hidden_grad, weight_grad, bias_grad, _, dtype, _ = args
    kl, ce = _fake_forward(hidden)
    dhidden = hidden.new_empty(hidden.shape if hidden_grad else 0)
    dweight, dbias = weight.new_empty(0), hidden.new_empty(0, dtype=kl.dtype)
    if weight_grad:
        kind = chunks.parameter_grad_dtype(weight, dtype)
        dweight = weight.new_empty(weight.shape, dtype=kind)
    if bias_grad:
        dbias = bias.new_empty(bias.shape, dtype=chunks.parameter_grad_dtype(bias, dtype))
    return kl, ce, dhidden, dweight, dbias


_forward = dispatch.define(
    "linear_sparse_kl",
    "forward",
    f"({_INPUTS}, {_HOW}) -> (Tensor kl, Tensor ce)",
    _fake_forward,
    body=chunks.forward,
)
gradient = dispatch.define(
    "linear_sparse_kl",
    "gradient",
    f"({_INPUTS}, Tensor kl_coef, Tensor ce_coef, "
    f"bool hidden_grad, bool weight_grad, bool bias_grad, {_HOW})"
    " -> (Tensor kl, Tensor ce, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake_gradient,
    body=chunks.gradient,
)


class _Rows(torch.autograd.Function):
    """(kl, ce) per row; the backward computes the logits again."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, ignore_index, needs, chunk_rows, dtype, backend = arguments
        how = chunk_rows, dtype, backend
        ctx.save_for_backward(*inputs)
        ctx.ignore_index, ctx.needs, ctx.how = ignore_index, needs, how
        return _forward(*inputs, ignore_index, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl, dce):
        inputs = ctx.saved_tensors
        _, _, *grads = gradient(*inputs, ctx.ignore_index, dkl, dce, *ctx.needs, *ctx.how)
        return (*_given(grads, inputs, ctx.needs), *(None,) * 9)


class _Reduced(torch.autograd.Function):
    """(loss, kl, ce) as scalars, with the gradients of the loss computed in the forward."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, ignore_index, kl_weight, reduction, needs, chunk_rows, dtype, backend = arguments
        ctx.options = ignore_index, kl_weight, reduction
        ctx.needs, ctx.how, ctx.used = needs, (chunk_rows, dtype, backend), False
        kl, ce, *grads = _Reduced.loss_gradient(ctx, inputs)
        ctx.save_for_backward(*inputs, *grads)
        loss, kl, ce = combine(kl, ce, inputs[-1], *ctx.options)
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    def loss_gradient(ctx, inputs):
        """Of the sum if `_deferred`, else of the loss."""
        ignore_index, kl_weight, reduction = ctx.options
        hidden, labels = inputs[0], inputs[-1]
        row = hidden.new_ones(hidden.shape[0], dtype=wide_dtype(hidden))
        if reduction == "mean" and not _deferred(ctx):
            row = row / valid_rows(row, labels, ignore_index)
        coefs = kl_weight * row, (1.0 - kl_weight) * row
        return gradient(*inputs, ignore_index, *coefs, *ctx.needs, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dkl, _dce):
        *inputs, dhidden, dweight, dbias = ctx.saved_tensors
        grads = dhidden, dweight, dbias
        ignore_index, _, reduction = ctx.options
        if _deferred(ctx) and reduction == "mean":
            dloss = dloss / valid_rows(inputs[0], inputs[-1], ignore_index)
        if torch.compiler.is_compiling():
            _scale(grads, dloss, ctx)
        else:
            if ctx.used:  # the first backward has scaled the saved ones in place
                _, _, *grads = _Reduced.loss_gradient(ctx, inputs)
            ctx.used = True
            # .data: a second backward may ask for the saved tensors, if not for these values.
            grads = [grad.data for grad in grads]
            _scale(grads, dloss, ctx)
        return (*_given(grads, inputs, ctx.needs), *(None,) * 11)


def _deferred(ctx) -> bool:
    """Whether the division by the number of rows waits for the backward: fp16 gradients are made at
    the size of single rows, since divided by thousands of rows most entries would vanish before a
    loss scale could lift them."""
    return ctx.how[1] == torch.float16


def _scale(grads, factor, ctx) -> None:
    dhidden, dweight, dbias = grads
    backend = ctx.how[-1]
    if ctx.needs[0]:
        scale_(dhidden, factor, backend)
    if ctx.needs[1]:
        scale_(dweight, factor, backend)
    if ctx.needs[2]:
        dbias *= factor


def _given(grads, inputs, needs) -> list:
    """What autograd gets: in the dtypes of the inputs, None for those that need no gradient."""
    return [
        grad.to(value.dtype) if need else None
        for grad, value, need in zip(grads, inputs, needs, strict=False)
    ]


def linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    kl_weight: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> SparseKLOutput:
    """LM head and Memory Decoder loss (arXiv 2508.09874, eq. 4-6) without the (N, V) logits.

    Equivalent to::

        sparse_kl(F.linear(hidden, weight, bias), targets, labels, ...)

    The logits exist for `chunk_rows` rows at a time, in one buffer that is reused. With
    reduction="mean" or "sum" the gradients are computed in the forward, so nothing of size V is
    kept but the gradient of the weight; with "none" the backward computes the logits again.
    Without a gradient to compute only the logits of each chunk are.

    Args:
        hidden: (N, D) fp32, bf16 or fp16 (fp64: reference backend), any strides. Pass the scored
            rows only.
        weight: (V, D), the LM head; the dtype of hidden, except under torch.autocast, which casts
            both as it does for F.linear: once a pass, and the gradient of an fp32 weight is
            then not rounded to 16 bits after the sum. It may be tied to an embedding.
        targets, labels, kl_weight, ignore_index, reduction: as for `sparse_kl`.
        bias: (V,) or None.
        chunk_rows: rows of logits at a time; None chooses: at most 416 rows and 256 MiB on a CPU,
            at most 320 MB on a GPU, with what summing up the gradient of a 16-bit weight takes
            (where that is more than half of it: for the logits alone).
        backend: of the kernel between the matrix products; see `mdkernels.backends`.

    Returns:
        SparseKLOutput(loss, kl, ce) in nats, fp32 (fp64 for fp64). With reduction="mean" or "sum"
        only `loss` is differentiable where a gradient is computed, with "none" all three are. No
        second derivatives.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value outside the above; a DTensor. Ids,
            labels and offsets are checked on the CPU before anything is computed; on a GPU an id
            out of range makes its row NaN.
        BackendUnavailable: the named backend cannot run here.
    """
    dtype = linear.check_layer(hidden, weight, bias)
    kl_weight = check_loss(targets, labels, kl_weight, ignore_index, reduction, hidden=hidden)
    how = linear.check_chunk_rows(chunk_rows), dtype, backend
    inputs = (
        *(hidden, weight, bias),
        *(targets.row_offsets, targets.token_ids, targets.probs, labels),
    )
    needs = linear.needs_gradient(hidden, weight, bias)
    if any(needs) and reduction != "none":
        options = ignore_index, kl_weight, reduction
        return SparseKLOutput(*_Reduced.apply(*inputs, *options, needs, *how))
    rows = _Rows.apply(*inputs, ignore_index, needs, *how) if any(needs) else None
    kl, ce = rows or _forward(*inputs, ignore_index, *how)
    return SparseKLOutput(*combine(kl, ce, labels, ignore_index, kl_weight, reduction))
