"""mix_argmax in eager torch: the specification."""

from torch import Tensor

from ..logit_mix import reference as logit_mix


def forward(base_logits, memory_logits, row_weights, weights, memory_temperature) -> Tensor:
    arguments = (base_logits, memory_logits, row_weights, weights, memory_temperature)
    logprobs = logit_mix.forward(*arguments, base_scale=False)
    return logprobs.argmax(1).masked_fill(logprobs[:, 0].isnan(), -1)
