"""The next-token distribution of a base model mixed with memory models. Derivation: README.md."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from .arguments import SCHEMA, canonical, differentiable_backend, mixture_width, plain

SCALES = ("logprob", "base")


def _fake_forward(base_logits, memory_logits, *args):
    wide = torch.float64 if base_logits.dtype == torch.float64 else torch.float32
    shape = (base_logits.shape[0], mixture_width(base_logits, memory_logits))
    return base_logits.new_empty(shape, dtype=wide)


_forward = dispatch.define(
    "logit_mix", "forward", f"({SCHEMA}, bool base_scale, str backend) -> Tensor", _fake_forward
)


def logit_mix(
    base_logits: Tensor,
    memory_logits: Tensor | Sequence[Tensor],
    mix_weight: float | Tensor | Sequence[float | Tensor],
    *,
    memory_temperature: float = 1.0,
    scale: str = "logprob",
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of the mixture of a base model with one or more memories
    (arXiv 2508.09874, eq. 7, in log space).

    Equivalent, for one memory of the same width, to::

        base = base_logits.float().log_softmax(1)
        memory = (memory_logits.float() / memory_temperature).log_softmax(1)
        torch.logaddexp(base + log(1 - mix_weight), memory + log(mix_weight))

    Args:
        base_logits: (N, V) fp32, bf16 or fp16 (fp64: reference backend), unit stride within a row.
        memory_logits: (N, V_m) on the same device, or a list of such, one per memory. Dtypes and
            widths may all differ. Every softmax runs over the model's own full width, and an id
            that a model does not have gets nothing from it. To forbid ids that the base does not
            have, pass ``memory_logits[:, :V]``, a view: the memory is then renormalised over them.
        mix_weight: share of the memory in [0, 1]: a number, or a tensor of shape () or (N,), one
            per row. With several memories one per memory: a list of these, a tensor (memories,),
            or (N, memories). The base has what is left of 1. A model of weight 0 is not looked at:
            0 gives exactly log_softmax(base), NaN in the memory or not. On the device of the
            logits; a () tensor on the CPU is copied there, which waits for a GPU.
        memory_temperature: divides the logits of every memory; within [1e-30, 1e30].
        scale: "logprob", or "base" to add lse(base) to each row: the scale of the base's own
            logits, which Hugging Face logits processors expect. A softmax does not see it.
        backend: see `mdkernels.backends`.

    Returns:
        (N, max(V, V_m)) fp32 (fp64 if any logits are): exp of a row of "logprob" adds up to 1. A
        NaN, a +inf or nothing but -inf in a row of a model of positive weight makes the row NaN.
        Differentiable in the logits and in a tensor of weights strictly between 0 and 1 through
        the reference backend, which "auto" chooses whenever a gradient is wanted.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value outside the above. Weights in a
            tensor are checked on the CPU; elsewhere a weight outside [0, 1] makes its row NaN.
        BackendUnavailable: the named backend cannot run here, or computes no gradient.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {SCALES}, got {scale!r}")
    given = (base_logits, memory_logits, mix_weight, memory_temperature)
    quick = plain("logit_mix", *given, backend)
    if quick is not None:
        module, arguments = quick
        return module.forward(*arguments, scale == "base")
    arguments = canonical(*given)
    module = differentiable_backend("logit_mix", arguments, backend)
    if module is not None:
        return module.forward(*arguments, scale == "base")
    return _forward(*arguments, scale == "base", backend)
