"""Files of the authors' code: what is read back is what was written, and damage is never silent."""

import sys

import numpy as np
import pytest
import torch

from mdkernels import SparseTargets, knn_targets
from mdkernels.artifact import ArtifactError
from mdkernels.integrations import official

pa = pytest.importorskip("pyarrow", reason="the authors' files need pyarrow")

TARGETS = pa.schema(
    [
        ("id_cnt", pa.int32()),
        ("token_id", pa.list_(pa.int32())),
        ("prob", pa.list_(pa.float16())),
        ("label", pa.int32()),
    ]
)


def write_stream(path, schema, batches):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for columns in batches:
            arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return path


def rows_of(ids, probs, labels):
    probs = [np.array(row, np.float16) for row in probs]
    return [len(row) for row in ids], ids, probs, labels


@pytest.fixture
def two_batches(tmp_path):
    """Three rows as the authors' script writes them: fp16, zeros kept, sums off."""
    return write_stream(
        tmp_path / "knn_gpt2_train_8.arrow",
        TARGETS,
        [
            rows_of([[7, 3, 9], [4]], [[0.6, 0.3, 0.0], [1.0]], [3, 4]),
            rows_of([[50000, 2]], [[0.5, 0.25]], [2]),
        ],
    )


@pytest.fixture
def targets():
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(200).repeat(40, 1)
    ids[5] = -1  # a row without neighbours
    return knn_targets(
        torch.rand(40, 200, generator=g) * 90,
        ids,
        torch.randint(0, 300, (200,), generator=g),
        temperature=9.0,
    )


def test_reads_what_the_authors_write(two_batches):
    targets, labels = official.read_targets(two_batches)
    assert targets.row_offsets.tolist() == [0, 2, 3, 5]
    assert targets.token_ids.tolist() == [7, 3, 4, 50000, 2]
    assert labels.tolist() == [3, 4, 2]
    assert labels.dtype == torch.int64
    a, b = float(np.float16(0.6)), float(np.float16(0.3))
    expected = torch.tensor([a / (a + b), b / (a + b), 1.0, 2 / 3, 1 / 3], dtype=torch.float64)
    assert torch.equal(targets.probs, expected.float())


def test_a_row_of_zeros_and_a_row_without_entries_are_empty(tmp_path):
    path = write_stream(
        tmp_path / "t.arrow", TARGETS, [rows_of([[1, 2], [], [3]], [[0, 0], [], [0.25]], [1, 2, 3])]
    )
    targets, _ = official.read_targets(path)
    assert targets.row_offsets.tolist() == [0, 0, 0, 1]
    assert targets.probs.tolist() == [1.0]


def test_round_trip(tmp_path, targets):
    labels = torch.arange(40) * 1000
    official.write_targets(tmp_path / "t.arrow", targets, labels)
    again, labels_again = official.read_targets(tmp_path / "t.arrow")
    assert torch.equal(labels, labels_again)
    dense, dense_again = targets.to_dense(300), again.to_dense(300)
    # One rounding to fp16: half a step of 2^-10, or of 2^-24 below the normal numbers.
    torch.testing.assert_close(dense_again, dense, rtol=2**-10, atol=2**-25)
    sums = dense_again.double().sum(1)
    filled = targets.row_offsets.diff() > 0
    torch.testing.assert_close(sums[filled], torch.ones_like(sums[filled]), rtol=0, atol=3e-7)
    # A second trip changes nothing but the last fp16 digit that renormalising may move.
    official.write_targets(tmp_path / "t.arrow", again, labels, overwrite=True)
    third, _ = official.read_targets(tmp_path / "t.arrow")
    torch.testing.assert_close(third.to_dense(300), dense_again, rtol=2**-10, atol=2**-24)


def test_written_files_have_the_authors_schema(tmp_path, targets, monkeypatch):
    monkeypatch.setattr(official, "_BATCH_ROWS", 7)
    official.write_targets(tmp_path / "t.arrow", targets, torch.arange(40))
    with pa.memory_map(str(tmp_path / "t.arrow")) as source:
        table = pa.ipc.open_stream(source).read_all()
    assert table.schema.equals(TARGETS)
    assert table.num_rows == 40
    assert table["id_cnt"].to_pylist() == [len(row) for row in table["token_id"].to_pylist()]
    assert min(p for row in table["prob"].to_pylist() for p in row) > 0
    for row in table["prob"].to_pylist():
        assert row == sorted(row, reverse=True)
    again, _ = official.read_targets(tmp_path / "t.arrow")
    assert again.num_rows == 40


