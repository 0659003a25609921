"""DDP, FSDP2 and DTensor on two gloo processes: the gradients that one process gets alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import csr
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mdkernels import sparse_kl, token_logprobs

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)

WORLD, ROWS, WIDTH, VOCAB = 2, 12, 16, 203
CASES = ["ddp", "ddp_inplace", "ddp_bf16", "fsdp2", "fsdp2_inplace"]


class Head(nn.Module):
    """The loss inside the module that owns the LM head, where FSDP has gathered its weight."""

    def __init__(self, inplace=False, autocast=False):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.inplace, self.autocast = inplace, autocast

    def forward(self, hidden, targets, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.lm_head(self.body(hidden).tanh())
            return sparse_kl(logits, targets, labels, kl_weight=0.3, inplace=self.inplace).loss


def batch():
    """No ignored rows: then the mean over ranks of their means is the mean over all rows."""
    draw = torch.Generator().manual_seed(1)
    rows = [
        (torch.randint(VOCAB, (n,), generator=draw), torch.rand(n, generator=draw))
        for n in range(ROWS)
    ]
    hidden = torch.randn(ROWS, WIDTH, generator=draw)
    return hidden, csr(rows), torch.randint(VOCAB, (ROWS,), generator=draw)


def build(case: str) -> Head:
    torch.manual_seed(0)
    return Head(inplace=case.endswith("inplace"), autocast=case.endswith("bf16"))


def gradients(model) -> dict:
    """By name without wrappers, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name.removeprefix("module.")] = grad.clone()
    return found


def refused() -> list[str]:
    """What the operators say about a sharded and about a replicated DTensor."""
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    logits, (_, targets, labels) = torch.zeros(ROWS, VOCAB), batch()
    messages = []
    for placement in (Shard(1), Shard(0), Replicate()):
        sharded = distribute_tensor(logits, mesh, [placement])
        for call in (
            lambda z: sparse_kl(z, targets, labels),
            lambda z: token_logprobs(z, labels),
        ):
            try:
                call(sharded)
                messages.append("accepted")
            except TypeError as error:
                messages.append(str(error))
    return messages


def worker(rank: int, address: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=WORLD)
    hidden, targets, labels = batch()
    share = ROWS // WORLD
    mine = slice(rank * share, (rank + 1) * share)
    local = hidden[mine], targets.rows(mine.start, mine.stop), labels[mine]
    results = {}
    for case in CASES:
        model = build(case)
        if case.startswith("ddp"):
            model = DistributedDataParallel(model)
        else:
            fully_shard(model.lm_head)
            fully_shard(model)
        for _ in range(2):  # the second step would see what the first left in shared buffers
            model.zero_grad()
            model(*local).backward()
        results[case] = gradients(model)
    results["refused"] = refused()
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    context = mp.start_processes(
        worker,
        args=(str(folder / "rendezvous"), str(folder / "results.pt")),
        nprocs=WORLD,
        join=False,
        start_method="spawn",
    )
    for _ in range(24):
        if context.join(timeout=5):
            return torch.load(folder / "results.pt")
    for process in context.processes:
        process.kill()
    return pytest.fail("the two processes did not finish in two minutes")


@pytest.mark.parametrize("case", CASES)
def test_same_gradients_as_one_process(results, case):
    model = build(case)
    model(*batch()).backward()
    expected = gradients(model)
    found = results[case]
    assert found.keys() == expected.keys()
    # fp32 sums over 12 rows in another order; in bf16 each rank rounds its gradients before they
    # are averaged: 2^-8, and as much again for the terms that cancel.
    rounding = 2.0**-7 if case.endswith("bf16") else 16 * 2.0**-24
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        assert (found[name] - grad).abs().max() <= rounding * grad.abs().max()


def test_dtensor_is_refused_with_advice(results):
    assert len(results["refused"]) == 6
    for message in results["refused"]:
        assert message.startswith("logits: got a DTensor. Call the op inside the module that owns")
        assert "to_local" in message
