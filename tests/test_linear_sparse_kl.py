"""linear_sparse_kl against F.linear and the dense loss in float64, on every backend."""

import dataclasses
import types

import pytest
import torch
from helpers import IGNORE, csr
from linear_fixtures import check, make_head, solve
from torch.utils._python_dispatch import TorchDispatchMode

from mdkernels import SparseTargets, linear_sparse_kl, sparse_kl
from mdkernels.ops import linear
from mdkernels.ops.linear_sparse_kl import chunks
from mdkernels.ops.sparse_kl import reference

OP = "linear_sparse_kl"
REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.interpreted(dtype=torch.float32, chunk_rows=8, reduction=["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 8])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_worse_than_plain_torch(variant, dtype, reduction, chunk_rows, poisoned_memory):
    head = make_head(dtype=dtype, device=variant.device)
    upstream = torch.linspace(-1, 2, 19) if reduction == "none" else torch.tensor(2.5)
    options = {"kl_weight": 0.3, "reduction": reduction, "upstream": upstream}
    out, grads = head.grads(**options, chunk_rows=chunk_rows, backend=variant.backend)
    exact, plain = solve(head, torch.float64, **options), solve(head, dtype, **options)
    check(out, grads, head, dtype, exact, plain)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_term_alone_without_bias(dtype, kl_weight):
    head = make_head(dtype=dtype, bias=False, seed=3)
    if kl_weight == 1.0:
        head.labels = None
    out, grads = head.grads(kl_weight=kl_weight, chunk_rows=5)
    check(out, grads, head, dtype, *(solve(head, d, kl_weight) for d in (torch.float64, dtype)))


@pytest.mark.parametrize("rows", [0, 1, 63, 65])
@pytest.mark.parametrize("vocab", [1, 2, 33, 4801])
def test_sizes(rows, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(rows, vocab, dtype, seed=rows, width=7)
        out, grads = head.grads(reduction="sum", chunk_rows=16)
        solved = (solve(head, d, reduction="sum") for d in (torch.float64, dtype))
        check(out, grads, head, dtype, *solved)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_size_of_chunks_changes_only_roundings(reduction):
    head = make_head(rows=23)
    kept, _ = head.grads(reduction=reduction, chunk_rows=23)
    _, whole = head.grads(reduction=reduction, chunk_rows=23)
    for chunk_rows in (1, 2, 7, 22, 1000):
        out, grads = head.grads(reduction=reduction, chunk_rows=chunk_rows)
        for found, expected in zip(out, kept, strict=True):
            torch.testing.assert_close(found, expected, rtol=16 * 2.0**-24, atol=2.0**-22)
        for name, grad in grads.items():
            size = whole[name].abs().max()
            assert (grad - whole[name]).abs().max() <= 16 * 2.0**-24 * size


def test_weight_gradient_error_is_flat_from_1_to_64_chunks():
    """Hidden states of one sign, so that the sum grows as long as it is added to: a 16-bit sum
    loses digits with every chunk, as the last assertion shows. One chunk is rounded once; of more,
    each is rounded at its own size, which together is at most one rounding of the sum, and then the
    sum is: two independent roundings however many chunks, sqrt(2) times the error of one."""
    rows, dtype = 512, torch.bfloat16
    head = make_head(rows, 257, dtype, bias=False, width=16, scale=0.1)
    head.hidden = (head.hidden.detach().float().abs() + 1).to(dtype).requires_grad_()
    head.targets = csr([([3, 5], [0.5, 0.5])] * rows)
    head.labels = torch.full((rows,), 3)
    exact = solve(head, torch.float64).grads["weight"]

    def error(grad):
        return float((grad.double() - exact).norm() / exact.norm())

    errors = {}
    for count in (1, 2, 4, 8, 16, 32, 64):
        _, grads = head.grads(chunk_rows=rows // count)
        errors[count] = error(grads["weight"])
    assert max(errors.values()) <= 2**0.5 * errors[1], errors

    narrow = torch.zeros_like(head.weight)
    for part in range(64):
        of = slice(part * 8, part * 8 + 8)
        few = dataclasses.replace(
            head, hidden=head.hidden.detach()[of].requires_grad_(), labels=head.labels[of]
        )
        few.targets = head.targets.rows(of.start, of.stop)
        narrow += few.grads()[1]["weight"].detach() / 64
    assert error(narrow) > 2 * errors[64], "the test could not fail"


def test_strides_and_overlaps_are_read_as_they_are():
    head = make_head(rows=9, dtype=torch.float32)
    _, expected = head.grads(chunk_rows=4)
    hidden, weight = head.hidden.detach(), head.weight.detach()
    padded = torch.full((9, 60), torch.nan)[:, 5:53:2].copy_(hidden)
    columns = torch.full((24, 2 * 203), torch.nan)[:, ::2].copy_(weight.t()).t()
    for other in ((padded, weight), (hidden.t().contiguous().t(), columns), (padded, columns)):
        copies = [t.clone() for t in other]
        head.hidden, head.weight = (t.detach().requires_grad_() for t in other)
        _, found = head.grads(chunk_rows=4)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(other, copies, strict=True))
    same = hidden[:1].expand(9, -1)
    head.hidden = same
    with torch.no_grad():
        row_by_row = head.run(reduction="none").ce
        head.hidden = same.contiguous()
        torch.testing.assert_close(head.run(reduction="none").ce, row_by_row)


def test_is_the_equivalent_of_its_docstring(variant):
    head = make_head(device=variant.device)
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias).detach()
    expected = sparse_kl(z, head.targets, head.labels, backend=variant.backend)
    with torch.no_grad():
        found = head.run(backend=variant.backend)
    trained = head.run(backend=variant.backend)
    for a, b, c in zip(found, trained, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b.detach(), a, rtol=2.0**-20, atol=0)
    assert (trained.loss.requires_grad, trained.kl.requires_grad) == (True, False)
    assert head.run(reduction="none", backend=variant.backend).kl.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(variant, reduction):
    head = make_head(rows=5, device=variant.device)
    head.labels = torch.full_like(head.labels, IGNORE)
    out, grads = head.grads(reduction=reduction, chunk_rows=2, backend=variant.backend)
    assert not any(part.any() for part in out)
    assert not any(grad.any() for grad in grads.values())


def test_mean_counts_the_valid_rows_of_all_chunks():
    head = make_head(rows=6)
    head.labels = torch.tensor([1, IGNORE, IGNORE, IGNORE, 2, 3])
    total, by_sum = head.grads(reduction="sum", chunk_rows=2)
    mean, by_mean = head.grads(reduction="mean", chunk_rows=2)
    torch.testing.assert_close(mean.loss, total.loss / 3)
    for name, grad in by_mean.items():
        torch.testing.assert_close(grad, by_sum[name] / 3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_propagates(variant, reduction):
    head = make_head(rows=6, device=variant.device, bias=False)
    head.labels = torch.arange(6, device=variant.device)
    with torch.no_grad():
        head.hidden[4, 3] = torch.nan
    out, grads = head.grads(reduction=reduction, chunk_rows=2, backend=variant.backend)
    assert grads["weight"].isnan().all()
    assert grads["hidden"][4].isnan().all()
    assert grads["hidden"][:4].isfinite().all()
    nan = out.loss.isnan()
    assert nan.tolist() == ([False] * 4 + [True, False] if reduction == "none" else True)


@pytest.mark.parametrize("what", ["id", "label"])
def test_values_out_of_range(variant, what):
    """The message counts rows in the whole batch, and nothing is computed before it."""
    head = make_head(rows=7, vocab=33, device=variant.device)
    targets = csr([([1], [1.0])] * 5 + [([33 if what == "id" else 2], [1.0])] * 2)
    head.targets, head.labels = targets.to(variant.device), torch.zeros_like(head.labels)
    if what == "label":
        head.labels[5] = -7
    if variant.device == "cpu":
        message = {"id": "row 5 has id 33", "label": "row 5 has label -7"}[what]
        with pytest.raises(ValueError, match=message):
            head.run(chunk_rows=2, backend=variant.backend)
    else:
        nan = head.run(chunk_rows=2, reduction="none", backend=variant.backend).loss.isnan()
        assert nan.tolist()[:6] == [False] * 5 + [True]


def test_reference_takes_a_window_of_offsets():
    """As it gets it on a GPU, where reading the offsets would mean waiting."""

    class Gpu(str):
        """A device to torch, and of another type than "cpu" to the reference."""

        type = "cuda"

    head = make_head(rows=9)
    t, labels = head.targets, head.labels[4:7]
    logits = types.SimpleNamespace(shape=(3, 203), device=Gpu("cpu"), dtype=torch.float32)
    window = t.row_offsets[4:8], t.token_ids, t.probs
    found = reference._merged(logits, *window, labels, IGNORE)
    expected = reference._merged(torch.empty(3, 203), *_arrays(t.rows(4, 7)), labels, IGNORE)
    assert len(expected[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _arrays(targets: SparseTargets):
    return targets.row_offsets, targets.token_ids, targets.probs


# ---- what is computed, and in how much memory


class Sizes(TorchDispatchMode):
    """Shapes of every tensor that an operation returns, with the operation's name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.seen.append((function.__name__, tuple(value.shape), value.numel()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_of_logits_and_one_cast(dtype):
    """fp32 tensors, computed in `dtype`, as autocast would have it."""
    rows, vocab, width, chunk = 64, 1001, 8, 8
    head = make_head(rows, vocab, width=width)
    head.targets = csr([([3, 5], [0.5, 0.5])] * rows)  # fewer than logits in a chunk
    args = *_arrays(head.targets), head.labels, IGNORE
    ones = torch.ones(rows)
    with torch.no_grad(), Sizes() as sizes:
        chunks.gradient(
            reference, head.hidden, head.weight, head.bias, *args, ones, ones, True, True, True,
            chunk, dtype,
        )  # fmt: skip
    stride = linear._row_stride(vocab, dtype)
    largest = max(size for _, _, size in sizes.seen)
    assert largest <= max(chunk * stride, vocab * width)
    buffers = [shape for name, shape, _ in sizes.seen if "empty" in name]
    assert buffers.count((chunk, stride)) == 1
    casts = [shape for name, shape, _ in sizes.seen if name.startswith("_to_copy")]
    assert casts.count((vocab, width)) == (dtype != torch.float32)


@pytest.mark.parametrize(("frozen", "products"), [("", 3), ("hidden", 2), ("weight", 2)])
def test_frozen_inputs_cost_nothing(monkeypatch, frozen, products):
    head = make_head(rows=9)
    _, expected = head.grads(chunk_rows=9)
    if frozen:
        head.leaves()[frozen].requires_grad_(False)
    count = []
    for name in ("mm", "addmm"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, f=plain, **k: (count.append(f.__name__), f(*a, **k))[1]
        )
    _, grads = head.grads(chunk_rows=9)
    assert len(count) == products
    for name, grad in grads.items():
        assert (grad is None) == (name == frozen)
        assert grad is None or torch.equal(grad, expected[name])


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "device"),
    [
        (2048, 50257, torch.bfloat16, "cpu"),
        (8192, 50257, torch.bfloat16, "cuda"),
        (8192, 151936, torch.bfloat16, "cuda"),
        (100, 50257, torch.float32, "cuda"),
        (5, 10**9, torch.float32, "cuda"),
        (0, 7, torch.float32, "cpu"),
    ],
)
def test_default_chunks_are_even_and_within_the_limit(rows, vocab, dtype, device):
    found = linear.default_chunk_rows(rows, vocab, dtype, torch.device(device))
    assert 1 <= found <= max(rows, 1)
    limit = linear.SCRATCH_BYTES.get(device, linear.GPU_SCRATCH_BYTES)
    size = found * linear._row_stride(vocab, dtype) * dtype.itemsize
    assert size <= limit or found == 1
    if 1 < found < rows:
        assert found % linear.CHUNK_MULTIPLE == 0
        assert -rows % found < linear.CHUNK_MULTIPLE * -(-rows // found)


@pytest.mark.parametrize(("vocab", "width", "fits"), [(50257, 768, True), (151936, 896, False)])
def test_the_sum_of_the_weight_gradient_counts_as_scratch_of_a_gpu(vocab, width, fits):
    beside = 2 * vocab * width  # fp32 instead of bf16
    size = 8192, vocab, torch.bfloat16, torch.device("cuda")
    found = linear.default_chunk_rows(*size, beside)
    logits = found * linear._row_stride(vocab, torch.bfloat16) * 2
    assert (logits + beside <= linear.GPU_SCRATCH_BYTES) == fits
    assert found == linear.default_chunk_rows(*size) or fits


def test_checks_cover_the_storage():
    head = make_head(rows=3)
    weight = head.weight.detach()
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight: its storage has been freed"):
        linear_sparse_kl(head.hidden.detach(), weight, head.targets, head.labels)
