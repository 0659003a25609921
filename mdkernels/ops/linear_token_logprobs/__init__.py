"""token_logprobs on hidden @ weight.T without the (N, V) logits. Derivation: README.md."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks, dispatch, linear
from ..linear_sparse_kl import gradient
from ..sparse_kl.reduction import wide_dtype


def _by_chunks(kernels, hidden, weight, bias, labels, ignore_index, chunk_rows, dtype) -> Tensor:
    if labels.device.type == "cpu":
        offsets, ids = labels.new_zeros(1), labels.new_empty(0)
        fault = checks.find_fault(offsets, ids, len(weight), labels, ignore_index)
        checks.raise_fault(fault, len(weight))
    logprobs = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden))
    layer = linear.Layer(hidden, weight, bias, chunk_rows, dtype)
    for rows, _, logits in layer.chunks():
        logprobs[rows], _ = kernels.forward(logits, labels[rows], ignore_index)
    return logprobs


_forward = dispatch.define(
    "linear_token_logprobs",
    "forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, "
    "int chunk_rows, ScalarType dtype, str backend) -> Tensor",
    lambda hidden, *args: hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden)),
    body=_by_chunks,
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, needs, *how):
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.ignore_index, ctx.needs, ctx.how = ignore_index, needs, how
        return _forward(hidden, weight, bias, labels, ignore_index, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *layer, labels = ctx.saved_tensors
        # The cross-entropy of linear_sparse_kl with the sign changed, and no targets.
        offsets = labels.new_zeros(labels.shape[0] + 1)
        ids, probs = labels.new_empty(0, dtype=torch.int32), grad.new_empty(0)
        sparse = offsets, ids, probs, labels, ctx.ignore_index
        coefs = torch.zeros_like(grad), -grad
        _, _, *grads = gradient(*layer, *sparse, *coefs, *ctx.needs, *ctx.how)
        given = [
            grad.to(value.dtype) if need else None
            for grad, value, need in zip(grads, layer, ctx.needs, strict=True)
        ]
        return (*given, *(None,) * 6)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[label] per row, without the (N, V) logits.

    Equivalent to ``token_logprobs(F.linear(hidden, weight, bias), labels)``. The logits exist for
    `chunk_rows` rows at a time, in one buffer that is reused; a backward computes them again, and
    cannot itself be differentiated.

    Args:
        hidden: (N, D) fp32, bf16 or fp16 (fp64: reference backend), any strides.
        weight: (V, D) of the same dtype; under torch.autocast both are cast as for F.linear.
        labels: (N,) int64 in [0, V), or ignore_index, whose rows give 0.
        bias: (V,) or None.
        chunk_rows: as for `linear_sparse_kl`.
        backend: see `mdkernels.backends`.

    Returns:
        (N,) fp32 log-probabilities in nats (fp64 for fp64), differentiable with respect to hidden,
        weight and bias.

    Raises:
        ValueError, TypeError: a shape, dtype, device or label outside the above; a DTensor. On a
            GPU a label out of range makes its row NaN.
        BackendUnavailable: the named backend cannot run here.
    """
    dtype = linear.check_layer(hidden, weight, bias)
    checks.integer_vector("labels", labels, hidden.shape[0], hidden.device, of="hidden")
    checks.integer("ignore_index", ignore_index)
    how = linear.check_chunk_rows(chunk_rows), dtype, backend
    needs = linear.needs_gradient(hidden, weight, bias)
    if any(needs):
        layer = hidden, weight, bias
        return _LinearTokenLogprobs.apply(*layer, labels, ignore_index, needs, *how)
    return _forward(hidden, weight, bias, labels, ignore_index, *how)
