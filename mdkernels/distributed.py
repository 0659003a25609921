"""The processes of a training run: one, or those that torchrun or `accelerate launch` started.

Every process runs the same program on its own windows. Process 0 alone writes files. A model is
whole in every process under DDP and cut into DTensors under FSDP2; `gather` and `scatter` hide the
difference from checkpoints, whose format is therefore the same for all three.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .train_config import resolve_device

Result = TypeVar("Result")

# The others wait this long for process 0 to evaluate or save.
_PATIENCE = timedelta(hours=2)


class Processes:
    """Who takes part. `rank`, `count` and `device` of this process; `sharded` under FSDP2."""

    def __init__(self, device: str = "auto", parallel: str = "auto"):
        self.rank, self.count, self.sharded = 0, 1, False
        if _launched() == 1:
            if parallel != "auto":
                raise ValueError(
                    f"parallel {parallel!r} needs several processes and there is one: start with "
                    "`torchrun --nproc-per-node N -m mdkernels train ...`, or leave it out"
                )
            self.device = resolve_device(device)
            return
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"device {device!r}: with several processes each takes the device of its local "
                "rank; pass auto, cpu or cuda"
            )
        _refuse_what_would_be_ignored()
        on_cpu = resolve_device(device).type == "cpu"
        state = _accelerate().PartialState(cpu=on_cpu, timeout=_PATIENCE)
        self.rank, self.count = state.process_index, state.num_processes
        if self.count != _launched():
            raise ValueError(
                f"{_launched()} processes take part, but accelerate found {self.count}: start them "
                "with torchrun or `accelerate launch`, or set RANK, LOCAL_RANK, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT as those do"
            )
        self.device = state.device
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.sharded = parallel == "fsdp2" or (parallel == "auto" and fsdp)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on process 0 while the others wait; its (picklable) result on every process.

        An exception of process 0 ends the others with a RuntimeError that quotes it.
        """
        if self.count == 1:
            return work()
        answer: list[Any] = [None, None]
        try:
            if self.is_main:
                answer[0] = work()
        except BaseException as error:
            answer[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise RuntimeError(f"process 0 stopped with {answer[1]}")
        return answer[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over the processes, in place; nothing waits for the device."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def equalise(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of process 0."""
        if self.count > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def wrap(self, module: nn.Module, blocks: set[str]) -> nn.Module:
        """`module` with gradients averaged over the processes.

        Under FSDP2 every submodule of a class named in `blocks` is a unit, and what is left,
        embeddings and head, another. Parameters are then new objects: build the optimizer later.
        """
        if self.count == 1:
            return module
        if not self.sharded:
            # Buffers are constants here. torch 2.13 renames the option.
            known = inspect.signature(DistributedDataParallel).parameters
            names = ("forward_sync_buffers", "broadcast_buffers")
            constant = {next(name for name in names if name in known): False}
            return DistributedDataParallel(module, gradient_as_bucket_view=True, **constant)
        mesh = dist.init_device_mesh(self.device.type, (self.count,))
        for child in list(module.modules()):
            if type(child).__name__ in blocks:
                fully_shard(child, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    def scatter(self, whole: Tensor | None, like: Tensor) -> Tensor:
        """This process's part of a tensor that process 0 has whole, laid out as `like`."""
        if self.count == 1:
            return whole.to(like.device)
        here = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if self.is_main:
            here.copy_(whole)
        if isinstance(like, DTensor):
            return distribute_tensor(here, like.device_mesh, like.placements)
        dist.broadcast(here, src=0)
        return here


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have cut; every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def accumulating(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Forward and backward of one micro-batch; only the `last` one exchanges gradients."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def leave() -> None:
    """Close the process group, if there is one, at the end of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _launched() -> int:
    """Processes that take part, without starting anything."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _accelerate():
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(
            f"several processes, and trackers, need accelerate ({error}): pip install accelerate"
        ) from error
    return accelerate


def _refuse_what_would_be_ignored() -> None:
    """Settings of `accelerate launch` that this trainer has of its own or not at all."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise ValueError(
            f"accelerate's mixed_precision is {precision!r}: choose the arithmetic with "
            "--dtype (bfloat16) and launch with --mixed_precision no"
        )
    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("FSDP_OFFLOAD_PARAMS", "offloading parameters"),
    ):
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"{what} ({name}) is not supported here: launch for plain multi-GPU or FSDP2 "
                "without it"
            )
