"""Which rows a step reads: against a loop over rows, epochs, prefetching, stores beyond memory."""

import contextlib
import itertools
import json
import re
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from mdkernels import SparseTargets, artifact
from mdkernels.batches import WindowBatches
from mdkernels.corpus import windows
from mdkernels.prefetch import Prefetcher
from mdkernels.target_rows import TargetRows
from mdkernels.targets import TargetStore, open_targets

CPU = torch.device("cpu")
VOCAB = 997


def ragged(rows, seed=0, dtype=np.float32) -> SparseTargets:
    """Rows of 0 to 40 entries, every fifth empty; fp16 sums are off by its rounding."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 41, rows) * (np.arange(rows) % 5 != 3)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    probs = rng.random(offsets[-1]) + 1e-3
    sums = np.array([probs[a:b].sum() for a, b in itertools.pairwise(offsets)])
    probs = (probs / np.repeat(sums, counts)).astype(dtype)
    ids = rng.integers(0, VOCAB, offsets[-1]).astype(np.int32)
    return SparseTargets(torch.from_numpy(offsets), torch.from_numpy(ids), torch.from_numpy(probs))


def make(rows=500, block=32, stride=16, *, seed=0, dtype=np.float32) -> WindowBatches:
    tokens = np.random.default_rng(7).integers(0, VOCAB, rows + 1).astype(np.uint16)
    stored = ragged(rows, dtype=dtype)
    targets = TargetRows(stored, normalize=dtype == np.float16)
    spans = windows(rows, block, stride)
    data = WindowBatches(tokens, spans, block, seed=seed, targets=targets)
    data.stored = stored
    return data


def check(data, batch, spans, size):
    """The batch holds every row of `spans`, one at a time and by definition."""
    row = 0
    assert batch.input_ids.shape == (size, data.length)
    offsets, stored = batch.targets.row_offsets.tolist(), data.stored
    flat = batch.input_ids.flatten()
    for window, (start, stop) in enumerate(spans):
        first = stop - data.length
        assert batch.input_ids[window].tolist() == data.token_ids[first:stop].tolist()
        for r in range(start, stop):
            place = row if batch.scored is None else int(batch.scored[row])
            assert place // data.length == window
            assert int(flat[place]) == data.token_ids[r]
            assert int(batch.labels[row]) == data.token_ids[r + 1]
            part = slice(*stored.row_offsets[r : r + 2].tolist())
            mine = slice(*offsets[row : row + 2])
            assert batch.targets.token_ids[mine].tolist() == stored.token_ids[part].tolist()
            wanted = stored.probs[part].double()
            if stored.probs.dtype == torch.float16:
                wanted /= wanted.sum()
            torch.testing.assert_close(
                batch.targets.probs[mine].double(), wanted, rtol=1e-6, atol=0
            )
            row += 1
    assert row == len(batch.labels) == batch.targets.num_rows
    batch.targets.validate(VOCAB)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("rows", "block", "stride", "size"),
    [(300, 32, 16, 4), (97, 32, 32, 5), (33, 32, 1, 3), (20, 64, 7, 2), (1, 8, 4, 2)],
)
def test_batches_hold_what_a_loop_over_rows_finds(rows, block, stride, size, dtype):
    data = make(rows, block, stride, dtype=dtype)
    for first in range(0, len(data), size):
        stop = min(first + size, len(data))
        spans = data.spans[data.order(0)[first:stop]]
        check(data, data.take(first, stop, size), spans, size)


def test_fp16_targets_sum_to_one_again():
    data = make(dtype=np.float16)
    targets = data.take(0, len(data), len(data)).targets
    sums = torch.zeros(targets.num_rows).index_add_(0, targets.row_ids(), targets.probs)
    assert targets.probs.dtype == torch.float32
    filled = targets.row_offsets.diff() > 0
    assert (sums[filled] - 1).abs().max() < 1e-6
    assert (sums[~filled] == 0).all()
    assert (~filled).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_from_elsewhere_keep_their_dtype(dtype):
    stored = ragged(60)
    stored = SparseTargets(stored.row_offsets, stored.token_ids, stored.probs.to(dtype))
    spans = np.array([[40, 60], [3, 3], [0, 4], [2, 9]])
    found = TargetRows(stored).gather(spans)
    rows = torch.cat([torch.arange(a, b) for a, b in spans])
    wanted = stored.select(rows)
    assert torch.equal(found.row_offsets, wanted.row_offsets)
    assert torch.equal(found.token_ids, wanted.token_ids)
    assert found.probs.dtype == dtype
    assert torch.equal(found.probs, wanted.probs)


def test_no_window_gives_an_unscored_batch():
    """A process of several may have none left of the last batch."""
    data = make()
    batch = data.take(7, 7, 3)
    assert batch.input_ids.shape == (3, data.length)
    assert batch.labels.shape == (0,)
    assert batch.targets.num_rows == 0
    assert batch.select(torch.zeros(3, data.length, 8)).shape == (0, 8)


def test_parts_of_a_batch_are_the_batch():
    """What processes read of a batch, put together, is what one process reads."""
    data = make()
    whole = data.take(20, 26, 6)  # straddles the first two epochs
    parts = [data.take(20 + 2 * rank, 22 + 2 * rank, 2) for rank in range(3)]
    assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    assert torch.equal(torch.cat([p.input_ids for p in parts]), whole.input_ids)
    assert torch.equal(torch.cat([p.targets.probs for p in parts]), whole.targets.probs)


@pytest.mark.parametrize(("rows", "size"), [(500, 4), (500, 31), (500, 100), (20, 1), (20, 3)])
def test_a_resumed_run_reads_what_an_uninterrupted_one_would(rows, size):
    """Also where a batch straddles epochs, holds several of them, or the corpus is one window."""
    data, steps = make(rows), 9
    whole = [data.take(i * size, (i + 1) * size, size) for i in range(steps)]
    for resumed_at in (1, 4, 8):
        again = make(rows)
        for i in range(resumed_at, steps):
            batch = again.take(i * size, (i + 1) * size, size)
            assert all(map(torch.equal, batch.tensors(), whole[i].tensors()))
    # Every whole epoch visits every window once, whatever the size of a batch.
    count = len(data)
    ends = np.concatenate([data.picked(i * size, (i + 1) * size) for i in range(steps)])
    for epoch in range(steps * size // count):
        visited = ends[epoch * count : (epoch + 1) * count]
        assert sorted(map(tuple, visited)) == sorted(map(tuple, data.spans))


def test_order_depends_on_seed_and_epoch_alone():
    data = make()
    forward = [data.order(epoch).copy() for epoch in range(4)]
    backward = [data.order(epoch).copy() for epoch in (3, 0, 2, 1)]
    assert all(map(np.array_equal, forward, (backward[i] for i in (1, 3, 2, 0))))
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(forward[0], make(seed=1).order(0))


class LateCopies:
    """Stands for a GPU: the copy of a batch happens only when the batch is received, so that a
    buffer written again before then would show."""

    pin = False

    def __init__(self):
        self.threads, self.issued = set(), 0

    def issue(self, batch):
        self.threads.add(threading.current_thread())
        self.issued += 1
        return batch

    def receive(self, batch):
        return [tensor.clone() for tensor in batch.tensors()]


def ranges_of(count, size=3):
    return [(i * size, (i + 1) * size) for i in range(count)]


def test_prefetched_batches_are_those_of_take_in_order():
    data, copies = make(), LateCopies()
    wanted = [data.take(*pair, 3).tensors() for pair in ranges_of(40)]
    with Prefetcher(data, ranges_of(40), 3, CPU, ahead=4, copies=copies) as batches:
        found = list(batches)
    assert len(found) == 40
    assert all(all(map(torch.equal, a, b)) for a, b in zip(found, wanted, strict=True))
    assert threading.current_thread() not in copies.threads
    with Prefetcher(data, ranges_of(40), 3, CPU) as plain:
        found = [batch.tensors() for batch in plain]
    assert all(all(map(torch.equal, a, b)) for a, b in zip(found, wanted, strict=True))


def test_prefetching_stays_within_its_bound():
    data, copies = make(), LateCopies()
    asked = []

    def ranges():
        for pair in ranges_of(50):
            asked.append(pair)
            yield pair

    with Prefetcher(data, ranges(), 3, CPU, ahead=2, copies=copies) as batches:
        for taken in range(1, 6):
            next(batches)
            assert len(asked) <= taken + 2
    assert not any(thread.is_alive() for thread in copies.threads)
    assert list(batches) == []
    assert len(asked) < 10


def test_an_error_of_the_thread_arrives_in_its_place():
    data = make()
    pairs = [*ranges_of(2), ("here", "it breaks")]
    with Prefetcher(data, pairs, 3, CPU, copies=LateCopies()) as batches:
        assert len(next(batches)) == len(next(batches))
        for _ in range(2):  # and stays
            with pytest.raises(TypeError) as caught:
                next(batches)
    assert "picked" in "".join(traceback.format_exception(caught.value))


def test_an_exception_of_the_consumer_closes_the_thread():
    data, copies = make(), LateCopies()
    batches = Prefetcher(data, ranges_of(10_000), 3, CPU, copies=copies)
    with contextlib.suppress(KeyboardInterrupt), batches:
        next(batches)
        raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in copies.threads)
    batches.close()
    with pytest.raises(ValueError, match="ahead: must be at least 1"):
        Prefetcher(data, [], 3, CPU, ahead=0)


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def store_with_holes(path: Path, rows: int, each: int) -> TargetStore:
    """Targets of `rows` rows of `each` entries, in files without blocks but for the last three
    rows, which count from 0."""
    nnz = rows * each
    path.mkdir()
    (path / "row_offsets.bin").write_bytes((np.arange(rows + 1, dtype="<i8") * each).tobytes())
    for name, dtype in (("token_ids", "<i4"), ("probs", "<f4")):
        with open(path / f"{name}.bin", "wb") as stream:
            stream.truncate(nnz * 4)
            stream.seek((nnz - 3 * each) * 4)
            stream.write(np.arange(3 * each, dtype=dtype).tobytes())
    shapes = {"row_offsets": ("int64", rows + 1), "token_ids": ("int32", nnz)}
    shapes["probs"] = ("float32", nnz)
    meta = {
        "format": artifact.FORMAT,
        "version": artifact.VERSION,
        "kind": TargetStore.kind,
        "tokenizer_hash": "",
        "vocab_size": 1 << 20,
        "config": {"knn_temperature": 1.0},
        "arrays": {
            name: {
                "dtype": dtype,
                "shape": [length],
                "bytes": (path / f"{name}.bin").stat().st_size,
                "checksum": 0,
            }
            for name, (dtype, length) in shapes.items()
        },
        "files": {},
    }
    (path / artifact.META).write_text(json.dumps(meta | {"checksum": artifact.digest(meta)}))
    return open_targets(path)


def test_a_store_beyond_memory_is_read_by_row(tmp_path):
    """2^31 + 2^24 entries, 17 GB to whoever reads them whole; the last rows lie where an index of
    32 bits no longer reaches."""
    rows, each = (1 << 17) + 1024, 1 << 14
    assert rows * each > 1 << 31
    before = resident_bytes()
    targets = store_with_holes(tmp_path / "targets", rows, each)
    tokens = np.zeros(rows + 1, np.uint16)
    data = WindowBatches(tokens, windows(rows, 64, 32), 64, seed=0, targets=targets)
    last = data.gather(data.spans[-1:], 1)
    part = last.targets.rows(last.targets.num_rows - 3, last.targets.num_rows)
    assert torch.equal(part.token_ids, torch.arange(3 * each, dtype=torch.int32))
    assert torch.equal(part.probs, torch.arange(3 * each, dtype=torch.float32))
    for step in range(4):
        data.take(step, step + 1, 1)
    # Five windows of 32 rows: 20 MB of maps touched, and as much copied; read-ahead on top.
    assert resident_bytes() - before < 200e6
