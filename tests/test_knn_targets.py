"""knn_targets against a loop over Python floats, on every backend and instruction set."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdkernels import SparseTargets, knn_targets
from mdkernels.ops import native

extension = native.load("_cpu").module
ISAS = extension.supported_isas() if extension else []
needs_cpu = pytest.mark.skipif(extension is None, reason="the CPU extension is not built")
TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    if request.param == "reference":
        yield "reference"
        return
    extension.set_isa(request.param)
    yield "cpu"
    extension.set_isa("auto")


def oracle(distances, neighbor_ids, values, temperature, exclude_ids=None):
    """One {token: probability} per row, in double precision."""
    result = []
    for row, (ds, ids) in enumerate(
        zip(distances.double().tolist(), neighbor_ids.tolist(), strict=True)
    ):
        own = None if exclude_ids is None else int(exclude_ids[row])
        pairs = [
            (d, int(values[i]))
            for d, i in zip(ds, ids, strict=True)
            if i != -1 and i != own and d != math.inf
        ]
        merged = {}
        nearest = min((p[0] for p in pairs), default=0.0)
        for d, token in pairs:
            weight = math.exp((nearest - d) / temperature)
            merged[token] = merged.get(token, 0.0) + weight
        total = math.fsum(merged.values())
        result.append({token: weight / total for token, weight in merged.items()})
    return result


def check(targets: SparseTargets, expected):
    """Same distributions, each row sorted, each row's fp32 sum within rounding of 1."""
    targets.validate(2**31 - 1)
    assert targets.num_rows == len(expected)
    assert targets.probs.dtype == torch.float32
    for row, want in enumerate(expected):
        got = targets.rows(row, row + 1)
        ids, probs = got.token_ids.tolist(), got.probs.tolist()
        assert len(set(ids)) == len(ids)
        assert list(zip(probs, ids, strict=True)) == sorted(
            zip(probs, ids, strict=True), key=lambda pair: (-pair[0], pair[1])
        )
        # Below 1e-34 a token may lose neighbours that underflow one by one.
        assert {t for t, p in want.items() if p > 1e-34} <= set(ids) <= set(want)
        for token, p in zip(ids, probs, strict=True):
            assert p >= TINY
            # fp32: half an ulp of the exponent t, relative to t itself, then of the result.
            relative = 1.5e-7 * (4 - math.log(want[token]))
            if want[token] > 1e-34:
                assert p == pytest.approx(want[token], rel=relative, abs=0)
        if want:
            assert math.fsum(probs) == pytest.approx(1.0, abs=6e-8 * (1 + len(probs) / 16))


def case(rows, neighbors, entries=400, vocab=60, seed=0, missing=0.1):
    g = torch.Generator().manual_seed(seed)
    distances = torch.rand(rows, neighbors, generator=g) * 60
    ids = torch.randint(0, entries, (rows, neighbors), generator=g)
    ids[torch.rand(rows, neighbors, generator=g) < missing] = -1
    values = (torch.randn(entries, generator=g).abs() * vocab / 3).long().clamp(max=vocab - 1)
    exclude = torch.randint(0, entries, (rows,), generator=g)
    exclude[: rows // 2] = ids[: rows // 2, neighbors // 3]
    return distances, ids, values, exclude


@pytest.mark.parametrize(
    ("rows", "neighbors", "vocab"),
    [
        (1, 1, 5),
        (5, 3, 5),
        (40, 37, 60),
        (9, 128, 3),
        (7, 1024, 47),
        (5, 1024, 50257),
        (3, 129, 1),
        (2, 3001, 900),
    ],
)
def test_matches_the_loop(backend, rows, neighbors, vocab):
    entries = max(400, vocab)
    distances, ids, values, exclude = case(rows, neighbors, entries, vocab)
    for excluded in (None, exclude):
        got = knn_targets(
            distances, ids, values, temperature=3.0, exclude_ids=excluded, backend=backend
        )
        check(got, oracle(distances, ids, values, 3.0, excluded))


def test_many_distinct_tokens_stay_sorted(backend):
    """Every neighbour a token of its own: the sort sees up to K keys, with many ties."""
    for neighbors in (63, 64, 65, 127, 129, 300, 1000):
        g = torch.Generator().manual_seed(neighbors)
        distances = torch.randint(0, 9, (4, neighbors), generator=g).float()
        values = torch.randperm(neighbors, generator=g) * 1_000_003
        ids = torch.arange(neighbors).repeat(4, 1)
        got = knn_targets(distances, ids, values, temperature=2.0, backend=backend)
        assert got.nnz == 4 * neighbors
        check(got, oracle(distances, ids, values, 2.0))


def test_integer_widths_agree(backend):
    distances, ids, values, exclude = case(20, 50)
    arguments = {"temperature": 5.0, "exclude_ids": exclude, "backend": backend}
    want = knn_targets(distances, ids, values, **arguments)
    for narrow_ids in (ids, ids.int()):
        for narrow_values in (values, values.int()):
            assert_equal(knn_targets(distances, narrow_ids, narrow_values, **arguments), want)


def assert_equal(a: SparseTargets, b: SparseTargets) -> None:
    assert torch.equal(a.row_offsets, b.row_offsets)
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.probs, b.probs)


