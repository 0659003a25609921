"""What decoding does differently on a GPU: models side by side on streams, a step replayed as one
CUDA graph, and a host that looks at results late instead of waiting for them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EVERY = 8  # steps between two looks at whether all rows have ended


class Streams:
    """Runs functions side by side, the first on the current stream, each other one on its own.

    Fork and join are events, so a capture follows them. Memory: what a side stream allocates is
    used again on that stream only, behind the next fork, so it may be freed once joined. What the
    main stream allocated must not be freed before the join, or the main stream could write over
    what a side stream still reads: static caches only, as a dynamic one drops its old keys.
    """

    def __init__(self, count: int, device: torch.device):
        self.side = [_side_stream(device, i) for i in range(count - 1)]

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        main = torch.cuda.current_stream()
        fork, joins, results = main.record_event(), [], []
        for call, stream in zip(calls[1:], self.side, strict=True):
            with torch.cuda.stream(stream):
                stream.wait_event(fork)
                results.append(call())
                joins.append(stream.record_event())
        results.insert(0, calls[0]())
        for join in joins:
            main.wait_event(join)
        return results


@functools.cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same in every call: each stream keeps a workspace of cuBLAS (32 MiB on a Hopper GPU) and
    freed blocks of its own."""
    return torch.cuda.Stream(device)


class Captured:
    """A function without arguments as a CUDA graph.

    The first call runs it as it is, which warms up what may not happen in a capture (loading
    kernels, allocating workspaces); the second captures it, and replays, as every later one.
    It must read and write tensors of fixed addresses only; what it does in Python happens twice.
    Nothing that it allocates is read afterwards, so graphs that replay one at a time can share a
    `pool` of memory (`torch.cuda.graph_pool_handle()`).
    """

    def __init__(self, function: Callable[[], None], pool: tuple[int, int]):
        self.function, self.pool = function, pool
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.warm:
            self.warm = True
            self.function()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    self.function()
            except RuntimeError as error:
                raise RuntimeError(
                    "this model's step cannot be captured in a CUDA graph; pass cuda_graph=False"
                ) from error
            self.graph = graph
        self.graph.replay()


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and the event behind which it has arrived."""
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    return copy, torch.cuda.current_stream().record_event()


class LateWatch:
    """Tells if all rows have ended, and shows tokens, without keeping the device waiting.

    Whether all rows ended is copied to the host every EVERY steps and looked at EVERY steps later,
    when it has long arrived: decoding runs at most 2 * EVERY - 1 steps too far, and the host never
    queues more than that. With `emit`, tokens are shown one step late and end the loop at once.
    """

    def __init__(self, ended: Tensor, eos: Tensor | None, emit: Callable[[Tensor], None] | None):
        self.ended, self.emit = ended, emit
        self.eos = None if eos is None else eos.cpu()
        self.calls = 0
        self.asked: tuple[Tensor, torch.cuda.Event] | None = None
        self.late: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.shown_end = torch.zeros(len(ended), dtype=torch.bool)

    def __call__(self, newest: Tensor) -> bool:
        """`newest`: (B,) on the device. Whether to stop."""
        if self.emit is not None:
            self.late.append(to_host(newest))
            if len(self.late) > 1:
                self._show()
            return self.over
        self.calls += 1
        if self.eos is None or self.calls % EVERY:
            return False
        if self.asked is not None:
            answer, arrived = self.asked
            arrived.synchronize()
            if bool(answer):
                return True
        self.asked = to_host(self.ended.all())
        return False

    @property
    def over(self) -> bool:
        return bool(self.shown_end.all())

    def _show(self) -> None:
        tokens, arrived = self.late.popleft()
        arrived.synchronize()
        if not self.over:
            self.emit(tokens)
        if self.eos is not None:
            self.shown_end |= torch.isin(tokens, self.eos)

    def close(self) -> None:
        """Show what is still to be shown."""
        while self.late:
            self._show()
