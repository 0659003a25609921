"""knn_targets by the GPU kernels: on a GPU, interpreted, or compiled for the host.

Small cases, since a thread or an interpreted step is slow; a GPU runs the large ones too.
"""

import math

import pytest
import torch
from helpers import variants
from test_knn_targets import assert_equal, case, check, oracle

from mdkernels import BackendUnavailable, SparseTargets, knn_targets

OP = "knn_targets"
pytestmark = pytest.mark.interpreted
KERNELS = [v for v in variants(OP) if v.backend in ("triton", "cuda")]
MARKS = {"cuda": [pytest.mark.gpu], "cpu": []}


@pytest.fixture(params=[pytest.param(v, id=str(v), marks=MARKS[v.device]) for v in KERNELS])
def kernel(request):
    return request.param


def run(kernel, distances, ids, values, temperature=3.0, exclude_ids=None) -> SparseTargets:
    tensors = [None if t is None else t.to(kernel.device) for t in (distances, ids, values)]
    if exclude_ids is not None:
        exclude_ids = exclude_ids.to(kernel.device)
    options = {"temperature": temperature, "exclude_ids": exclude_ids, "backend": kernel.backend}
    got = knn_targets(*tensors, **options)
    return SparseTargets(got.row_offsets.cpu(), got.token_ids.cpu(), got.probs.cpu())


# 1 and 2 keys a thread, whole and partial tiles, one warp and several, one and two launches of
# the final sort.
@pytest.mark.parametrize(
    ("rows", "neighbors", "vocab", "excludes"),
    [(1, 1, 5, False), (3, 37, 60, True), (2, 64, 9, False), (2, 65, 60, True), (1, 300, 2000, 1)],
)
def test_matches_the_loop(kernel, poisoned_memory, rows, neighbors, vocab, excludes):
    distances, ids, values, exclude = case(rows, neighbors, max(400, vocab), vocab)
    exclude = exclude if excludes else None
    got = run(kernel, distances, ids, values, exclude_ids=exclude)
    check(got, oracle(distances, ids, values, 3.0, exclude))


@pytest.mark.parametrize(
    ("neighbors", "vocab"), [(1024, 47), (1024, 50257), (3001, 900), (4096, 100)]
)
def test_long_rows(kernel, neighbors, vocab):
    """Steps of the sort that leave a warp, then the block's other half."""
    if kernel.backend == "triton" and (kernel.device == "cpu" or neighbors > 1024):
        pytest.skip("minutes in the interpreter, where the compile gate builds it; or refused")
    distances, ids, values, exclude = case(2, neighbors, 50257, vocab)
    got = run(kernel, distances, ids, values, exclude_ids=exclude)
    check(got, oracle(distances, ids, values, 3.0, exclude))


def test_rows_beyond_the_largest_tile_are_refused_by_name(kernel):
    most = 1024 if kernel.backend == "triton" else 4096
    distances, ids, values, _ = case(1, most + 1)
    with pytest.raises(BackendUnavailable, match=f"at most {most} neighbours a row"):
        run(kernel, distances, ids, values)


def test_every_neighbor_a_token_of_its_own(kernel):
    """The final sort sees as many keys as neighbours, among them the largest token, and ties."""
    g = torch.Generator().manual_seed(0)
    values = torch.randperm(130, generator=g) * 1_000_003
    values[7] = 2**31 - 1
    distances = torch.randint(0, 9, (1, 130), generator=g).float()
    ids = torch.arange(130)[None]
    got = run(kernel, distances, ids, values, 2.0)
    assert got.nnz == 130
    want = oracle(distances, ids, values, 2.0)
    assert got.token_ids.sort().values.tolist() == sorted(want[0])
    order = sorted(zip((-got.probs).tolist(), got.token_ids.tolist(), strict=True))
    assert [token for _, token in order] == got.token_ids.tolist()
    for token, p in zip(got.token_ids.tolist(), got.probs.tolist(), strict=True):
        assert p == pytest.approx(want[0][token], rel=2e-6)


