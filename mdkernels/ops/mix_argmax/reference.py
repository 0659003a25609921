"""mix_argmax in eager torch: the specification."""

from torch import Tensor

from ..logit_mix import reference as logit_mix


def forward(base_logits, memory_logits, row_weights, weights, memory_temperature) -> Tensor:
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    return logit_mix.forward(*arguments, base_scale=False).argmax(1)
