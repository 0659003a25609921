"""Launchers of the CUDA kernels csrc/cuda/mix_sample.cu."""

import math

import torch
from torch import Tensor

from .. import native
from ..logit_mix.arguments import mixture_width
from ..logit_mix.cuda_kernels import DTYPES, PLAIN, device, launch_shape, mixture

__all__ = ["DTYPES", "PLAIN", "choose", "forward", "logprobs"]
HEADER = 16 * 1024  # more than sizeof(Shared) of the kernel


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> Tensor:
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    tokens = torch.empty_like(seeds)
    width = mixture_width(base_logits, memory_logits)
    threads, cluster = launch_shape(base_logits, width)
    scratch, stride = score_scratch(base_logits, len(seeds), width, cluster)
    native.load("_cuda").module.mix_sample(
        *mixture(base_logits, memory_logits, row_weights, weights, memory_temperature),
        min(1.0 / temperature, 1e30),
        top_k,
        top_p,
        math.log(min_p) if min_p > 0.0 else -math.inf,
        seeds.data_ptr(),
        offsets.data_ptr(),
        tokens.data_ptr(),
        native.address(scratch),
        stride,
        threads,
        cluster,
    )
    return tokens


def score_scratch(like: Tensor, rows: int, width: int, cluster: int) -> tuple[Tensor | None, int]:
    """(a matrix for the scores of rows, its stride), or None for the matrix: the scores of a row
    live in the shared memory of its blocks, if that holds them."""
    limit = device(native.gpu(like))["shared_per_block"]
    fits = HEADER + 4 * (width // cluster + 8) <= limit
    stride = (width + 3) // 4 * 4
    return None if fits else like.new_empty((rows, stride), dtype=torch.float32), stride


def choose(
    base_logits, memory_logits, row_weights, weights, memory_temperature, seeds, offsets
) -> Tensor:
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    shape = (base_logits.shape[0], len(memory_logits))
    out = base_logits.new_empty(shape, dtype=torch.float32)
    native.load("_cuda").module.mix_choose(
        *mixture(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=True,
        ),
        seeds.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
    )
    return out


def logprobs(
    base_logits, memory_logits, row_weights, weights, memory_temperature, tokens
) -> Tensor:
    tokens = tokens.contiguous()
    shape = (base_logits.shape[0], 2 + len(memory_logits))
    out = base_logits.new_empty(shape, dtype=torch.float32)
    threads, pieces = launch_shape(base_logits, mixture_width(base_logits, memory_logits))
    native.load("_cuda").module.mix_logprobs(
        *mixture(
            base_logits,
            memory_logits,
            row_weights,
            weights,
            memory_temperature,
            all_models=True,
        ),
        tokens.data_ptr(),
        out.data_ptr(),
        threads,
        blocks_of_a_row(base_logits, pieces),
        pieces,
    )
    return out


def blocks_of_a_row(like: Tensor, pieces: int) -> int:
    """Over how many blocks to spread the pieces in which a row is summed up, which changes no bit:
    few where the rows fill the device, since a block then waits less often for the others."""
    blocks, enough = pieces, 6 * device(native.gpu(like))["multiprocessors"]  # two rounds
    while blocks % 2 == 0 and like.shape[0] * blocks // 2 >= enough:
        blocks //= 2
    return blocks
