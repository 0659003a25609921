"""Launcher of csrc/cuda/logit_mix.cu, and what the launchers of mix_argmax and mix_sample share.
Nothing here copies or converts logits, or waits."""

import functools

import torch
from torch import Tensor

from .. import native
from .arguments import inputs_of, live_models, mixture_width

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = True
MOST_MEMORIES = 15  # kMostModels of csrc/cuda/mix.cuh, less the base

# (threads of a block, blocks of a cluster) for rows of at least so many columns. Not by the number
# of rows: how a row is summed up must not depend on the batch it is in.
LAUNCH_TABLE = ((32768, (320, 8)), (8192, (320, 4)), (2048, (256, 2)), (0, (256, 1)))
LAUNCH = None  # overrides the table


def forward(
    base_logits, memory_logits, row_weights, weights, memory_temperature, base_scale
) -> Tensor:
    shape = (base_logits.shape[0], mixture_width(base_logits, memory_logits))
    out = base_logits.new_empty(shape, dtype=torch.float32)
    native.load("_cuda").module.logit_mix(
        *mixture(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            base_needed=base_scale,
        ),
        base_scale,
        out.data_ptr(),
        *launch_shape(base_logits, shape[1]),
    )
    return out


def mixture(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    *,
    all_models=False,
    base_needed=False,
) -> tuple:
    """The leading arguments of every mixture kernel: device, stream, and the models to look at."""
    models = live_models(
        inputs_of(base_logits, memory_logits, MOST_MEMORIES, "cuda"),
        row_weights,
        weights,
        memory_temperature,
        all_models=all_models,
        base_needed=base_needed,
    )
    rows = (0, 0, 0) if row_weights is None else (row_weights.data_ptr(), *row_weights.stride())
    flat = []
    for model, scale, weight in models:
        flat += [*model, scale, weight]
    return (
        *native.stream(base_logits),
        base_logits.shape[0],
        mixture_width(base_logits, memory_logits),
        *rows,
        len(models),
        *flat,
    )


def launch_shape(tensor: Tensor, width: int) -> tuple[int, int]:
    threads, cluster = LAUNCH or next(s for least, s in LAUNCH_TABLE if width >= least)
    return threads, cluster if device(native.gpu(tensor))["capability"] >= 90 else 1


@functools.cache
def device(index: int) -> dict:
    return native.load("_cuda").module.device(index)
