"""Batches on the device before they are asked for.

A thread gathers batch t + 1 into pinned memory and queues its copy on a stream of its own while
step t runs. Nothing waits for the device:

    host memory     every batch is gathered into fresh pinned memory. torch's pinned allocator hands
                    a freed block out again only when the copies queued from it are done.
    device memory   the step's stream waits, on the device, for the event behind the copy, and the
                    allocator is told that the step's stream uses what the copy's stream allocated.

On a CPU there is nothing to hide: gathering takes under a millisecond of a step of seconds, and a
thread would only take a core from it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .batches import Batch, WindowBatches


class CudaCopies:
    """Copies on a side stream of `device`."""

    pin = True

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def issue(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Queue the copy of a pinned batch. Called by the thread."""
        with torch.cuda.stream(self._stream):
            return batch.to(self.device), self._stream.record_event()

    def receive(self, issued: tuple[Batch, torch.cuda.Event]) -> Batch:
        """Make the current stream wait for the copy. Called by the consumer."""
        batch, event = issued
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in batch.tensors():
            tensor.record_stream(current)
        return batch


class Prefetcher(Iterator[Batch]):
    """The batches `data.take(first, stop, size)` of all `ranges`, in that order, on `device`.

        with Prefetcher(data, ranges, size, device) as batches:
            for batch in batches:
                ...

    Args:
        data: where the batches come from. Until `close`, no other thread may change it.
        ranges: (first, stop) of every batch; a generator is read only as far as batches are made.
        size: windows per batch, short ones being filled up.
        device: a CPU makes each batch when it is asked for; a GPU has them made by a thread.
        ahead: batches that the thread makes before one is taken; each holds its pinned and its
            device memory.
        copies: how a batch reaches the device, with `pin`, `issue` and `receive` as in
            `CudaCopies`. Default: `CudaCopies` for a GPU, none for a CPU.

    An error of the thread is raised by the `next` that would have returned its batch, with the
    traceback of the thread. Leave the `with` block, or call `close`, to stop early.
    """

    def __init__(
        self,
        data: WindowBatches,
        ranges: Iterable[tuple[int, int]],
        size: int,
        device: torch.device,
        *,
        ahead: int = 2,
        copies: Any = None,
    ):
        if ahead < 1:
            raise ValueError(f"ahead: must be at least 1 batch, got {ahead}")
        if copies is None and device.type != "cpu":
            copies = CudaCopies(device)
        self._data, self._ranges, self._size, self._copies = data, iter(ranges), size, copies
        self._error: BaseException | None = None
        self._closed = False
        self._thread = None
        if copies is not None:
            self._room = threading.Semaphore(ahead)
            self._issued: queue.SimpleQueue = queue.SimpleQueue()
            # A daemon, so that a program that forgets `close` still ends.
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StopIteration
        if self._thread is None:
            first, stop = next(self._ranges)
            return self._data.take(first, stop, self._size)
        issued = self._issued.get()
        if isinstance(issued, BaseException):
            self._error = issued
            raise issued
        self._room.release()
        return self._copies.receive(issued)

    def close(self) -> None:
        """Stop the thread and drop what it has made; safe to repeat."""
        self._closed = True
        if self._thread is not None:
            self._room.release()
            self._thread.join()
            self._issued = queue.SimpleQueue()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                first, stop = next(self._ranges)  # StopIteration ends the consumer's loop likewise
                batch = self._data.take(first, stop, self._size, pin=self._copies.pin)
                self._issued.put(self._copies.issue(batch))
        except BaseException as error:
            self._issued.put(error)
