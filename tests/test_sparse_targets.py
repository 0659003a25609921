"""SparseTargets: construction, conversion, selection, and what it refuses."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from helpers import csr, dense_probs, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mdkernels import SparseTargets

ROWS = [([4, 0], [0.75, 0.25]), ([], []), ([2, 2, 5], [0.5, 0.25, 0.25]), ([5], [1.0])]


def make(offsets=(0, 2, 2), ids=(1, 0), probs=(0.5, 0.5), dtypes=()):
    return SparseTargets(
        torch.tensor(offsets, dtype=dict(dtypes).get("offsets", torch.int64)),
        torch.tensor(ids, dtype=dict(dtypes).get("ids", torch.int32)),
        torch.tensor(probs, dtype=dict(dtypes).get("probs", torch.float32)),
    )


def listed(targets: SparseTargets):
    bounds = targets.row_offsets.tolist()
    pairs = list(zip(targets.token_ids.tolist(), targets.probs.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(bounds)]


def test_what_it_says_about_itself():
    targets = csr(ROWS)
    assert (targets.num_rows, len(targets), targets.nnz) == (4, 4, 6)
    assert targets.device == torch.device("cpu")
    assert repr(targets) == "SparseTargets(rows=4, nnz=6, probs=torch.float32, device=cpu)"
    assert targets.row_ids().tolist() == [0, 0, 2, 2, 2, 3]
    assert targets.validate(6) is targets


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"offsets": torch.int32}, r"row_offsets: expected torch.int64, got torch.int32"),
        ({"ids": torch.int64}, r"token_ids: expected torch.int32, got torch.int64"),
        ({"probs": torch.int64}, r"probs: expected .*float16.*got torch.int64"),
    ],
)
def test_dtypes(dtypes, message):
    with pytest.raises(TypeError, match=message):
        make(probs=(1, 0), dtypes=dtypes)


def test_shapes():
    ids, probs = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    offsets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"token_ids has 4 entries, probs 3"):
        SparseTargets(offsets, ids, probs[:3])
    with pytest.raises(ValueError, match=r"row_offsets: needs N\+1 >= 1 entries, got 0"):
        SparseTargets(offsets[:0], ids, probs)
    with pytest.raises(ValueError, match=r"token_ids: expected a contiguous vector.*\(2, 2\)"):
        SparseTargets(offsets, ids.view(2, 2), probs.view(2, 2))
    with pytest.raises(ValueError, match=r"probs: expected a contiguous vector.*strides \(2,\)"):
        SparseTargets(offsets, ids[:2], probs[::2])
    with pytest.raises(ValueError, match=r"probs: on meta, but row_offsets on cpu"):
        SparseTargets(offsets, ids, probs.to("meta"))
    with pytest.raises(TypeError, match=r"probs: expected a torch.Tensor, got list"):
        SparseTargets(offsets, ids, [0.0] * 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": (1, 2, 2)}, r"row_offsets: must start at 0, got 1"),
        ({"offsets": (0, 2, 1)}, r"row_offsets: must ascend, but row 1 ends at 1"),
        ({"offsets": (0, 1, 1)}, r"row_offsets: must end at the number of token_ids, .* ends at 1"),
        ({"offsets": (0, 2, 3)}, r"row_offsets: must end at .* ends at 3"),
        ({"ids": (1, 6)}, r"token_ids: row 0 has id 6, outside \[0, 6\); is the tokenizer"),
        ({"ids": (1, -1)}, r"token_ids: row 0 has id -1"),
        ({"probs": (0.5, -0.1)}, r"probs: row 0 has -0.1.*expected finite, >= 0"),
        ({"probs": (0.5, float("nan"))}, r"probs: row 0 has nan"),
        ({"probs": (float("inf"), 0.5)}, r"probs: row 0 has inf"),
    ],
)
def test_validate(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields).validate(6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator within it returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_validate_needs_no_memory_per_entry(dtype):
    """Artefacts of 10^10 entries are validated where they are mapped."""
    probs = torch.full((3000,), 0.5, dtype=dtype)
    probs[7] = torch.finfo(dtype).max
    targets = SparseTargets(torch.tensor([0, 1000, 3000]), torch.arange(3000).int(), probs)
    with Largest() as largest:
        targets.validate(3000)
    assert largest.elements < 10
    with pytest.raises(ValueError, match="row 1 has id 2999, outside"):
        targets.validate(2999)


def test_validate_names_the_row_behind_empty_rows():
    targets = csr([([], []), ([], []), ([1], [1.0]), ([], []), ([9], [1.0])])
    with pytest.raises(ValueError, match="row 4 has id 9"):
        targets.validate(6)
    targets = csr([([], []), ([], []), ([1], [-1.0]), ([], [])])
    with pytest.raises(ValueError, match=r"row 2 has -1"):
        targets.validate(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_to_dense_and_back(dtype):
    targets = csr(ROWS, dtype)
    dense = targets.to_dense(6)
    assert dense.dtype == dtype
    assert torch.equal(dense.double(), dense_probs(targets, 6))
    back = SparseTargets.from_dense(dense)
    assert listed(back) == [[(0, 0.25), (4, 0.75)], [], [(2, 0.75), (5, 0.25)], [(5, 1.0)]]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 9), vocab=st.integers(1, 40))
def test_dense_round_trip(seed, rows, vocab):
    draw = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, vocab, generator=draw) * (
        torch.rand(rows, vocab, generator=draw) < 0.3
    )
    targets = SparseTargets.from_dense(dense).validate(vocab)
    assert torch.equal(targets.to_dense(vocab), dense)
    assert targets.nnz == int((dense != 0).sum())


def test_from_dense_keeps_what_must_not_vanish():
    """NaN is not zero: it has to reach the loss or validate()."""
    targets = SparseTargets.from_dense(torch.tensor([[0.0, float("nan")], [-0.5, 0.0]]))
    assert targets.nnz == 2
    with pytest.raises(ValueError, match="row 0 has nan"):
        targets.validate(2)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(3), ValueError, r"probs: expected shape \(rows, vocab\), got \(3,\)"),
        ([[1.0]], TypeError, r"probs: expected a torch.Tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, r"probs: expected .*got torch.int64"),
    ],
)
def test_from_dense_refuses(value, error, message):
    with pytest.raises(error, match=message):
        SparseTargets.from_dense(value)


def test_from_padded():
    ids = torch.tensor([[4, 0, -100], [7, 7, 7], [2, 2, 5]])
    probs = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    expected = [[(4, 0.75), (0, 0.25)], [], [(2, 0.5), (2, 0.25), (5, 0.25)]]
    assert listed(SparseTargets.from_padded(ids, probs)) == expected
    assert listed(SparseTargets.from_padded(ids.int(), probs)) == expected
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.bool)
    masked = SparseTargets.from_padded(ids, probs, mask)
    assert listed(masked) == [[(4, 0.75)], [(7, 0.0)], [(2, 0.25), (5, 0.25)]]
    none = SparseTargets.from_padded(ids[:0], probs[:0])
    assert (none.num_rows, none.nnz) == (0, 0)


def test_from_padded_keeps_what_must_not_vanish():
    nan = SparseTargets.from_padded(torch.tensor([[1, 2]]), torch.tensor([[float("nan"), 0.5]]))
    with pytest.raises(ValueError, match="row 0 has nan"):
        nan.validate(3)


@pytest.mark.parametrize(
    ("ids", "probs", "mask", "error", "message"),
    [
        (
            [[1, 2]],
            [[0.5]],
            None,
            ValueError,
            r"ids, probs: expected one shape .*\(1, 2\).*\(1, 1\)",
        ),
        ([1, 2], [0.5, 0.5], None, ValueError, r"ids, probs: expected one shape"),
        (
            [[1, 2]],
            [[0.5, 0.5]],
            [[1, 0]],
            ValueError,
            r"mask: expected bool \(1, 2\), got .*int64",
        ),
        ([[1, 2]], [[0.5, 0.5]], [[True]], ValueError, r"mask: expected bool \(1, 2\)"),
        ([[1.7, 2.0]], [[0.5, 0.5]], None, TypeError, r"ids: expected integers, got torch.float32"),
        ([[2**32 + 5, 1]], [[0.5, 0.5]], None, ValueError, r"ids: 4294967301 does not fit int32"),
        ([[-(2**40), 1]], [[0.5, 0.5]], None, ValueError, r"ids: .* does not fit int32"),
    ],
)
def test_from_padded_refuses(ids, probs, mask, error, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(error, match=message):
        SparseTargets.from_padded(torch.tensor(ids), torch.tensor(probs), mask)


def test_from_padded_refuses_lists():
    with pytest.raises(TypeError, match=r"ids: expected a torch.Tensor, got list"):
        SparseTargets.from_padded([[1, 2]], torch.ones(1, 2))


def test_padding_beyond_int32_does_not_count():
    targets = SparseTargets.from_padded(torch.tensor([[2**40, 1]]), torch.tensor([[0.0, 1.0]]))
    assert listed(targets) == [[(1, 1.0)]]


def test_rows():
    targets = csr(ROWS)
    everything = listed(targets)
    for start in range(5):
        for stop in range(start, 5):
            part = targets.rows(start, stop)
            assert listed(part) == everything[start:stop]
            if part.nnz:
                assert (
                    part.probs.data_ptr()
                    == targets.probs[int(targets.row_offsets[start]) :].data_ptr()
                )
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(IndexError, match=rf"rows: \[{start}, {stop}\) is not within \[0, 4\)"):
            targets.rows(start, stop)


@settings(max_examples=60)
@given(picks=st.lists(st.integers(0, 7), max_size=20))
def test_select_by_number(picks):
    targets = problem(vocab=19).targets
    everything = listed(targets)
    rows = torch.tensor(picks, dtype=torch.int64)
    for chosen in (targets.select(rows), targets.select(rows.int())):
        assert listed(chosen) == [everything[i] for i in picks]
    mask = torch.zeros(8, dtype=torch.bool)
    mask[rows] = True
    assert listed(targets.select(mask)) == [everything[i] for i in sorted(set(picks))]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"rows: expected a mask of shape \(4,\), got \(3,\)",
        ),
        (
            torch.ones(4, dtype=torch.uint8),
            TypeError,
            r"rows: expected bool, int64 or int32, .*uint8",
        ),
        (torch.ones(2), TypeError, r"rows: expected bool, int64 or int32, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"rows: expected a vector.*\(2, 2\)"),
        (torch.tensor([0, 4]), IndexError, r"4 is out of bounds|outside"),
        ([0, 1], TypeError, r"rows: expected a torch.Tensor, got list"),
        (np.array([0]), TypeError, r"rows: expected a torch.Tensor, got ndarray"),
    ],
)
def test_select_refuses(rows, error, message):
    with pytest.raises(error, match=message):
        csr(ROWS).select(rows)


def test_negative_row_numbers_count_from_the_end():
    targets = csr(ROWS)
    assert listed(targets.select(torch.tensor([-1, -4]))) == [
        listed(targets)[3],
        listed(targets)[0],
    ]


@pytest.mark.parametrize(
    "broken",
    [
        make(offsets=(0, 5, 5)),
        make(offsets=(0, 2, 1)),
        make(ids=(1, -1)),
        make(ids=(1, 6)),
        make(offsets=(1, 2, 2)),
    ],
)
def test_to_dense_does_not_guess(broken):
    """-1 must not land in the last column."""
    with pytest.raises(ValueError, match=r"targets\.(row_offsets|token_ids)"):
        broken.to_dense(6)


def test_empty():
    targets = SparseTargets.empty(3).validate(5)
    assert (targets.num_rows, targets.nnz) == (3, 0)
    assert not targets.to_dense(5).any()
    assert SparseTargets.empty(0).num_rows == 0


def test_moves_copies_and_pickles():
    targets = csr(ROWS)
    assert listed(targets.to("cpu")) == listed(targets)
    assert targets.to("meta").device.type == "meta"
    assert listed(copy.deepcopy(targets)) == listed(targets)
    assert listed(pickle.loads(pickle.dumps(targets))) == listed(targets)


@pytest.mark.gpu
def test_pin_memory():
    pinned = csr(ROWS).pin_memory()
    assert all(t.is_pinned() for t in (pinned.row_offsets, pinned.token_ids, pinned.probs))
    assert listed(pinned.to("cuda", non_blocking=True).to("cpu")) == listed(csr(ROWS))


def test_fields_cannot_be_rebound():
    with pytest.raises(AttributeError):
        csr(ROWS).probs = torch.zeros(6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_cat_is_the_inverse_of_rows(cuts):
    targets = csr(ROWS)
    bounds = [0, *sorted(cuts), 4]
    pieces = [targets.rows(a, b) for a, b in itertools.pairwise(bounds)]
    joined = SparseTargets.cat(pieces)
    assert listed(joined) == listed(targets)
    assert joined.probs.data_ptr() != targets.probs.data_ptr()


def test_cat_widens_probabilities_and_needs_a_piece():
    joined = SparseTargets.cat([csr(ROWS, torch.float16), csr(ROWS)])
    assert joined.probs.dtype == torch.float32
    assert listed(joined) == 2 * listed(csr(ROWS))
    with pytest.raises(ValueError, match="pieces: expected one or more"):
        SparseTargets.cat([])


@pytest.mark.parametrize("value", ["a", None, 1.5, [3], torch.zeros(2)])
def test_arguments_of_the_wrong_type(value):
    targets = csr(ROWS)
    for method in (targets.validate, targets.to_dense):
        with pytest.raises(TypeError, match="vocab_size: expected an integer >= 0, got"):
            method(value)
    with pytest.raises(TypeError, match="num_rows: expected an integer >= 0, got"):
        SparseTargets.empty(value)
    with pytest.raises(TypeError, match="rows: expected two integers, got"):
        targets.rows(0, value)
    with pytest.raises(TypeError, match=r"pieces: expected (a list of )?SparseTargets, got"):
        SparseTargets.cat(value)
    with pytest.raises(ValueError, match="num_rows: expected an integer >= 0, got -1"):
        SparseTargets.empty(-1)
    with pytest.raises(TypeError, match=r"probs: expected a torch\.Tensor, got NoneType"):
        SparseTargets.from_padded(torch.zeros(1, 2).long(), None)
