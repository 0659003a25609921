"""The CUDA kernels on the host: every shape of launch a device can get, which the operator tests,
running the kernels' own tables, meet only in part. See cuda_host.sh."""

import itertools

import cuda_host
import pytest
import torch
from buffers import Frame
from helpers import csr, problem
from test_sparse_kl import check, solved
from test_token_logprobs import check as check_logprobs
from test_token_logprobs import solved as solved_logprobs
from tolerances import Expected

from mdkernels import SparseTargets, knn_targets, sparse_kl, token_logprobs
from mdkernels.ops import native
from mdkernels.ops.sparse_kl import cuda_kernels as loss_kernels
from mdkernels.ops.sparse_kl.reduction import loss_grad_through
from mdkernels.ops.token_logprobs import cuda_kernels as logprob_kernels

OP = "sparse_kl"
if not cuda_host.PATH:
    pytest.skip(
        "needs the kernels compiled for the host: make test-cuda-host", allow_module_level=True
    )

# (threads, blocks of a cluster, 16-byte blocks of a chunk): whole rows, shares of a cluster, more
# blocks than the row has work for, chunks that are read twice, and both. Dtypes take turns, since a
# CUDA thread costs microseconds here.
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAUNCHES = [
    (F32, (64, 1, 0)),
    (BF16, (128, 1, 33)),
    (F32, (64, 2, 0)),
    (F16, (96, 3, 0)),
    (BF16, (32, 8, 0)),
    (F32, (64, 4, 9)),
    (BF16, (256, 1, 0)),
]
A100 = "80,4,166912"
from_source = pytest.mark.skipif(cuda_host.FROM_PTX, reason="what the shim's own launch says")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize(("logits_dtype", "launch"), LAUNCHES, ids=str)
def test_loss(variant, logits_dtype, launch, inplace, monkeypatch, poisoned_memory):
    cuda_host.force(monkeypatch, loss_kernels, launch)
    check(*solved("peaked", 8, 301, logits_dtype), variant, inplace)
    check(*solved("peaked", 8, 5, logits_dtype), variant, inplace)


@pytest.mark.parametrize("launch", [(64, 1, 33), (64, 3, 0)], ids=str)
def test_loss_on_several_rounds_of_a_block(variant, launch, monkeypatch, poisoned_memory):
    cuda_host.force(monkeypatch, loss_kernels, launch)
    for inplace in (False, True):
        check(*solved("peaked", 8, 4097, F32), variant, inplace)


@pytest.mark.parametrize("kind", ["one_80_above", "shifted_1e4", "masked", "all_lowest"])
def test_loss_in_clusters_and_chunks(variant, kind, monkeypatch, poisoned_memory):
    cuda_host.force(monkeypatch, loss_kernels, (64, 2, 31))
    for inplace in (False, True):
        check(*solved(kind, 8, 1001, F32), variant, inplace)


LOGPROB_LAUNCHES = [
    (F32, (64, 1)),
    (BF16, (64, 2)),
    (F16, (96, 3)),
    (F32, (32, 8)),
    (BF16, (256, 1)),
]


@pytest.mark.parametrize(("logits_dtype", "launch"), LOGPROB_LAUNCHES, ids=str)
def test_logprobs(variant, logits_dtype, launch, monkeypatch, poisoned_memory):
    cuda_host.force(monkeypatch, logprob_kernels, launch)
    for vocab in (1, 301, 4097):
        check_logprobs(*solved_logprobs("peaked", 8, vocab, logits_dtype), variant)


@pytest.mark.parametrize("device", ["", A100], ids=["hopper", "a100"])
def test_large_vocabulary(variant, dtype, device, monkeypatch):
    """fp32: two blocks share a row on Hopper; an A100 reads it twice."""
    if device and cuda_host.FROM_PTX:
        pytest.skip("the package's launch code asks for the device once in a process")
    monkeypatch.setenv("MDK_SHIM_DEVICE", device)
    cuda_host.force(monkeypatch, loss_kernels, (0, 0, 0))
    p = problem("peaked", 2, 50257, dtype)
    expected = Expected(p, 0.3, 0.7)
    for inplace in (False, True):
        check(p, expected, variant, inplace)


def test_the_last_threads_may_run_first(variant, monkeypatch):
    monkeypatch.setenv("MDK_SHIM_ORDER", "backwards")
    cuda_host.force(monkeypatch, loss_kernels, (64, 2, 17))
    cuda_host.force(monkeypatch, logprob_kernels, (64, 2))
    for inplace in (False, True):
        check(*solved("peaked", 8, 301, F32), variant, inplace)
    check_logprobs(*solved_logprobs("peaked", 8, 301, F32), variant)