def test_a_row_of_any_mass_keeps_its_shape(tmp_path):
    """Masses far from 1 would flush to zero, or overflow, in fp16."""
    probs = torch.tensor([3e-9, 1e-9, 3e9, 1e9], dtype=torch.float64)
    targets = SparseTargets(torch.tensor([0, 2, 4]), torch.tensor([1, 2, 1, 2]).int(), probs)
    official.write_targets(tmp_path / "t.arrow", targets, torch.tensor([1, 2]))
    again, _ = official.read_targets(tmp_path / "t.arrow")
    assert again.probs.tolist() == [0.75, 0.25, 0.75, 0.25]


def test_no_rows(tmp_path):
    official.write_targets(tmp_path / "t.arrow", SparseTargets.empty(0), torch.empty(0).long())
    targets, labels = official.read_targets(tmp_path / "t.arrow")
    assert (targets.num_rows, targets.nnz, len(labels)) == (0, 0, 0)


def test_write_refuses(tmp_path, targets):
    path = tmp_path / "t.arrow"
    labels = torch.zeros(40).long()
    with pytest.raises(ValueError, match=r"labels: expected int64 \(40,\).*\(39,\)"):
        official.write_targets(path, targets, labels[1:])
    labels[3] = -100
    with pytest.raises(ValueError, match="labels: row 3 has -100"):
        official.write_targets(path, targets, labels)
    twice = SparseTargets(torch.tensor([0, 1, 4]), torch.tensor([5, 5, 6, 5]).int(), torch.ones(4))
    with pytest.raises(ValueError, match="row 1 has token 5 more than once"):
        official.write_targets(path, twice, torch.tensor([1, 2]))
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"kept")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        official.write_targets(path, targets, torch.zeros(40).long())
    with pytest.raises(ValueError, match="more than once"):
        official.write_targets(path, twice, torch.tensor([1, 2]), overwrite=True)
    assert path.read_bytes() == b"kept"


# --- datastores -----------------------------------------------------------------------------------


def datastore_schema(dim):
    return pa.schema([("keys", pa.list_(pa.float16(), dim)), ("vals", pa.int32())])


def test_reads_a_datastore(tmp_path):
    keys = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float16)
    path = write_stream(
        tmp_path / "dstore_gpt2_train_3.arrow",
        datastore_schema(3),
        [(list(keys[:2]), [4, 5]), (list(keys[2:]), [6, 7, 2**31 - 1])],
    )
    got, values = official.read_datastore(path)
    assert torch.equal(got, torch.from_numpy(keys))
    assert values.tolist() == [4, 5, 6, 7, 2**31 - 1]
    assert values.dtype == torch.int32
    parts = list(official.iter_datastore(path))
    assert [len(part) for part, _ in parts] == [2, 3]
    assert not parts[0][0].flags.writeable
    assert np.array_equal(np.concatenate([part for part, _ in parts]), keys)


def test_an_empty_datastore_knows_its_width(tmp_path):
    keys, values = official.read_datastore(
        write_stream(tmp_path / "d.arrow", datastore_schema(6), [])
    )
    assert tuple(keys.shape) == (0, 6)
    assert len(values) == 0


@pytest.mark.parametrize(("number", "value"), [(0, np.nan), (3, np.inf)])
def test_a_key_that_is_not_finite_is_refused(tmp_path, number, value):
    keys = np.zeros((5, 3), np.float16)
    keys[number, 1] = value
    path = write_stream(tmp_path / "d.arrow", datastore_schema(3), [(list(keys), [1] * 5)])
    with pytest.raises(ArtifactError, match=f"row {number} has {value} in column 'keys'"):
        official.read_datastore(path)


