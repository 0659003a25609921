"""logit_mix in eager torch: the specification. Differentiable in the logits and in row weights."""

import math

import torch
from torch import Tensor

from .arguments import find_weight_fault, mixture_width, raise_row_fault, weights_valid

DIFFERENTIABLE = True


def forward(
    base_logits, memory_logits, row_weights, weights, memory_temperature, base_scale
) -> Tensor:
    raise_row_fault(find_weight_fault(row_weights), row_weights)
    width = mixture_width(base_logits, memory_logits)
    models = log_softmaxes(base_logits, memory_logits, memory_temperature)
    mixture = None
    for k, logprobs in enumerate(models):
        if row_weights is not None:
            term = _weigh_rows(logprobs, k, row_weights)
        elif weights[k] > 0.0:
            term = logprobs + math.log(weights[k])
        else:
            continue  # a model of weight 0 is not looked at, whatever its logits hold
        missing = width - term.shape[1]
        if missing:
            term = torch.nn.functional.pad(term, (0, missing), value=-math.inf)
        mixture = term if mixture is None else _logaddexp(mixture, term)
    if row_weights is not None:
        mixture = mixture.masked_fill(~weights_valid(row_weights)[:, None], math.nan)
    if base_scale:
        mixture = mixture + _wide(base_logits, memory_logits)(base_logits).logsumexp(1)[:, None]
    return mixture


def log_softmaxes(base_logits, memory_logits, memory_temperature) -> list[Tensor]:
    """Every model on its own, base first: each over its full width, in fp32 (fp64 for fp64)."""
    wide = _wide(base_logits, memory_logits)
    base = wide(base_logits).log_softmax(1)
    return [base, *((wide(m) / memory_temperature).log_softmax(1) for m in memory_logits)]


def _wide(base_logits, memory_logits):
    any_double = any(x.dtype == torch.float64 for x in (base_logits, *memory_logits))
    return Tensor.double if any_double else Tensor.float


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    # torch's own has the gradient NaN where both are -inf, and that spreads over the row.
    dead = (a == -math.inf) & (b == -math.inf)
    alive = torch.logaddexp(a.masked_fill(dead, 0.0), b.masked_fill(dead, 0.0))
    return alive.masked_fill(dead, -math.inf)


def _weigh_rows(logprobs: Tensor, k: int, row_weights: Tensor) -> Tensor:
    if k > 0:
        weight = row_weights[:, k - 1]
        log_weight = weight.log()
    else:
        # Rounded to the precision of the weights, so that 0.7 + 0.2 + 0.1 is 1.
        total = row_weights.double().sum(1).to(row_weights.dtype).clamp(max=1.0)
        weight, log_weight = 1.0 - total, torch.log1p(-total)
    term = logprobs + log_weight[:, None].to(logprobs.dtype)
    return term.masked_fill((weight == 0)[:, None], -math.inf)
