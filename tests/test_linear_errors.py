"""Wrong arguments of the linear operators: errors that name the argument and the way out."""

import pytest
import torch
import torch.distributed as dist
from linear_fixtures import make_head
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

from mdkernels import SparseTargets, linear_sparse_kl, linear_token_logprobs


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_dtensor_is_refused_with_advice(one_process):
    head = make_head(rows=3)
    sharded = distribute_tensor(head.weight.detach(), one_process, [Replicate()])
    message = "weight: got a DTensor. Call the op inside the module that owns the LM head"
    with pytest.raises(TypeError, match=message):
        linear_sparse_kl(head.hidden, sharded, head.targets, head.labels)
    with pytest.raises(TypeError, match=message):
        linear_token_logprobs(head.hidden, torch.nn.Parameter(sharded), head.labels)
    bias = distribute_tensor(head.bias.detach(), one_process, [Replicate()])
    with pytest.raises(TypeError, match="bias: got a DTensor"):
        linear_sparse_kl(head.hidden, head.weight, head.targets, head.labels, bias=bias)


H, W, B = torch.zeros(4, 6), torch.zeros(33, 6), torch.zeros(33)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": H[0]}, ValueError, r"hidden: expected shape \(rows, width\), got \(6,\)"),
        ({"hidden": H[None]}, ValueError, r"hidden: .*\.flatten\(0, -2\)"),
        ({"hidden": H.int()}, TypeError, r"hidden: expected a floating point dtype"),
        ({"hidden": H.tolist()}, TypeError, r"hidden: expected a torch.Tensor, got list"),
        ({"hidden": H[:, :5]}, ValueError, r"weight: expected shape \(vocab, 5\).*@ weight.T"),
        ({"hidden": H.half()}, TypeError, r"weight: torch.float32, but hidden is torch.float16"),
        ({"weight": W[:0]}, ValueError, r"weight: expected shape \(vocab, width\), none 0"),
        ({"weight": W.t()}, ValueError, r"weight: expected shape \(vocab, 6\)"),
        ({"weight": W.to("meta")}, ValueError, r"weight: on meta, hidden on cpu"),
        ({"weight": W.to_sparse()}, TypeError, r"weight: expected a dense tensor"),
        ({"bias": B[:5]}, ValueError, r"bias: expected shape \(33,\), got \(5,\)"),
        ({"bias": B.double()}, TypeError, r"bias: torch.float64, but hidden is torch.float32"),
        ({"bias": 0.0}, TypeError, r"bias: expected a torch.Tensor, got float"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: .*one per row of hidden"),
        ({"labels": torch.zeros(4)}, TypeError, r"labels: expected int64"),
        ({"ignore_index": 0.5}, TypeError, r"ignore_index: expected an int"),
        ({"chunk_rows": 0}, ValueError, r"chunk_rows: expected at least 1, or None"),
        ({"chunk_rows": 2.0}, TypeError, r"chunk_rows: expected an int"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op", [linear_sparse_kl, linear_token_logprobs])
def test_wrong_arguments(op, change, error, message):
    arguments = {"hidden": H, "weight": W, "labels": torch.zeros(4).long(), **change}
    if op is linear_sparse_kl:
        arguments["targets"] = SparseTargets.empty(4)
    with pytest.raises(error, match=message):
        op(**arguments)


def test_targets_that_do_not_match():
    labels = torch.zeros(4).long()
    with pytest.raises(ValueError, match="targets: 3 rows for 4 rows of hidden"):
        linear_sparse_kl(H, W, SparseTargets.empty(3), labels)
    with pytest.raises(TypeError, match="targets: expected SparseTargets, got Tensor"):
        linear_sparse_kl(H, W, labels, labels)
    with pytest.raises(ValueError, match="labels: required unless kl_weight is 1"):
        linear_sparse_kl(H, W, SparseTargets.empty(4))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        linear_sparse_kl(H, W, SparseTargets.empty(4), labels, reduction="batchmean")
