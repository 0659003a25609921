"""What Triton specialises a launch on: a process that serves must not stop to compile because its
batch got another size. Compiles for a GPU that is not there."""

import importlib.util
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent / "triton_compile"))
import offline

from mdkernels.ops.logit_mix import triton_kernels as logit_mix
from mdkernels.ops.mix_argmax import triton_kernels as mix_argmax
from mdkernels.ops.mix_sample import triton_kernels as mix_sample
from mdkernels.ops.mix_verify import triton_kernels as mix_verify
from mdkernels.ops.sparse_kl import triton_kernels as sparse_kl

WIDTH = 700


def mixture(rows):
    z = torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    return z, [z], None, [0.7, 0.3], 1.2


def places(rows, *filters):
    ids, lengths = torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    sampling = (1.2, 0.7, *filters)
    mix_verify.forward(*mixture(5 * rows), ids, lengths, 0, *sampling, lengths, lengths)


def chain(rows):
    """Filters of as many values."""
    return rows, 1.0 - rows / 20, rows / 50


def loss(rows):
    z, one = torch.zeros(rows, WIDTH, dtype=torch.bfloat16), torch.ones(rows)
    ids, labels = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    sparse = (torch.arange(rows + 1), ids, one, labels, -100)
    sparse_kl.forward_backward_(z, *sparse, one, one)


def seeds(rows):
    return torch.arange(rows + 1)[1:]  # in the middle of a larger tensor


def draw(rows, *filters):
    mix_sample.forward(*mixture(rows), 0.7, *filters, seeds(rows), seeds(rows))


CALLS = {
    "logit_mix": lambda rows: logit_mix.forward(*mixture(rows), True),
    "mix_argmax": lambda rows: mix_argmax.forward(*mixture(rows)),
    "mix_sample": lambda rows: draw(rows, 0, 1.0, 0.0),
    "mix_sample_filtered": lambda rows: draw(rows, *chain(rows)),
    "choose": lambda rows: mix_sample.choose(*mixture(rows), seeds(rows), seeds(rows)),
    "logprobs": lambda rows: mix_sample.logprobs(*mixture(rows), seeds(rows)),
    "mix_verify": lambda rows: places(rows, 0, 1.0, 0.0),
    "mix_verify_filtered": lambda rows: places(rows, *chain(rows)),
    "sparse_kl": loss,
}


@pytest.mark.parametrize("call", CALLS)
def test_one_compilation_for_every_number_of_rows(call):
    compiled = defaultdict(set)
    for rows in (1, 2, 3, 16):
        with offline.compiling(90) as launched:
            CALLS[call](rows)
        for name, kernel in launched:
            compiled[name].add(kernel.hash)
    assert compiled
    assert {name: len(kernels) for name, kernels in compiled.items()} == dict.fromkeys(compiled, 1)
