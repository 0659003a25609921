"""The most probable token of the mixture, without writing the mixture. Derivation: README.md."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..logit_mix.arguments import SCHEMA, canonical, plain, unrecorded

forward = dispatch.define(
    "mix_argmax",
    "forward",
    f"({SCHEMA}, str backend) -> Tensor",
    lambda base_logits, *args: base_logits.new_empty(base_logits.shape[0], dtype=torch.int64),
)


def mix_argmax(
    base_logits: Tensor,
    memory_logits: Tensor | Sequence[Tensor],
    mix_weight: float | Tensor | Sequence[float | Tensor],
    *,
    memory_temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The greedy token of the mixture per row; nothing of shape (N, V) is written.

    Equivalent to ``logit_mix(...).argmax(1)`` with the same arguments, up to candidates whose
    probabilities differ by less than fp32 resolves (about 1e-6, relative).

    Args: as `logit_mix`.

    Returns:
        (N,) int64. Of equal candidates the smallest id; -1, as from `mix_sample`, for a row that
        `logit_mix` makes NaN, where torch.argmax would name a token.

    Raises:
        ValueError, TypeError: as `logit_mix`.
        BackendUnavailable: the named backend cannot run here.
    """
    given = (base_logits, memory_logits, mix_weight, memory_temperature)
    quick = plain("mix_argmax", *given, backend)
    if quick is not None:
        module, arguments = quick
        return module.forward(*arguments)
    arguments = canonical(*given)
    with unrecorded(arguments):
        return forward(*arguments, backend)