def test_no_rows_no_neighbors_no_values(backend):
    empty = torch.empty(0, 8)
    got = knn_targets(empty, empty.long(), torch.arange(4), temperature=1.0, backend=backend)
    assert got.row_offsets.tolist() == [0]
    nothing = torch.empty(3, 0)
    got = knn_targets(nothing, nothing.long(), torch.arange(4), temperature=1.0, backend=backend)
    assert got.row_offsets.tolist() == [0, 0, 0, 0]
    missing = torch.full((2, 5), -1)
    values = torch.empty(0, dtype=torch.int32)
    got = knn_targets(torch.rand(2, 5), missing, values, temperature=1.0, backend=backend)
    assert got.row_offsets.tolist() == [0, 0, 0]


def test_a_row_without_usable_neighbors_is_empty(backend):
    distances = torch.tensor([[1.0, 2.0], [1.0, 2.0], [torch.inf, torch.inf], [3.0, 1.0]])
    ids = torch.tensor([[1, 1], [-1, 2], [0, 1], [0, 2]])
    exclude = torch.tensor([1, 2, 7, -1])
    got = knn_targets(
        distances,
        ids,
        torch.tensor([5, 6, 7]),
        temperature=1.0,
        exclude_ids=exclude,
        backend=backend,
    )
    assert got.row_offsets.tolist() == [0, 0, 0, 0, 2]
    assert got.token_ids.tolist() == [7, 5]


def test_own_row_is_left_out_by_id_wherever_it_ranks(backend):
    values = torch.tensor([3, 3, 4, 8])
    distances = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 3.0]])
    ids = torch.tensor([[0, 2, 1], [0, 3, 2]])
    got = knn_targets(
        distances, ids, values, temperature=1.0, exclude_ids=torch.tensor([1, 0]), backend=backend
    )
    # Row 0 loses its last neighbour and keeps the token that entry 0 shares with it; row 1 loses
    # its second nearest, which happens to come first.
    check(
        got,
        [
            {3: 1 / (1 + math.exp(-1)), 4: 1 / (1 + math.e)},
            {8: 1 / (1 + math.exp(-2)), 4: 1 / (1 + math.exp(2))},
        ],
    )


def test_skipped_neighbors_may_hold_any_distance(backend):
    distances = torch.tensor([[torch.nan, 1.0, -torch.inf, 3.4e38]])
    ids = torch.tensor([[-1, 1, 0, -1]])
    got = knn_targets(
        distances,
        ids,
        torch.tensor([5, 6]),
        temperature=1.0,
        exclude_ids=torch.tensor([0]),
        backend=backend,
    )
    assert got.token_ids.tolist() == [6]
    assert got.probs.tolist() == [1.0]


def test_extreme_distances_and_temperatures(backend):
    values = torch.tensor([9, 4, 7])
    ids = torch.tensor([[0, 1, 2]])

    def run(distances, temperature):
        got = knn_targets(
            torch.tensor([distances]), ids, values, temperature=temperature, backend=backend
        )
        return dict(zip(got.token_ids.tolist(), got.probs.tolist(), strict=True))

    assert run([1e30, 1e30, 1e30], 1.0) == pytest.approx({4: 1 / 3, 7: 1 / 3, 9: 1 / 3})
    assert run([1e30, 2e30, torch.inf], 1.0) == {9: 1.0}
    assert run([-3e38, 3e38, 0.0], 16.0) == {9: 1.0}
    assert run([0.0, torch.inf, 0.0], 1e30) == {7: 0.5, 9: 0.5}
    assert run([0.0, 1e-3, 0.0], 1e-30) == {7: 0.5, 9: 0.5}
    assert run([0.0, 85.0, 200.0], 1.0) == pytest.approx({9: 1.0, 4: math.exp(-85)}, rel=2e-5)
    # The nearest sets the scale: a large common offset costs no accuracy.
    assert run([1e6, 1e6 + 1, 1e6 + 2], 1.0) == pytest.approx(run([0.0, 1.0, 2.0], 1.0), rel=1e-7)


def test_equal_probabilities_sort_by_token(backend):
    values = torch.tensor([50, 3, 900, 7, 3, 2**31 - 1])
    ids = torch.tensor([[5, 2, 0, 3, 1]])
    got = knn_targets(torch.full((1, 5), 2.5), ids, values, temperature=1.0, backend=backend)
    assert got.token_ids.tolist() == [3, 7, 50, 900, 2**31 - 1]


def test_duplicate_ids_count_as_often_as_they_occur(backend):
    got = knn_targets(
        torch.zeros(1, 4),
        torch.tensor([[0, 0, 0, 1]]),
        torch.tensor([2, 1]),
        temperature=1.0,
        backend=backend,
    )
    assert got.token_ids.tolist() == [2, 1]
    assert got.probs.tolist() == [0.75, 0.25]


