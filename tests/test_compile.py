"""torch.library.opcheck of every registered operator, and torch.compile with fullgraph=True."""

import os
import warnings

import pytest
import torch
import torch._dynamo.testing
from helpers import csr, make_logits, problem

from mdkernels import SparseTargets, sparse_kl, token_logprobs

VOCAB, WIDTH = 101, 16


def sparse_args(dtype, rows=5, strided=False):
    p = problem("normal", rows, 33, dtype)
    logits = p.logits
    if strided:
        logits = torch.zeros(rows, 40, dtype=dtype)[:, 3:36].copy_(logits)
    t = p.targets
    return logits, (t.row_offsets, t.token_ids, t.probs, p.labels, -100)


def coefficients(rows, dtype=torch.float32):
    return torch.linspace(0.1, 0.5, rows, dtype=dtype), torch.linspace(0.7, 0.2, rows, dtype=dtype)


def operator_arguments(name, dtype, strided, backend):
    """Arguments of an operator as the package calls it."""
    logits, sparse = sparse_args(dtype, strided=strided)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse = logits.double().logsumexp(1)
    coefs = coefficients(5, wide)
    return {
        "sparse_kl_forward": (logits, *sparse, backend),
        "sparse_kl_backward": (logits, *sparse, lse, *coefs, backend),
        "sparse_kl_loss_grad_": (logits.clone(), *sparse, 0.3, "mean", backend),
        "sparse_kl_scale_": (logits.clone(), torch.tensor(0.5, dtype=wide), backend),
        "token_logprobs_forward": (logits, sparse[3], -100, backend),
        "token_logprobs_backward": (logits, sparse[3], -100, lse, coefs[0], backend),
    }[name]


OPERATORS = [
    "sparse_kl_forward",
    "sparse_kl_backward",
    "sparse_kl_loss_grad_",
    "sparse_kl_scale_",
    "token_logprobs_forward",
    "token_logprobs_backward",
]
RUNS = [("auto", torch.float32), ("auto", torch.bfloat16), ("reference", torch.float64)]


if os.environ.get("TRITON_INTERPRET") == "1":
    RUNS.append(("triton", torch.float32))


@pytest.mark.interpreted(
    backend="triton", strided=True, name=["sparse_kl_loss_grad_", "token_logprobs_backward"]
)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype, strided, backend):
    operator = getattr(torch.ops.mdk, name).default
    results = torch.library.opcheck(operator, operator_arguments(name, dtype, strided, backend))
    assert set(results.values()) == {"SUCCESS"}, results


def test_every_operator_of_these_modules_is_checked():
    registered = {
        schema.name.removeprefix("mdk::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(("mdk::sparse_kl_", "mdk::token_logprobs_"))
    }
    assert registered == set(OPERATORS)


# ---- torch.compile


def draw(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator)
    p = problem("normal", rows, VOCAB, torch.float32, seed=seed)
    return hidden, p.targets, p.labels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # An operator whose outputs share storage only warns, for now.
        warnings.filterwarnings("error", message=".*may not alias.*")
        yield
    torch._dynamo.reset()


def train(function, hidden, weight, *rest):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(hidden, weight, *rest)
    loss = out.loss if hasattr(out, "loss") else out.sum()
    loss.sum().backward()
    parts = out if isinstance(out, tuple) else (out,)
    return [t.detach() for t in parts], [hidden.grad, weight.grad]


def same(eager, compiled):
    """The same kernels on the same numbers; the compiler may only reorder the sum over rows and the
    matrix products, hence a few roundings."""
    for a, b in zip(eager[0], compiled[0], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2.0**-23, atol=0)
    for a, b in zip(eager[1], compiled[1], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2.0**-23, atol=2.0**-26)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_sparse_kl(inplace, dynamic):
    """Linear layer and loss in one graph; with dynamic shapes one graph serves all N and nnz."""

    def step(hidden, weight, targets, labels):
        return sparse_kl(hidden @ weight.t(), targets, labels, kl_weight=0.3, inplace=inplace)

    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows in (8, 5, 13) if dynamic else (8,):
        hidden, targets, labels = draw(rows, seed=rows)
        same(
            train(step, hidden, weight, targets, labels),
            train(compiled, hidden, weight, targets, labels),
        )
    assert counter.frame_count == 1


def test_compiled_with_targets_built_inside():
    def step(hidden, weight, offsets, ids, probs, labels):
        targets = SparseTargets(offsets, ids, probs)
        return sparse_kl(hidden @ weight.t(), targets, labels, reduction="none", inplace=True)

    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    hidden, t, labels = draw(8)
    rest = (weight, t.row_offsets, t.token_ids, t.probs, labels)
    same(train(step, hidden, *rest), train(torch.compile(step, fullgraph=True), hidden, *rest))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_token_logprobs(dynamic):
    def step(hidden, weight, labels):
        return token_logprobs(hidden @ weight.t(), labels)

    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (8, 5) if dynamic else (8,):
        hidden, _, labels = draw(rows, seed=rows)
        same(train(step, hidden, weight, labels), train(compiled, hidden, weight, labels))


def test_compiled_without_gradient_leaves_the_logits_alone():
    _, targets, labels = draw(8)
    logits = make_logits("normal", 8, VOCAB, torch.float32)
    kept = logits.clone()
    compiled = torch.compile(
        lambda z: sparse_kl(z, targets, labels, inplace=True).loss, fullgraph=True
    )
    with torch.no_grad():
        loss = compiled(logits)
    assert torch.equal(logits, kept)
    torch.testing.assert_close(loss, sparse_kl(logits, targets, labels).loss, rtol=1e-6, atol=0)


def test_compiled_inplace_still_refuses_a_parameter():
    _, targets, labels = draw(8)
    leaf = make_logits("normal", 8, VOCAB, torch.float32).flatten().requires_grad_()
    kept = leaf.detach().clone()
    compiled = torch.compile(
        lambda z: sparse_kl(z.view(8, VOCAB), targets, labels, inplace=True).loss
    )
    with pytest.raises(Exception, match="leaf"):
        compiled(leaf)
    assert torch.equal(leaf.detach(), kept)


def test_compiled_values_are_still_checked():
    bad = csr([([VOCAB], [1.0])] * 8)
    labels = torch.zeros(8, dtype=torch.int64)
    compiled = torch.compile(lambda z: sparse_kl(z, bad, labels).loss, fullgraph=True)
    with pytest.raises(ValueError, match=rf"targets.token_ids: row 0 has id {VOCAB}"):
        compiled(make_logits("normal", 8, VOCAB, torch.float32))


def test_export():
    """The operators survive torch.export, their arguments included."""

    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return token_logprobs(logits, labels)

    logits, labels = make_logits("normal", 4, 33, torch.float32), torch.arange(4)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Loss(), (logits, labels), dynamic_shapes=({0: rows}, {0: rows}))
    assert "mdk.token_logprobs_forward" in str(program.graph)
    more, ids = make_logits("normal", 7, 33, torch.float32), torch.arange(7)
    torch.testing.assert_close(program.module()(more, ids), token_logprobs(more, ids))
