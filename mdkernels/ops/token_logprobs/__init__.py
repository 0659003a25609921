"""Gold log-probabilities of rows of logits. Derivation: README.md."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks, dispatch


def _fake_forward(logits, labels, ignore_index, backend):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.new_empty(logits.shape[0], dtype=wide)
    return rows, torch.empty_like(rows, dtype=torch.float64)


_forward = dispatch.define(
    "token_logprobs",
    "forward",
    "(Tensor logits, Tensor labels, int ignore_index, str backend)"
    " -> (Tensor logprobs, Tensor lse)",
    _fake_forward,
)
_backward = dispatch.define(
    "token_logprobs",
    "backward",
    "(Tensor logits, Tensor labels, int ignore_index, Tensor lse, Tensor grad, str backend)"
    " -> Tensor",
    lambda logits, *args: logits.new_empty(logits.shape),
)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, backend):
        logprobs, lse = _forward(logits, labels, ignore_index, backend)
        ctx.save_for_backward(logits, labels, lse)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, labels, lse = ctx.saved_tensors
        dlogits = _backward(logits, labels, ctx.ignore_index, lse, grad, ctx.backend)
        return dlogits, None, None, None


def token_logprobs(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """log softmax(logits)[label] per row; nothing of shape (N, V) is written.

    Equivalent to ``logits.float().log_softmax(1).gather(1, labels[:, None]).squeeze(1)``.

    Args:
        logits: (N, V) fp32, bf16 or fp16 (fp64: reference backend), unit stride within a row, any
            row stride. Arithmetic is fp32 whatever the dtype.
        labels: (N,) int64 in [0, V), or ignore_index.
        ignore_index: rows with this label give 0 and get no gradient.
        backend: see `mdkernels.backends`.

    Returns:
        (N,) fp32 log-probabilities in nats (fp64 for fp64 logits), differentiable once in the
        logits.

    Raises:
        ValueError, TypeError: a shape, dtype, device or label outside the above. Labels are checked
            on the CPU; on a GPU one out of range makes its row NaN.
        BackendUnavailable: the named backend cannot run here.
    """
    checks.logits_matrix("logits", logits)
    checks.integer_vector("labels", labels, logits.shape[0], logits.device, of="logits")
    checks.integer("ignore_index", ignore_index)
    return _TokenLogprobs.apply(logits, labels, ignore_index, backend)