@pytest.mark.parametrize("offsets", [[0, 9, 2], [0, -5, 2], [2, 1, 2], [0, 1, 2**62]])
def test_offsets_that_are_none_poison_their_rows(variant, offsets):
    p = problem("normal", 2, 33, torch.float32)
    targets = SparseTargets(
        torch.tensor(offsets), torch.arange(2, dtype=torch.int32), torch.full((2,), 0.5)
    )
    good = [0 <= a <= b <= 2 for a, b in itertools.pairwise(offsets)]
    z = p.logits.clone().requires_grad_()
    out = sparse_kl(z, targets, torch.tensor([3, 4]), reduction="none", backend="cuda")
    out.loss.sum().backward()
    assert out.kl.isfinite().tolist() == good
    assert out.ce.isfinite().tolist() == good
    assert z.grad.isfinite().all(1).tolist() == good
    assert (z.grad.isnan().all(1) | z.grad.isfinite().all(1)).all()


def test_rows_beyond_32_bits(variant, monkeypatch):
    """The second row starts 2^31 + 7 elements after the first; untouched memory costs nothing."""
    p = problem("peaked", 2, 301, torch.bfloat16)
    p.targets = csr([([3, 5], [0.5, 0.5]), ([300], [1.0])])
    p.labels = torch.tensor([7, 300])
    far = torch.empty(2**31 + 400, dtype=torch.bfloat16)
    logits = far.as_strided((2, 301), (2**31 + 7, 1))
    logits.copy_(p.logits)
    expected = Expected(p, 0.5, 0.5)
    found = token_logprobs(logits, p.labels, backend="cuda")
    torch.testing.assert_close(-found.double(), expected.exact.ce, rtol=1e-5, atol=1e-6)
    kl_coef = torch.full((2,), 0.5)
    arguments = (p.targets.row_offsets, p.targets.token_ids, p.targets.probs, p.labels, -100)
    loss_kernels.forward_backward_(logits, *arguments, kl_coef, kl_coef)
    expected.check_grad(logits, variant)
    loss_kernels.scale_(logits, torch.tensor([1.0, -2.0]))
    expected.check_grad(logits * torch.tensor([[1.0], [-0.5]]).bfloat16(), variant)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labelled", ["some", "none", "without"])
def test_factors_and_sums_of_a_step(variant, reduction, kl_weight, labelled):
    """Two launches instead of some fifteen of torch, with the same bits in the gradient."""
    # More rows than their block has threads (512) take ten seconds here: once for every reduction.
    rows = 520 if (labelled, kl_weight) == ("some", 0.3) else 70
    p = problem("peaked", rows, 5, F32)
    labels = {"some": p.labels, "none": torch.full_like(p.labels, -100), "without": None}[labelled]
    sparse = (p.targets.row_offsets, p.targets.token_ids, p.targets.probs, labels, -100)
    wanted, found = p.logits.clone(), p.logits.clone()
    kernel = loss_kernels.forward_backward_
    losses = loss_grad_through(kernel, wanted, *sparse, kl_weight, reduction)
    fused = loss_kernels.loss_grad_(found, *sparse, kl_weight, reduction)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(fused, losses, rtol=1e-6, atol=0.0)


def test_a_step_without_rows(variant):
    ids = torch.empty(0, dtype=torch.int32)
    sparse = (torch.zeros(1, dtype=torch.int64), ids, ids.float(), ids.long(), -100)
    losses = loss_kernels.loss_grad_(torch.empty(0, 7), *sparse, 0.5, "mean")
    assert [float(x) for x in losses] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("factor", [1.0, -0.75, float("nan")])
@pytest.mark.parametrize("per_row", [False, True])
def test_scale(variant, dtype, factor, per_row):
    for vocab in (1, 7, 33, 1001, 9001):
        frame = Frame(torch.randn(5, vocab).to(dtype))
        before = frame.view.clone()
        scale = torch.tensor(factor)
        loss_kernels.scale_(frame.view, scale.expand(5) if per_row else scale)
        expected = (before.float() * scale).to(dtype)
        assert torch.equal(frame.view.nan_to_num(9.0), expected.nan_to_num(9.0))
        frame.check_guards()


@from_source
def test_a_launch_the_device_refuses_names_the_operator(variant, monkeypatch):
    p = problem("normal", 2, 33, torch.float32)
    cuda_host.force(monkeypatch, logprob_kernels, (1056, 1))
    with pytest.raises(RuntimeError, match=r"token_logprobs: invalid launch: .* 1056 threads"):
        token_logprobs(p.logits, p.labels, backend="cuda")
    with pytest.raises(ValueError, match="too few arguments"):
        native.load("_cuda").module.sparse_kl(0, 0, 1)


@from_source
def test_every_launch_names_the_operator_it_belongs_to(variant, monkeypatch):
    """Also of several kernels: a device without shared memory refuses them all."""
    monkeypatch.setenv("MDK_SHIM_DEVICE", "90,4,16")
    p = problem("normal", 2, 33, torch.float32)
    sparse = (p.targets.row_offsets, p.targets.token_ids, p.targets.probs, p.labels, -100)
    with pytest.raises(RuntimeError, match=r"sparse_kl.*: invalid launch"):
        loss_kernels.loss_grad_(p.logits, *sparse, 0.5, "mean")
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"knn_targets.*: invalid launch"):
        knn_targets(torch.rand(2, 3), ids, ids[0], temperature=1.0, backend="cuda")