def test_order_of_neighbors_does_not_matter(backend):
    distances, ids, values, exclude = case(30, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    arguments = {"temperature": 4.0, "exclude_ids": exclude, "backend": backend}
    a = knn_targets(distances, ids, values, **arguments)
    b = knn_targets(
        distances[:, order].contiguous(), ids[:, order].contiguous(), values, **arguments
    )
    torch.testing.assert_close(a.to_dense(60), b.to_dense(60), rtol=2e-7, atol=0)


def test_strided_rows_and_untouched_inputs(backend):
    distances, ids, values, exclude = case(11, 40)
    wide = torch.full((11, 55), torch.nan)
    wide_ids = torch.full((11, 61), 10**12)
    wide[:, 2:42], wide_ids[:, 9:49] = distances, ids
    spread = torch.full((33,), 10**12)
    spread[::3] = exclude
    before = wide.clone(), wide_ids.clone()
    arguments = {"temperature": 4.0, "backend": backend}
    a = knn_targets(wide[:, 2:42], wide_ids[:, 9:49], values, exclude_ids=spread[::3], **arguments)
    assert_equal(a, knn_targets(distances, ids, values, exclude_ids=exclude, **arguments))
    assert torch.equal(wide.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(wide_ids, before[1])


@needs_cpu
def test_thread_count_does_not_change_a_bit():
    distances, ids, values, exclude = case(301, 90)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                knn_targets(
                    distances, ids, values, temperature=2.0, exclude_ids=exclude, backend="cpu"
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal(results[0], other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_any_neighbors(data):
    rows = data.draw(st.integers(0, 4))
    neighbors = data.draw(st.integers(0, 40))
    entries = data.draw(st.integers(1, 30))
    distance = st.one_of(
        st.floats(0, 100, width=32), st.sampled_from([0.0, 1.0, 1e30, math.inf, -1e-6])
    )
    cells = rows * neighbors
    distances = torch.tensor(
        data.draw(st.lists(distance, min_size=cells, max_size=cells)), dtype=torch.float32
    ).reshape(rows, neighbors)
    ids = torch.tensor(
        data.draw(st.lists(st.integers(-1, entries - 1), min_size=cells, max_size=cells)),
        dtype=torch.int64,
    ).reshape(rows, neighbors)
    values = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**31 - 2), min_size=entries, max_size=entries))
    )
    exclude = torch.tensor(
        data.draw(st.lists(st.integers(-1, entries), min_size=rows, max_size=rows)),
        dtype=torch.int64,
    )
    temperature = data.draw(st.floats(0.05, 100))
    expected = oracle(distances, ids, values, temperature, exclude)
    for name in ("reference", "cpu") if extension else ("reference",):
        got = knn_targets(
            distances, ids, values, temperature=temperature, exclude_ids=exclude, backend=name
        )
        check(got, expected)


@needs_cpu
def test_works_in_a_forked_child():
    distances, ids, values, _ = case(64, 50)
    want = knn_targets(distances, ids, values, temperature=2.0, backend="cpu")
    child = os.fork()
    if child == 0:
        got = knn_targets(distances, ids, values, temperature=2.0, backend="cpu")
        os._exit(0 if torch.equal(got.probs, want.probs) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_opcheck(backend):
    distances, ids, values, exclude = case(6, 12)
    for arguments in (
        (distances, ids, values, 2.0, exclude, backend),
        (distances, ids.int(), values.int(), 2.0, None, backend),
    ):
        torch.library.opcheck(torch.ops.mdk.knn_targets_forward.default, arguments)


@pytest.mark.slow
def test_compiles_to_one_graph():
    distances, ids, values, exclude = case(12, 30)

    def build(distances, ids, values, exclude):
        targets = knn_targets(distances, ids, values, temperature=2.0, exclude_ids=exclude)
        return targets.row_offsets, targets.token_ids, targets.probs

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
        for rows in (12, 7):
            arguments = (distances[:rows], ids[:rows], values, exclude[:rows])
            for got, want in zip(compiled(*arguments), build(*arguments), strict=True):
                assert torch.equal(got, want)


def test_gradients_are_not_promised(backend):
    distances, ids, values, _ = case(3, 5)
    got = knn_targets(distances.requires_grad_(), ids, values, temperature=1.0, backend=backend)
    assert not got.probs.requires_grad


def test_a_datastore_larger_than_the_caches(backend):
    """The kernel prefetches the values of the next row once they are this many."""
    entries = 5 << 20
    generator = torch.Generator().manual_seed(2)
    values = (torch.arange(entries) * 7919 % 50257).int()
    ids = torch.randint(0, entries, (9, 300), generator=generator)
    ids[:, 5::3] = ids[:, 5::3] % 4 * 50257  # few tokens, so that they repeat
    ids[4, 7] = -1
    distances = torch.rand(9, 300, generator=generator) * 40
    got = knn_targets(distances, ids, values, temperature=3.0, backend=backend)
    check(got, oracle(distances, ids, values, 3.0))
