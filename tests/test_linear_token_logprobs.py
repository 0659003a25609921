"""linear_token_logprobs against F.linear and log_softmax in float64, on every backend."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import IGNORE
from linear_fixtures import check, make_head, solve

from mdkernels import SparseTargets, linear_token_logprobs, token_logprobs
from mdkernels.ops.linear_token_logprobs import _by_chunks
from mdkernels.ops.token_logprobs import reference

OP = "linear_token_logprobs"


@dataclasses.dataclass
class Output:
    """In the names of the loss whose negation this is."""

    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor


def run(head, **options):
    return linear_token_logprobs(head.hidden, head.weight, head.labels, bias=head.bias, **options)


def compare(head, dtype, upstream, **options):
    """Against the cross-entropy of the same head without targets, upstream gradient negated."""
    head.targets = SparseTargets.empty(len(head.labels), head.hidden.device)
    found = run(head, **options)
    found.backward(upstream.to(found))
    out = Output(-found, torch.zeros_like(found), -found)
    grads = {name: leaf.grad for name, leaf in head.leaves().items()}
    how = {"kl_weight": 0.0, "reduction": "none", "upstream": -upstream}
    check(out, grads, head, dtype, *(solve(head, d, **how) for d in (torch.float64, dtype)))


@pytest.mark.interpreted(dtype=torch.float32, chunk_rows=8)
@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_no_worse_than_plain_torch(variant, dtype, chunk_rows, poisoned_memory):
    head = make_head(dtype=dtype, device=variant.device)
    upstream = torch.linspace(-1, 2, 19)
    compare(head, dtype, upstream, chunk_rows=chunk_rows, backend=variant.backend)


@pytest.mark.parametrize("rows", [0, 1, 65])
@pytest.mark.parametrize("vocab", [1, 2, 4801])
def test_sizes(rows, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(rows, vocab, dtype, seed=rows, width=7, bias=False)
        compare(head, dtype, torch.linspace(-1, 2, rows), chunk_rows=16)


@pytest.mark.interpreted
def test_is_the_equivalent_of_its_docstring(variant):
    head = make_head(device=variant.device)
    z = F.linear(head.hidden, head.weight, head.bias)
    expected = token_logprobs(z, head.labels, backend=variant.backend)
    found = run(head, chunk_rows=7, backend=variant.backend)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad
    with torch.no_grad():
        evaluated = run(head, chunk_rows=7, backend=variant.backend)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, found)


def test_size_of_chunks_changes_only_roundings(variant):
    head = make_head(rows=23, device=variant.device)
    with torch.no_grad():
        expected = run(head, chunk_rows=23, backend=variant.backend)
        for chunk_rows in (1, 2, 7, 22, 1000, None):
            found = run(head, chunk_rows=chunk_rows, backend=variant.backend)
            # Of WIDTH products in another order, of logits up to about 10.
            torch.testing.assert_close(found, expected, rtol=16 * 2.0**-24, atol=2.0**-19)


@pytest.mark.interpreted
def test_ignored_rows(variant):
    head = make_head(rows=6, device=variant.device)
    head.labels = torch.tensor([3, IGNORE, IGNORE, 5, 202, IGNORE], device=variant.device)
    with torch.no_grad():
        head.hidden[1] = torch.nan
    live = head.labels != IGNORE
    found = run(head, chunk_rows=2, backend=variant.backend)
    found.sum().backward()
    assert not found[~live].any()
    assert found[live].all()
    assert not head.hidden.grad[~live].any()
    assert head.hidden.grad[live].any()
    labels, ignored = head.labels.where(live, 7), dataclasses.replace(head)
    ignored.labels = labels
    again = run(ignored, ignore_index=7, chunk_rows=2, backend=variant.backend)
    assert torch.equal(again, found)
    head.labels = torch.full_like(head.labels, IGNORE)
    assert not run(head, backend=variant.backend).any()


def test_nan_stays_in_its_row(variant):
    head = make_head(rows=6, device=variant.device)
    head.labels = torch.arange(6, device=variant.device)
    with torch.no_grad():
        head.hidden[4, 3] = torch.nan
        found = run(head, chunk_rows=2, backend=variant.backend)
    assert found.isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.interpreted
def test_label_out_of_range(variant):
    """Counted in the whole batch, not in the chunk."""
    head = make_head(rows=7, vocab=33, device=variant.device)
    head.labels = torch.zeros_like(head.labels)
    head.labels[5] = 33
    if variant.device == "cpu":
        with pytest.raises(ValueError, match="labels: row 5 has label 33"):
            run(head, chunk_rows=2, backend=variant.backend)
    else:
        nan = run(head, chunk_rows=2, backend=variant.backend).isnan()
        assert nan.tolist() == [False] * 5 + [True, False]


def test_strides_are_read_as_they_are():
    head = make_head(rows=9)
    with torch.no_grad():
        expected = run(head, chunk_rows=4)
        head.hidden = torch.full((9, 60), torch.nan)[:, 5:53:2].copy_(head.hidden)
        head.weight = torch.full((24, 406), torch.nan)[:, ::2].copy_(head.weight.t()).t()
        head.bias = torch.full((203, 2), torch.nan)[:, 0].copy_(head.bias)
        head.labels = torch.full((9, 2), 1000)[:, 1].copy_(head.labels)
        torch.testing.assert_close(run(head, chunk_rows=4), expected, rtol=1e-5, atol=1e-6)


def test_autocast():
    head = make_head(rows=9)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(head, chunk_rows=4)
    found.sum().backward()
    z = F.linear(*(t.detach().bfloat16() for t in (head.hidden, head.weight, head.bias)))
    torch.testing.assert_close(found, token_logprobs(z, head.labels), rtol=2.0**-7, atol=2.0**-7)
    assert found.dtype == torch.float32
    assert all(leaf.grad.dtype == torch.float32 for leaf in head.leaves().values())


def test_gradcheck():
    head = make_head(5, 7, torch.float64, width=3)

    def logprobs(hidden, weight, bias):
        return linear_token_logprobs(hidden, weight, head.labels, bias=bias, chunk_rows=2)

    torch.autograd.gradcheck(logprobs, (head.hidden, head.weight, head.bias))


def test_frozen_layer():
    head = make_head(rows=9)
    run(head, chunk_rows=4).sum().backward()
    expected, head.hidden.grad = head.hidden.grad, None
    head.weight, head.bias = head.weight.detach(), head.bias.detach()
    loss = run(head, chunk_rows=4).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(head.hidden.grad, expected)
    loss.backward()
    assert torch.equal(head.hidden.grad, 2 * expected)


def test_compiled():
    def step(hidden, weight, bias, labels):
        return linear_token_logprobs(2 * hidden, weight, labels, bias=bias, chunk_rows=4)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 6):
        head = make_head(rows=rows)
        results = []
        for function in (step, compiled):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in head.leaves().values()]
            found = function(*leaves, head.labels)
            found.square().sum().backward()
            results.append([found, *(leaf.grad for leaf in leaves)])
        for eager, same in zip(*results, strict=True):
            torch.testing.assert_close(same, eager, rtol=4 * 2.0**-23, atol=2.0**-24)
    torch._dynamo.reset()


def test_nothing_larger_than_the_buffer():
    """No tensor of (rows, vocab), whatever the kernels: `forward` returns (rows,) ones."""
    head, shapes = make_head(rows=64, vocab=1001, width=8), []

    class Kernels:
        @staticmethod
        def forward(logits, labels, ignore_index):
            shapes.append((tuple(logits.shape), logits.data_ptr()))
            return reference.forward(logits, labels, ignore_index)

    with torch.no_grad():
        layer = head.hidden, head.weight, head.bias
        found = _by_chunks(Kernels, *layer, head.labels, IGNORE, 24, torch.float32)
        torch.testing.assert_close(found, run(head), rtol=1e-5, atol=1e-5)
    assert [shape for shape, _ in shapes] == [(24, 1001), (24, 1001), (16, 1001)]
    assert len({address for _, address in shapes}) == 1
