"""token_logprobs against dense float64 torch, forward and backward."""

import functools

import pytest
import torch
import torch.nn.functional as F
from buffers import Frame, Produce, bits
from helpers import IGNORE, LOGITS, csr, make_logits, problem, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import Expected, check_rows

from mdkernels import token_logprobs

OP = "token_logprobs"
WIDTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 67, 4095, 4096, 4097, 50257]


@functools.cache
def solved(kind, rows, vocab, dtype):
    """log p is -ce: the same problem without targets, with coefficient -1 for ce."""
    p = problem(kind, rows, vocab, dtype)
    p.targets = csr([([], [])] * rows)
    return p, Expected(p, 0.0, -1.0)


def check(p, expected, variant):
    frame = Frame(p.logits, variant.device)
    leaf = torch.zeros_like(p.logits, device=variant.device, requires_grad=True)
    logits = Produce.apply(leaf, frame)
    found = token_logprobs(logits, p.labels.to(variant.device), backend=variant.backend)
    found.sum().backward()
    frame.check_guards()
    frame.check_unmodified()
    exact, plain = expected.exact.ce, expected.plain.ce
    check_rows("log p", -found, exact, plain, torch.ones_like(exact))
    expected.check_grad(leaf.grad, variant)


@pytest.mark.interpreted(dtype=torch.float32, kind=["peaked", "shifted_1e4", "all_lowest"])
@pytest.mark.parametrize("kind", LOGITS)
def test_kinds_of_logits(variant, dtype, kind, poisoned_memory):
    if dtype == torch.float16 and kind == "shifted_2^24":
        pytest.skip("2^24 is infinite in fp16")
    check(*solved(kind, 8, 4801, dtype), variant)


@pytest.mark.interpreted(dtype=torch.float16, vocab=[1, 17, 65, 4097])
@pytest.mark.parametrize("vocab", WIDTHS)
def test_widths(variant, dtype, vocab, poisoned_memory):
    check(*solved("peaked", 8, vocab, dtype), variant)


@pytest.mark.interpreted(dtype=torch.float32, rows=[0, 1])
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_numbers_of_rows(variant, dtype, rows):
    check(*solved("normal", rows, 33, dtype), variant)


def test_gradcheck():
    p = problem("normal", 7, 9, torch.float64)
    torch.autograd.gradcheck(lambda z: token_logprobs(z, p.labels), p.logits.requires_grad_())


@pytest.mark.interpreted(dtype=torch.float32)
def test_upstream_gradients(variant, dtype):
    p = problem("peaked", 8, 301, dtype)
    p.targets = csr([([], [])] * 8)
    upstream = torch.tensor([2.0, -0.5, 0.0, 1e-3, 3.0, 0.25, 7.0, 1.5])
    z = p.logits.to(variant.device).requires_grad_()
    found = token_logprobs(z, p.labels.to(variant.device), backend=variant.backend)
    found.backward(upstream.to(found))
    Expected(p, 0.0, -upstream.double()).check_grad(z.grad, variant)


@pytest.mark.interpreted(dtype=torch.float32)
def test_ignored_rows(variant, dtype):
    z = make_logits("normal", 4, 33, dtype).to(variant.device)
    z[1] = torch.nan
    z.requires_grad_()
    labels = torch.tensor([3, IGNORE, IGNORE, 32], device=variant.device)
    found = token_logprobs(z, labels, backend=variant.backend)
    found.sum().backward()
    assert found[1:3].tolist() == [0.0, 0.0]
    assert not z.grad[1:3].any()
    assert z.grad[0].any()
    other = token_logprobs(z, labels.where(labels >= 0, 7), ignore_index=7, backend=variant.backend)
    assert torch.equal(other, found)


