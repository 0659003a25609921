"""Top-k teacher log-probabilities of other people's distillation data as sparse targets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import number, plain_tensor
from ..ops.sparse_targets import SparseTargets

# fp16 or bf16 log-probabilities of a whole distribution may add up to a little more than 1.
_MASS_LIMIT = 1.05


def from_topk_logprobs(
    token_ids: Tensor,
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
) -> SparseTargets:
    """Padded (..., K) teacher log-probabilities, as axolotl, TRL and verl hold them, to CSR.

    Equivalent, with one row per position of the leading dimensions in row-major order, to::

        probs = logprobs.float().exp()                    # or softmax(logprobs / temperature, -1)
        SparseTargets.from_padded(token_ids.flatten(0, -2), probs.flatten(0, -2), keep)

    Entries that do not count: those `mask` rules out, log-probabilities of -inf or so low that
    exp is 0 in fp32 (-1e9), negative ids. A position without any is an empty row: no KL.

    Row t is the teacher's distribution of the token *after* position t, and logits[t] its student.
    So verl holds its teacher_ids and teacher_logprobs (padded with log-probability 0: pass a mask;
    of nested tensors pass `.values()`). In vLLM's prompt_logprobs, axolotl's datasets and TRL's
    AsyncDistillationTrainer row t describes token t itself: pass rows [:, 1:] and logits [:, :-1].

    Args:
        token_ids: (..., K) integers.
        logprobs: (..., K) natural log-probabilities, any floating dtype.
        mask: True or 1 where an entry counts: (..., K), or (...) for whole positions. Needed where
            padding is a log-probability of 0, which is certainty.
        temperature: of the softened teacher, p^(1/T) over the K entries. They are renormalised
            then, since the rest of the vocabulary is unknown.
        renormalize: make every row sum to 1. Without it, a row keeps the mass of its top K and
            the loss is that of the truncated distribution.

    Returns:
        SparseTargets with fp32 probabilities, on the device of the arguments. Waits for the device.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, a row whose
            probabilities sum to more than 1.05: these are logits, or padding that needs a mask.
        TypeError: ids that are no integers, log-probabilities that are no floats.
    """
    plain_tensor("token_ids", token_ids)
    plain_tensor("logprobs", logprobs)
    if mask is not None:
        plain_tensor("mask", mask)
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs: expected a floating dtype, got {logprobs.dtype}")
    if token_ids.shape != logprobs.shape or logprobs.ndim < 2:
        raise ValueError(
            f"token_ids, logprobs: expected one shape (..., k), got {tuple(token_ids.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    temperature = number("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    keep = token_ids >= 0
    if mask is not None:
        whole = mask.shape == logprobs.shape[:-1]
        if not whole and mask.shape != logprobs.shape:
            raise ValueError(
                f"mask: expected {tuple(logprobs.shape)} or {tuple(logprobs.shape[:-1])}, got "
                f"{tuple(mask.shape)}"
            )
        keep = keep & (mask.bool().unsqueeze(-1) if whole else mask.bool())
    logprobs = logprobs.float()
    # Of nothing but -1e9, a softmax would be uniform.
    logprobs = logprobs.masked_fill(~keep | (logprobs.exp() == 0), -torch.inf)
    mass = logprobs.exp().sum(-1)
    if bool((mass > _MASS_LIMIT).any()):
        where = tuple((mass > _MASS_LIMIT).nonzero()[0].tolist())
        raise ValueError(
            f"logprobs: those of position {where} stand for probabilities that sum to "
            f"{float(mass[where]):.6g}; pass log_softmax(logits), and a mask where padding is 0"
        )
    if temperature != 1 or renormalize:
        # softmax of nothing is NaN, and those rows stay empty; a NaN of the teacher stays one.
        empty = (logprobs == -torch.inf).all(-1, keepdim=True)
        logprobs = (logprobs / temperature).log_softmax(-1).masked_fill(empty, -torch.inf)
    probs = logprobs.exp()
    keep &= ~(probs <= 0)  # NaN stays, for the loss or `validate` to show
    return SparseTargets.from_padded(*(t.flatten(0, -2) for t in (token_ids, probs, keep)))
