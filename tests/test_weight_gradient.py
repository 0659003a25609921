"""The weight's gradient summed over chunks: an fp32 sum in two halves of 16 bits."""

import pytest
import torch
from helpers import threads

from mdkernels.ops import native
from mdkernels.ops.linear_sparse_kl import weight_gradient
from mdkernels.ops.linear_sparse_kl.weight_gradient import WeightGradient
from mdkernels.ops.sparse_kl import reference

CPU = native.load("_cpu").module
pytestmark = pytest.mark.skipif(CPU is None, reason="the extension mdkernels._cpu is not built")
if CPU is not None:
    from mdkernels.ops.sparse_kl import cpu_kernels


@pytest.fixture(params=[] if CPU is None else CPU.supported_isas())
def isa(request):
    before = CPU.isa()
    CPU.set_isa(request.param)
    yield request.param
    CPU.set_isa(before)


def halves(sum32):
    """An fp32 tensor as its upper and lower 16 bits."""
    bits = sum32.view(torch.int16).view(-1, 2).clone()
    return bits[:, 1].contiguous().view(torch.bfloat16), bits[:, 0].contiguous()


def joined(high, low):
    return torch.stack((low, high.view(torch.int16)), 1).flatten().view(torch.float32)


def numbers(n):
    """Any fp32 bit patterns: normal, subnormal, infinite, NaN, and halves just about to carry."""
    draw = torch.Generator().manual_seed(n)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=draw, dtype=torch.int64)
    bits[::3] |= 0xFFF0
    bits[::5] |= 0x7F800000
    bits[::7] &= 0xFFFF0000
    return bits.to(torch.int32).view(torch.float32)


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(7.0), expected.nan_to_num(7.0)
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("low_known", [False, True])
@pytest.mark.parametrize("n", [1, 15, 64, 1003, 200_001])
def test_halves_add_like_fp32(isa, n, low_known, last):
    total, product = numbers(n), numbers(n + 1)[:n].to(torch.bfloat16)
    high, low = halves(total)
    if not low_known:
        total = high.float()
    expected = total + product.float()
    if last:  # `low` is only read, if at all
        given = low.clone() if low_known else None
        cpu_kernels.add_product_(high, given, product, low_known=low_known, last=True)
        assert same(high, expected.to(torch.bfloat16))
        assert given is None or torch.equal(given, low)
        return
    cpu_kernels.add_product_(high, low, product, low_known=low_known, last=False)
    assert same(joined(high, low), expected)


def test_rounding_keeps_nan(isa):
    # Rounded as a number, the first would become infinite and the second -0.
    patterns = torch.tensor([0x7F80FFFF, 0x7FFFFFFF, -1], dtype=torch.int32)
    high, low = halves(patterns.view(torch.float32))
    zero = torch.zeros(3, dtype=torch.bfloat16)
    cpu_kernels.add_product_(high, low, zero, low_known=True, last=True)
    assert high.isnan().all()


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_sum_of_chunks_is_rounded_once(monkeypatch, kernels, chunks):
    monkeypatch.setattr(weight_gradient, "PRODUCT_BYTES", 64 * 1024)
    # One row a chunk: a product is one multiplication, whatever blocks it is computed in.
    vocab, width = 5000, 24  # four products a chunk
    draw = torch.Generator().manual_seed(chunks)
    left = torch.randn(chunks, 1, vocab, generator=draw).to(torch.bfloat16)
    right = torch.randn(chunks, 1, width, generator=draw).to(torch.bfloat16)
    expected = torch.zeros(vocab, width)
    for dlogits, hidden in zip(left, right, strict=True):
        expected += (dlogits.t() @ hidden).float()

    weight = torch.empty(vocab, width, dtype=torch.bfloat16)
    module = cpu_kernels if kernels == "cpu" else reference
    for count in (1, 2):
        with threads(count):
            gradient = WeightGradient(module, weight, weight.dtype, chunks)
            for dlogits, hidden in zip(left, right, strict=True):
                gradient.add(dlogits, hidden)
            assert torch.equal(gradient.finish(), expected.to(torch.bfloat16))


def test_no_chunk_is_a_zero_gradient():
    weight = torch.full((5, 3), float("nan"), dtype=torch.bfloat16)
    found = WeightGradient(cpu_kernels, weight, weight.dtype, 0).finish()
    assert torch.equal(found, torch.zeros_like(weight))
