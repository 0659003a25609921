"""Every launch that the compile gate compiles.

An operator adds a function to LAUNCHES. It gets the architecture (90 stands for "everything"; the
others compile what differs between architectures) and yields (label, call): `call()` must reach the
launch sites with CPU tensors of a few rows. The label names the specialisation; it is part of the
key in baseline.json.
"""

import torch

from mdkernels.ops.knn_targets import packing as knn_packing
from mdkernels.ops.knn_targets import triton_kernels as knn_targets_kernels
from mdkernels.ops.logit_mix import triton_kernels as logit_mix_kernels
from mdkernels.ops.mix_argmax import triton_kernels as mix_argmax_kernels
from mdkernels.ops.mix_sample import triton_kernels as mix_sample_kernels
from mdkernels.ops.mix_verify import triton_kernels as mix_verify_kernels
from mdkernels.ops.sparse_kl import triton_kernels as sparse_kl_kernels
from mdkernels.ops.token_logprobs import triton_kernels as token_logprobs_kernels


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sparse_kl(arch):
    """Every line of the launch table by its longest vocabulary, every dtype, odd and even rows."""
    labels, one = torch.tensor([0, 1]), torch.ones(2)
    lse = torch.zeros(2, dtype=torch.float64)
    targets = (torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32), one)
    sparse = (*targets, labels, -100)

    def every(z):
        sparse_kl_kernels.forward(z, *sparse)
        sparse_kl_kernels.backward(z, *sparse, lse, one, one)
        gradient(z)
        sparse_kl_kernels.scale_(z, one[0])

    def gradient(z, labels=labels):
        sparse_kl_kernels.forward_backward_(z, *targets, labels, -100, one, one)

    def case(dtype, vocab, call):
        return f"{_name(dtype)} {vocab}", lambda: call(torch.zeros(2, vocab, dtype=dtype))

    yield case(torch.bfloat16, 50257, every)
    yield case(torch.bfloat16, 151936, gradient)
    if arch != 90:
        return
    yield case(torch.float32, 151936, every)
    yield case(torch.float16, 1000, gradient)
    yield case(torch.bfloat16, 32000, gradient)
    z = torch.zeros(2 * 50257 + 1, dtype=torch.bfloat16)
    yield "no labels", lambda: gradient(z[1:].view(2, 50257), None)
    yield (
        "shifted",
        lambda: sparse_kl_kernels.backward(z[1:].view(2, 50257), *sparse, lse, one, one),
    )


def token_logprobs(arch):
    labels, one = torch.tensor([0, 1]), torch.ones(2)
    lse = torch.zeros(2, dtype=torch.float64)
    z = torch.zeros(2, 50257, dtype=torch.bfloat16)

    def call():
        token_logprobs_kernels.forward(z, labels, -100)
        token_logprobs_kernels.backward(z, labels, -100, lse, one)

    yield "bfloat16 50257", call


def _mixtures(arch, call):
    """Two models of the two vocabularies that matter; three models of any dtype and row weights."""
    seeds = torch.arange(2)

    def case(width, memories, row_weights, weights):
        base = torch.zeros(2, width, dtype=torch.bfloat16)
        memories = [torch.zeros(2, width, dtype=dtype) for dtype in memories]
        return lambda: call((base, memories, row_weights, weights, 1.2), seeds)

    pair = ([torch.bfloat16], None, [0.7, 0.3])
    yield "bfloat16 151936", case(151936, *pair)
    if arch != 90:
        return
    yield "bfloat16 50257", case(50257, *pair)
    yield "bfloat16 700", case(700, *pair)
    yield "row weights", case(50257, [torch.float32, torch.float16], torch.zeros(2, 2), [])


def logit_mix(arch):
    return _mixtures(arch, lambda mix, seeds: logit_mix_kernels.forward(*mix, True))


def mix_argmax(arch):
    return _mixtures(arch, lambda mix, seeds: mix_argmax_kernels.forward(*mix))


def mix_sample(arch):
    def call(mix, seeds):
        mix_sample_kernels.forward(*mix, 0.7, 0, 1.0, 0.0, seeds, seeds)
        mix_sample_kernels.forward(*mix, 0.7, 50, 0.9, 0.01, seeds, seeds)
        mix_sample_kernels.logprobs(*mix, seeds)
        mix_sample_kernels.choose(*mix, seeds, seeds)

    return _mixtures(arch, call)


def mix_verify(arch):
    """The two rows as the places of one request; the draft as one of the mixed models, and beside
    them."""

    def call(mix, seeds):
        one, ids = seeds[:1], seeds[:1, None]
        for draft_temperature, *sampling in (
            (1.2, 1.0, 0, 1.0, 0.0),
            (0.84, 0.7, 0, 1.0, 0.0),
            (0.84, 0.7, 50, 0.9, 0.01),
        ):
            mix_verify_kernels.forward(*mix, ids, one, 0, draft_temperature, *sampling, one, one)

    return _mixtures(arch, call)


def knn_targets(arch):
    def case(neighbors, dtype, exclude):
        distances = torch.zeros(2, neighbors)
        ids, values = torch.zeros(2, neighbors, dtype=dtype), torch.zeros(9, dtype=dtype)
        keys, counts = knn_packing.workspace(distances)
        offsets = torch.zeros(3, dtype=torch.int64)
        token_ids, probs = torch.zeros(9, dtype=torch.int32), torch.zeros(9)

        def call():
            knn_targets_kernels.merge(distances, ids, values, 1.5, exclude, keys, counts)
            knn_targets_kernels.write(keys, offsets, token_ids, probs, neighbors)

        return f"{_name(dtype)} {neighbors}", call

    yield case(1024, torch.int64, torch.zeros(2, dtype=torch.int64))
    if arch == 90:
        yield case(50, torch.int32, None)


LAUNCHES = {
    "sparse_kl": sparse_kl,
    "token_logprobs": token_logprobs,
    "logit_mix": logit_mix,
    "mix_argmax": mix_argmax,
    "mix_sample": mix_sample,
    "mix_verify": mix_verify,
    "knn_targets": knn_targets,
}