@pytest.mark.interpreted(dtype=torch.float32)
def test_nan_and_infinite_logits(variant, dtype):
    z = make_logits("masked", 5, 4801, dtype)
    z[1, 4800] = torch.nan
    z[2] = -torch.inf
    z[3, 5] = torch.inf
    z[4, 9] = -torch.inf
    z = z.to(variant.device).requires_grad_()
    labels = torch.tensor([int(z[0].isfinite().nonzero()[0]), 2, 3, 4, 9], device=variant.device)
    found = token_logprobs(z, labels, backend=variant.backend)
    found.sum().backward()
    assert found[0].isfinite()
    assert found[1:4].isnan().all()
    assert found[4] == -torch.inf
    assert z.grad[1:4].isnan().all()
    assert z.grad[0].isfinite().all()
    assert z.grad[4].isfinite().all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), vocab=st.integers(1, 140))
def test_probabilities_of_all_labels_sum_to_one(variant, seed, vocab):
    z = 5 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(vocab, device=variant.device)
    found = token_logprobs(z.expand(vocab, -1).to(variant.device), labels, backend=variant.backend)
    # 8 roundings of each term, relative; the terms add up to 1
    assert abs(float(found.double().exp().sum()) - 1) <= 16 * 2.0**-24 * (1 + float(-found.min()))


@pytest.mark.interpreted
def test_expanded_rows_need_no_copy(variant):
    row = make_logits("normal", 1, 1001, torch.float32).to(variant.device)
    labels = torch.arange(5, device=variant.device)
    found = token_logprobs(row.expand(5, -1), labels, backend=variant.backend)
    one_by_one = [token_logprobs(row, labels[i : i + 1], backend=variant.backend) for i in range(5)]
    assert torch.equal(found, torch.cat(one_by_one))


def test_threads_and_batches_change_nothing(variant, dtype):
    z = make_logits("peaked", 13, 5003, dtype).to(variant.device)
    labels = torch.arange(13, device=variant.device)
    with threads(1):
        one = token_logprobs(z, labels, backend=variant.backend)
    with threads(2):
        two = token_logprobs(z, labels, backend=variant.backend)
    assert torch.equal(bits(one), bits(two))
    assert torch.equal(token_logprobs(z[4:6], labels[4:6], backend=variant.backend), one[4:6])


@pytest.mark.interpreted
def test_is_the_equivalent_of_its_docstring(variant):
    z = make_logits("normal", 6, 97, torch.float32).to(variant.device)
    labels = torch.arange(6, device=variant.device)
    equivalent = z.float().log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(token_logprobs(z, labels, backend=variant.backend), equivalent)
    assert torch.allclose(equivalent, -F.cross_entropy(z, labels, reduction="none"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z, y: (z[0], y), ValueError, r"logits: expected shape \(rows, vocab\)"),
        (lambda z, y: (z[:, ::2], y), ValueError, r"logits: .*stride"),
        (lambda z, y: (z.int(), y), TypeError, r"logits: .*floating point"),
        (lambda z, y: (z[:, :0], y), ValueError, r"logits: .*empty"),
        (lambda z, y: (z, y[:2]), ValueError, r"labels: expected shape \(4,\)"),
        (lambda z, y: (z, y.int()), TypeError, r"labels: expected int64"),
        (lambda z, y: (z, None), TypeError, r"labels: expected a torch.Tensor, got NoneType"),
        (lambda z, y: (z, y.to("meta")), ValueError, r"labels: expected device"),
    ],
)
def test_wrong_arguments(variant, change, error, message):
    z = torch.zeros(4, 33, device=variant.device)
    labels = torch.arange(4, device=variant.device)
    with pytest.raises(error, match=message):
        token_logprobs(*change(z, labels), backend=variant.backend)
    with pytest.raises(TypeError, match="ignore_index: expected an int, got float"):
        token_logprobs(z, labels, ignore_index=-100.0, backend=variant.backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [-1, 33, 2**32 + 5])
def test_label_out_of_range(variant, bad):
    z = torch.zeros(4, 33, device=variant.device)
    labels = torch.tensor([0, 32, bad, 1], device=variant.device)
    if variant.checks_values:
        with pytest.raises(ValueError, match=rf"labels: row 2 has label {bad}, outside \[0, 33\)"):
            token_logprobs(z, labels, backend=variant.backend)
    else:
        found = token_logprobs(z, labels, backend=variant.backend)
        assert found.isnan().tolist() == [False, False, True, False]