def test_a_negative_value_is_refused(tmp_path):
    keys = np.zeros((4, 3), np.float16)
    path = write_stream(tmp_path / "d.arrow", datastore_schema(3), [(list(keys), [1, 2, -1, 3])])
    with pytest.raises(ArtifactError, match="row 2 has -1 in column 'vals'"):
        official.read_datastore(path)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            [("token_id", pa.list_(pa.int32()))],
            "'id_cnt' of type int32, found the columns token_id",
        ),
        (
            [("id_cnt", pa.int32()), ("token_id", pa.list_(pa.int64()))],
            "'token_id' of type list<int32>, found .* id_cnt: int32, token_id: list<int64>",
        ),
        ([("id_cnt", pa.int32())] * 2, "one column 'id_cnt'"),
        ([], r"found the columns \(none\)"),
    ],
)
def test_another_schema_is_refused(tmp_path, schema, message):
    path = write_stream(tmp_path / "t.arrow", pa.schema(schema), [])
    with pytest.raises(ArtifactError, match=message):
        official.read_targets(path)


def test_the_two_kinds_are_not_mixed_up(tmp_path, two_batches):
    with pytest.raises(ArtifactError, match="'keys' of type fixed_size_list<halffloat>"):
        official.read_datastore(two_batches)
    store = write_stream(tmp_path / "d.arrow", datastore_schema(2), [])
    with pytest.raises(ArtifactError, match="found the columns keys: fixed_size_list<halffloat>"):
        official.read_targets(store)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([2], [[1]], [[1.0]], [1]), "row 0 has 1 entries in token_id and 2 by id_cnt"),
        (([1, 1], [[1], [2]], [[1.0], [0.5, 0.5]], [1, 1]), "row 1 has 1 .* and 2 by prob"),
        (
            ([1, 2], [[1], [2, -3]], [[1.0], [0.5, 0.5]], [1, 1]),
            "row 1 has -3 in column 'token_id'",
        ),
        (([1, 1], [[1], [2]], [[1.0], [-0.5]], [1, 1]), "row 1 has -0.5 in column 'prob'"),
        (([1], [[1]], [[np.inf]], [1]), "row 0 has inf in column 'prob'"),
        (([1], [[1]], [[np.nan]], [1]), "row 0 has nan in column 'prob'"),
        (([1], [[1]], [[1.0]], [-100]), "row 0 has -100 in column 'label'"),
        (([None], [[1]], [[1.0]], [1]), "column 'id_cnt' has a null in record batch 2"),
        (([1], [None], [[1.0]], [1]), "column 'token_id' has a null"),
        (([1], [[None]], [[1.0]], [1]), "column 'token_id' has a null"),
    ],
)
def test_impossible_rows_are_refused(tmp_path, rows, message):
    count, ids, probs, labels = rows
    probs = [np.array(row, np.float16) for row in probs]
    good = rows_of([[1]], [[1.0]], [1])
    path = write_stream(tmp_path / "t.arrow", TARGETS, [good, (count, ids, probs, labels)])
    message = message.replace("row 1", "row 2").replace("row 0", "row 1")
    with pytest.raises(ArtifactError, match=message):
        official.read_targets(path)


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        official.read_targets(tmp_path / "none.arrow")
    for content in (b"", b"x", b"not an arrow file at all", bytes(64)):
        (tmp_path / "t.arrow").write_bytes(content)
        with pytest.raises(ArtifactError, match="truncated or altered"):
            official.read_targets(tmp_path / "t.arrow")


def test_every_truncation_is_noticed(two_batches):
    data = two_batches.read_bytes()
    for size in sorted({*range(0, len(data), 8), *range(0, len(data), 29)}):
        two_batches.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            official.read_targets(two_batches)


def test_extended_files_are_refused(two_batches):
    data = two_batches.read_bytes()
    for extra in (b"\0", data, b"\xff\xff\xff\xff\0\0\0\0"):
        two_batches.write_bytes(data + extra)
        with pytest.raises(ArtifactError, match="truncated or altered"):
            official.read_targets(two_batches)


def test_altered_files_give_an_error_or_valid_targets(two_batches):
    data = two_batches.read_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= (0x01, 0x80, 0xFF)[position % 3]
        two_batches.write_bytes(altered)
        try:
            targets, labels = official.read_targets(two_batches)
        except ArtifactError:
            continue
        targets.validate(2**31 - 1)
        assert len(labels) == targets.num_rows


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch, tmp_path, targets):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (
        lambda: official.read_targets(tmp_path / "t.arrow"),
        lambda: official.read_datastore(tmp_path / "t.arrow"),
        lambda: official.write_targets(tmp_path / "t.arrow", targets, torch.zeros(40).long()),
    ):
        with pytest.raises(ImportError, match=r"pip install 'mdkernels\[official\]'"):
            call()
