"""knn_targets: neighbours to sparse distributions, against the official dense scatter with its loop
over rows (all rows at once, and 32 at a time as its script does) and a vectorised sort."""

import functools
from collections.abc import Iterator

import baselines
import floors
import torch
from cases import BASELINE, SUBJECT, Case, Goal, Provider, nbytes, require
from regimes import REGIMES
from torch import Tensor

import mdkernels
from mdkernels import SparseTargets

TEMPERATURE = 16.0
# N, K, V, R: R int32 values in the datastore are gathered from at random. Those of a few MB of text
# stay in cache; 64 MB of them do not, and then the misses are most of the kernel's time.
SHAPES = {
    "full": ((2048, 1024, 50257, 1 << 20), (2048, 1024, 50257, 1 << 24)),
    "smoke": ((33, 64, 1001, 4096),),
}
GOAL_ENTRIES = 1 << 20
GOALS = [("official_one_shot", 100), ("torch_sort", 12)]
# The official path stores fp16: half a step at 1 is 0.00024.
LIMITS = {"official_one_shot": 5e-4, "official_batches_of_32": 5e-4}
LIMIT = 1e-5


def synthetic(rows: int, k: int, vocab: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(distances, neighbor_ids, values). Entry i of the datastore holds token i % V. A row draws
    its neighbours from a few tokens of its own with Zipf weights; neighbour 0 is the row itself,
    which occurs only there (entries below V serve no other purpose)."""
    generator = torch.Generator().manual_seed(5)
    values = (torch.arange(entries) % vocab).int()
    spread = torch.empty(rows).log_normal_(3.67, 0.75, generator=generator).long() + 1
    own = torch.randint(0, vocab, (rows, int(spread.max())), generator=generator)
    draw = torch.rand(rows, k, generator=generator)
    rank = (spread[:, None] ** draw).long().clamp(max=own.shape[1]) - 1  # density ~ 1/rank
    block = torch.randint(1, entries // vocab, (rows, k), generator=generator)
    ids = own.gather(1, rank) + vocab * block
    ids[:, 0] = torch.arange(rows)
    distances = torch.rand(rows, k, generator=generator).sort(dim=1)[0] * 100 + 20
    distances[:, 0] = 0.0
    return distances, ids, values


def expected(distances, neighbor_ids, values, vocab: int, rows: slice) -> Tensor:
    """The dense distribution of some rows in float64."""
    own = torch.arange(len(distances))[rows, None]
    logits = (-distances[rows].double() / TEMPERATURE).masked_fill(
        neighbor_ids[rows] == own, float("-inf")
    )
    dense = torch.zeros(len(logits), vocab, dtype=torch.float64)
    return dense.scatter_add_(1, values[neighbor_ids[rows]].long(), logits.softmax(1))


def as_targets(result) -> SparseTargets:
    """The official list of (ids, probs) rows as SparseTargets."""
    if isinstance(result, SparseTargets):
        return result
    lengths = torch.tensor([0] + [len(ids) for ids, _ in result])
    ids = torch.cat([ids for ids, _ in result]).int()
    return SparseTargets(
        lengths.cumsum(0).to(ids.device), ids, torch.cat([probs for _, probs in result])
    )


def cases(suite: str) -> Iterator[Case]:
    for rows, k, vocab, entries in SHAPES[suite]:
        yield case(suite, rows, k, vocab, entries)


def case(suite: str, rows: int, k: int, vocab: int, entries: int) -> Case:
    distances, neighbor_ids, values = synthetic(rows, k, vocab, entries)
    wide = values.long()  # what torch can index with; converting is not charged to the baselines
    own = torch.arange(rows)
    official = (distances, neighbor_ids, wide, TEMPERATURE, vocab)
    ours = functools.partial(
        mdkernels.knn_targets,
        distances,
        neighbor_ids,
        values,
        temperature=TEMPERATURE,
        exclude_ids=own,
    )
    calls = {
        "mdkernels": ours,
        "official_one_shot": functools.partial(baselines.official_knn, *official),
        "official_batches_of_32": functools.partial(
            baselines.official_knn_batches, *official, size=32
        ),
        "torch_sort": functools.partial(
            baselines.sorted_knn, distances, neighbor_ids, wide, TEMPERATURE, own
        ),
    }
    nnz = ours().nnz

    def check():
        results = {name: as_targets(call()) for name, call in calls.items()}
        worst = dict.fromkeys(results, 0.0)
        for start in range(0, rows, 256):
            part = slice(start, min(start + 256, rows))
            wanted = expected(distances, neighbor_ids, wide, vocab, part)
            for name, found in results.items():
                dense = found.rows(part.start, part.stop).to_dense(vocab)
                worst[name] = max(worst[name], float((dense.double() - wanted).abs().max()))
        return {
            name: require(name, {"absolute": error}, {"absolute": LIMITS.get(name, LIMIT)})
            for name, error in worst.items()
        }

    providers = [
        Provider(name, call, SUBJECT if name == "mdkernels" else BASELINE)
        for name, call in calls.items()
    ]
    providers.append(floors.gather(distances, neighbor_ids, values))
    goals = [Goal("mdkernels", name, dict.fromkeys(REGIMES, n)) for name, n in GOALS]
    return Case(
        op="knn_targets",
        shape={"N": rows, "K": k, "V": vocab, "R": entries},
        dtype="fp32",
        providers=providers,
        check=check,
        bytes_moved=nbytes(distances, neighbor_ids) + 4 * rows * k + 8 * nnz,
        floor="distances and ids read in order, one value gathered per neighbour",
        goals=goals if entries == GOAL_ENTRIES else [],
        notes={"distinct_tokens_per_row": nnz / rows},
    )
