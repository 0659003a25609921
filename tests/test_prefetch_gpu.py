"""Prefetching on a GPU: the copies of a side stream against plain ones, without a host wait."""

import pytest
import torch
from test_batches import make, ranges_of

from mdkernels.prefetch import Prefetcher

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def test_batches_survive_a_busy_device_and_reuse_of_memory():
    """The step's stream lags far behind the thread, which meanwhile reuses pinned and device
    memory: a missing wait or a block handed out too early would change a sum."""
    data = make(rows=5000)
    pairs = ranges_of(120)
    wanted = [data.take(*pair, 3) for pair in pairs]
    found = []
    with Prefetcher(data, pairs, 3, DEVICE, ahead=3) as batches:
        for number, batch in enumerate(batches):
            if number % 10 == 0:
                torch.cuda._sleep(20_000_000)  # about 10 ms
            found.append(torch.stack([t.double().sum() for t in batch.tensors()]))
            del batch
    assert len(found) == len(wanted)
    for sums, batch in zip(found, wanted, strict=True):
        expected = torch.stack([t.double().sum() for t in batch.tensors()])
        torch.testing.assert_close(sums.cpu(), expected, rtol=1e-12, atol=0)


def test_taking_a_batch_does_not_wait_for_the_device():
    data = make(rows=2000)
    with Prefetcher(data, ranges_of(30), 3, DEVICE) as batches:
        next(batches)
        torch.cuda._sleep(400_000_000)  # a fifth of a second, at least
        behind = torch.cuda.current_stream().record_event()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                batch = next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not behind.query(), "ten batches took longer than the device was busy"
    assert batch.targets.device.type == "cuda"


def test_an_error_and_an_early_end_leave_no_thread():
    data = make()
    batches = Prefetcher(data, [*ranges_of(1), ("it", "breaks")], 3, DEVICE)
    with batches:
        next(batches)
        with pytest.raises(TypeError):
            next(batches)
    assert not batches._thread.is_alive()
    batches = Prefetcher(data, ranges_of(1000), 3, DEVICE)
    batches.close()
    assert not batches._thread.is_alive()