def test_widths_strides_and_repeated_runs_agree(kernel):
    distances, ids, values, exclude = case(2, 20)
    want = run(kernel, distances, ids, values, exclude_ids=exclude)
    for narrow_ids, narrow_values in ((ids.int(), values), (ids, values.int())):
        assert_equal(run(kernel, distances, narrow_ids, narrow_values, exclude_ids=exclude), want)
    wide = torch.full((2, 35), torch.nan, device=kernel.device)
    wide_ids = torch.full((2, 41), 10**12, device=kernel.device)
    wide[:, 2:22], wide_ids[:, 9:29] = distances.to(wide), ids.to(wide_ids)
    spread = torch.full((6,), 10**12)
    spread[::3] = exclude
    assert_equal(
        run(kernel, wide[:, 2:22], wide_ids[:, 9:29], values, exclude_ids=spread[::3]), want
    )
    # The order of the neighbours decides nothing, not even a rounding.
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = run(kernel, distances[:, order], ids[:, order], values, exclude_ids=exclude)
    assert_equal(shuffled, want)


def test_nothing_to_do(kernel):
    values = torch.arange(4)
    for rows, neighbors in ((0, 8), (3, 0)):
        distances = torch.empty(rows, neighbors)
        got = run(kernel, distances, distances.long(), values)
        assert got.row_offsets.tolist() == [0] * (rows + 1)
    missing = torch.full((2, 5), -1)
    got = run(kernel, torch.rand(2, 5), missing, torch.empty(0, dtype=torch.int32))
    assert got.row_offsets.tolist() == [0, 0, 0]


def test_rows_without_usable_neighbors_and_skipped_distances(kernel):
    inf, nan = math.inf, math.nan
    distances = torch.tensor([[1.0, nan], [nan, -inf], [inf, inf], [3.0, 1.0], [1e30, -3e38]])
    ids = torch.tensor([[1, -1], [-1, 2], [0, 1], [0, 2], [0, 1]])
    exclude = torch.tensor([1, 2, 7, -1, -1])
    got = run(kernel, distances, ids, torch.tensor([5, 6, 7]), 1.0, exclude)
    assert got.row_offsets.tolist() == [0, 0, 0, 0, 2, 3]
    assert got.token_ids.tolist() == [7, 5, 6]


def test_tiny_weights_and_duplicates(kernel):
    distances = torch.tensor([[0.0, 60.0, 85.0, 200.0, 85.0, 0.0]])
    ids = torch.tensor([[0, 1, 2, 3, 2, 0]])
    values = torch.tensor([9, 4, 8, 7])
    got = run(kernel, distances, ids, values, 1.0)
    assert got.token_ids.tolist() == [9, 4, 8]
    want = [1.0, math.exp(-60) / 2, math.exp(-85)]
    assert got.probs.tolist() == pytest.approx(want, rel=2e-5, abs=0)


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("ids", 12, r"neighbor_ids: row 1 has id 12, outside \[-1, 12\)"),
        ("ids", -(2**63), "neighbor_ids: row 1 has id -9223372036854775808"),
        ("distances", math.nan, "distances: row 1 has NaN or -inf for neighbour id 6"),
        ("distances", -math.inf, "distances: row 1 has NaN or -inf for neighbour id 6"),
        ("values", -5, "values: a neighbour of row 1 has token id -5"),
        ("values", 2**31, "values: a neighbour of row 1 has token id 2147483648"),
    ],
)
def test_faults_name_the_first_row(kernel, what, value, message):
    distances, ids, values = torch.rand(3, 4), torch.arange(12).reshape(3, 4), torch.arange(12)
    if what == "values":
        values[6] = value
    else:
        cells = ids if what == "ids" else distances
        cells[1, 2] = cells[2, 0] = value
    with pytest.raises(ValueError, match=message):
        run(kernel, distances, ids, values)
