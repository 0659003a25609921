"""Time until the targets of a batch are ready for the loss: ours against the authors' collate.

A batch is 16 windows of 1024 tokens that score 512 rows each (8192 rows), 65 entries a row on
average, V = 50257, read from memory-mapped files of 13 million entries in both formats.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import end_to_end
import machine
import official_loop
import synthetic_targets
import torch

FULL = {"rows": 200_000, "block": 1023, "scored": 512, "vocab": 50257}
SMOKE = {"rows": 1200, "block": 63, "scored": 32, "vocab": 1009}


def check(data, spans, ours) -> float:
    """Largest difference between the two targets of one batch: the authors' file is fp16."""
    dense, labels = official_loop.collate_targets(data.table, spans, data.vocab)
    dense /= dense.sum(dim=-1, keepdim=True)
    assert torch.equal(labels, ours.labels), "the two loaders read different rows"
    dense -= ours.targets.to_dense(data.vocab)
    difference = float(dense.abs().max())
    if not difference < 1e-3:
        raise AssertionError(f"the two loaders differ by {difference:.3g} in a probability")
    return difference


def main() -> None:
    parser = end_to_end.parser(__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=16, help="windows per batch")
    args = parser.parse_args()
    setting = dict(SMOKE if args.smoke else FULL)
    size = 4 if args.smoke else args.windows
    rounds = args.rounds or (2 if args.smoke else 5)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic_targets.make(Path(folder), **setting)
        measure(args, data, setting, size, rounds)


def measure(args, data, setting, size: int, rounds: int) -> None:
    batches, cuda = data.batches, args.device == "cuda"
    device = torch.device(args.device)
    steps = iter(range(10**9))

    def ours():
        first = next(steps) * size
        return batches.take(first, first + size, size, pin=cuda).to(device)

    def official():
        first = next(steps) * size
        spans = batches.picked(first, first + size)
        dense, labels = official_loop.collate_targets(data.table, spans, data.vocab)
        official_loop.collate_tokens(data.tokens, spans, data.block)
        return (dense.pin_memory() if cuda else dense).to(device), labels

    spans = batches.picked(0, size)
    batch = batches.gather(spans, size)
    difference = check(data, spans, batch)
    peaks = {"ours": machine.peak_increment(ours), "official": machine.peak_increment(official)}
    sampler = end_to_end.Sampler(args.device)
    for _ in range(5):
        ours()
    # Many of ours to a sample of theirs: the round takes the median of ours for its ratio.
    sampler.run({"official": official}, 1)
    per_round = 3 if args.smoke else 40
    ratios = []
    for _ in range(rounds - 1):
        sampler.run({"ours": ours}, per_round)
        middle = sorted(sampler.seconds["ours"][-per_round:])[per_round // 2]
        sampler.run({"official": official}, 1)
        ratios.append(sampler.seconds["official"][-1] / middle)
    ms = sampler.ms()
    median = ms["ours"]["median"]
    rows, nnz = batch.targets.num_rows, batch.targets.nnz
    end_to_end.write(
        args,
        "loader",
        setting=setting | {"windows": size, "scored_rows": rows, "entries": nnz},
        ms=ms,
        ratios={"official / ours": end_to_end.quantiles(ratios)},
        figures={
            "bytes_of_batch": {
                "ours": sum(t.numel() * t.element_size() for t in batch.tensors()),
                "official_dense": rows * data.vocab * 4,
            },
            "peak_increment_bytes": peaks,
            "largest_difference": difference,
        },
        goals=[end_to_end.goal("a batch is ready in under 2 ms", median, median < 2.0)],
    )


if __name__ == "__main__":
    main()
