"""The linear operators inside a model: autograd, autocast, checkpointing, compilation."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import IGNORE, csr
from linear_fixtures import WIDTH, check, make_head, solve
from torch.utils.checkpoint import checkpoint

from mdkernels import BackendUnavailable, linear_sparse_kl, linear_token_logprobs, sparse_kl
from mdkernels.ops import linear

OP = "linear_sparse_kl"
REDUCTIONS = ["mean", "sum", "none"]


def small():
    """fp64, five rows: repeated ids, masses 0 to 1.8, an ignored one."""
    entries = [
        ([], []),
        ([3, 3, 1], [0.2, 0.5, 0.3]),
        ([0], [1.0]),
        ([4], [1.0]),
        ([6, 2], [0.9] * 2),
    ]
    head = make_head(5, 7, torch.float64, width=3)
    head.targets = csr(entries, torch.float64)
    head.labels = torch.tensor([0, 3, IGNORE, 6, 2])
    return head


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    head = small()

    def parts(hidden, weight, bias):
        out = linear_sparse_kl(
            hidden, weight, head.targets, head.labels,
            bias=bias, kl_weight=0.3, reduction=reduction, chunk_rows=2,
        )  # fmt: skip
        return tuple(out) if reduction == "none" else out.loss

    torch.autograd.gradcheck(parts, (head.hidden, head.weight, head.bias))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_is_an_error(reduction):
    head = small()
    loss = head.run(reduction=reduction).loss.sum()
    (grad,) = torch.autograd.grad(loss, head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_backwards_add_up(variant, reduction):
    """The first scales the gradients of the forward in place: the second has to notice."""
    head = make_head(rows=9, device=variant.device)
    loss = head.run(reduction=reduction, chunk_rows=4, backend=variant.backend).loss
    factors = [torch.full_like(loss, factor) for factor in (3.0, -0.5)]
    loss.backward(factors[0], retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in head.leaves().items()}
    loss.backward(factors[1])
    for name, leaf in head.leaves().items():
        expected = once[name] * (2.5 / 3)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)


def test_gradient_does_not_belong_to_the_graph():
    """Two calls on one weight accumulate, and zeroing .grad in place harms nobody."""
    head = make_head(rows=6)
    (head.run().loss + 2 * head.run().loss).backward()
    twice = head.weight.grad.clone()
    head.weight.grad.zero_()
    head.run().loss.backward()
    torch.testing.assert_close(3 * head.weight.grad, twice, rtol=1e-5, atol=1e-8)


def test_tied_embedding():
    head = make_head(rows=6, bias=False)
    ids = torch.tensor([1, 5, 5, 0, 202, 9])
    grads = []
    for lean in (True, False):
        weight = head.weight.detach().clone().requires_grad_()
        hidden = F.embedding(ids, weight).tanh()
        if lean:
            linear_sparse_kl(
                hidden, weight, head.targets, head.labels, chunk_rows=2
            ).loss.backward()
        else:
            plain = make_head(rows=6, bias=False)
            plain.hidden, plain.weight = hidden.detach(), weight.detach()
            found = solve(plain, torch.float32).grads
            hidden.backward(found["hidden"].float())
            weight.grad += found["weight"].float()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_layer_or_hidden(variant, reduction):
    """Each subset of the three: what is asked for is as if all were, the rest is None."""
    head = make_head(rows=9, device=variant.device)
    options = {"reduction": reduction, "chunk_rows": 4, "backend": variant.backend}
    upstream = torch.linspace(-1, 2, 9) if reduction == "none" else torch.tensor(-3.0)
    _, expected = head.grads(**options, upstream=upstream)
    for live in range(1, 8):
        asked = [bool(live & 1 << i) for i in range(3)]
        for leaf, needed in zip(head.leaves().values(), asked, strict=True):
            leaf.requires_grad_(needed)
        _, found = head.grads(**options, upstream=upstream)
        for (name, grad), needed in zip(found.items(), asked, strict=True):
            assert (grad is not None) == needed
            assert grad is None or torch.equal(grad, expected[name])


# ---- precision


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    """bf16 products of fp32 parameters, as F.linear does them, and fp32 gradients of them that are
    no worse. A weight of its own dtype is cast once a pass, whatever the number of chunks."""
    head = make_head(rows=16)
    upstream = torch.linspace(-1, 2, 16) if reduction == "none" else torch.tensor(2.0)
    options = {"reduction": reduction, "upstream": upstream}
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = head.grads(**options, chunk_rows=4)
    # What autocast rounds to bf16 before anything is computed is no error of the operator.
    rounded = make_head(rows=16)
    for name, leaf in rounded.leaves().items():
        leaf.data = getattr(head, name).detach().bfloat16().float()
    exact, plain = (solve(rounded, d, **options) for d in (torch.float64, torch.bfloat16))
    check(out, grads, head, torch.bfloat16, exact, plain)
    assert out.loss.dtype == torch.float32

    kept, seen = linear._operand, []

    def count(tensor, dtype):
        seen.append((tuple(tensor.shape), tensor.dtype != dtype))
        return kept(tensor, dtype)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(linear, "_operand", count)
        head.grads(**options, chunk_rows=4)
    passes = 2 if reduction == "none" else 1
    assert seen.count(((203, WIDTH), True)) == passes


def test_fp16_with_a_loss_scale():
    """The loss is a mean over rows and softmax a mean over the vocabulary: an entry of the logits'
    gradient is about 1e-7, nothing in fp16 unless the division waits for the loss scale."""
    rows, vocab, scale = 1024, 4003, torch.tensor(2.0**10)
    head = make_head(rows, vocab, torch.float16, bias=False, width=8, scale=0.1)
    head.targets = csr([([3, 5], [0.5, 0.5])] * rows)
    head.labels = head.labels.clamp(min=0)
    exact = solve(head, torch.float64, upstream=scale).grads
    others = ~torch.isin(torch.arange(vocab), torch.cat([head.labels, torch.tensor([3, 5])]))

    def error(grads):
        """Of all, and of the part that consists of such small entries alone."""
        pairs = [(grad.double(), exact[name]) for name, grad in grads.items()]
        pairs.append((grads["weight"][others].double(), exact["weight"][others]))
        return max(float((found - want).norm() / want.norm()) for found, want in pairs)

    _, grads = head.grads(upstream=scale, chunk_rows=512)
    assert all(grad.dtype == torch.float16 for grad in grads.values())
    # 2^-11 each for the logits (of unit size), their gradient, a chunk's product, the result.
    assert error(grads) < 2.0**-9
    for leaf in head.leaves().values():
        leaf.grad = None
    logits = F.linear(head.hidden, head.weight)
    (scale * sparse_kl(logits, head.targets, head.labels, inplace=True).loss).backward()
    early = {name: leaf.grad for name, leaf in head.leaves().items()}
    assert error(early) > 2.0**-7, "the test could not fail"


# ---- around it


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing_changes_nothing(reduction, reentrant):
    head = make_head(rows=9)
    _, expected = head.grads(reduction=reduction, chunk_rows=4)
    for leaf in head.leaves().values():
        leaf.grad = None
    inputs = head.hidden, head.weight, head.bias

    def loss(hidden, weight, bias):
        targets = head.targets, head.labels
        return linear_sparse_kl(
            hidden, weight, *targets, bias=bias, reduction=reduction, chunk_rows=4
        ).loss

    checkpoint(loss, *inputs, use_reentrant=reentrant).sum().backward()
    for name, leaf in head.leaves().items():
        assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize(("reduction", "compiler"), [("mean", "inductor"), ("none", "aot_eager")])
def test_compiled(reduction, compiler):
    """One graph for all N, and the gradients of the eager call."""
    head = make_head(rows=9)

    def step(hidden, weight, bias, targets, labels):
        return linear_sparse_kl(
            2 * hidden, weight, targets, labels, bias=bias, reduction=reduction, chunk_rows=4
        )

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (9, 6):
        head = make_head(rows=rows)
        results = []
        for function in (step, compiled):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in head.leaves().values()]
            out = function(*leaves, head.targets, head.labels)
            (3 * out.loss).sum().backward()
            results.append([*out, *(leaf.grad for leaf in leaves)])
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager, rtol=4 * 2.0**-23, atol=2.0**-24)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def operator_arguments(dtype, rows=5):
    head = make_head(rows, 33, dtype, width=6)
    t, wide = head.targets, torch.float64 if dtype == torch.float64 else torch.float32
    layer = [leaf.detach() for leaf in head.leaves().values()]
    sparse = *layer, t.row_offsets, t.token_ids, t.probs, head.labels, IGNORE
    coefs = torch.linspace(0.1, 0.5, rows, dtype=wide), torch.linspace(0.7, 0.2, rows, dtype=wide)
    how = 2, dtype, "auto"
    return {
        "linear_sparse_kl_forward": (*sparse, *how),
        "linear_sparse_kl_gradient": (*sparse, *coefs, True, True, True, *how),
        "linear_token_logprobs_forward": (*layer, head.labels, IGNORE, *how),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", operator_arguments(torch.float32))
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.mdk, name).default
    arguments = operator_arguments(dtype)[name]
    if name.endswith("gradient"):
        some = (*arguments[:10], False, True, False, *arguments[13:])
        torch.library.opcheck(operator, some)
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_every_operator_of_these_modules_is_checked():
    registered = {
        schema.name.removeprefix("mdk::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mdk::linear_")
    }
    assert registered == set(operator_arguments(torch.float32))


def test_backend_by_argument_and_environment(monkeypatch):
    """Also in the backward pass, which for fp64 only the reference can run."""
    monkeypatch.delenv("MDK_BACKEND", raising=False)
    head = small()
    _, expected = head.grads(backend="reference", reduction="none")
    monkeypatch.setenv("MDK_BACKEND", "cpu")
    with pytest.raises(BackendUnavailable, match="cannot run linear_sparse_kl here: it takes"):
        head.grads()
    with pytest.raises(BackendUnavailable, match="cannot run linear_token_logprobs here: it takes"):
        linear_token_logprobs(head.hidden, head.weight, head.labels)
    _, found = head.grads(backend="reference", reduction="none")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    monkeypatch.setenv("MDK_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend: got 'nonsense'"):
        head.run()
