"""Targets that other software made: used as they are, compared with the corpus row by row."""

import io

import numpy as np
import pytest
import torch
import train_fixtures
from pipeline_fixtures import tiny_model
from tqdm import tqdm
from train_fixtures import config, same, steps, weights

from mdkernels import SparseTargets
from mdkernels.artifact import ArtifactError
from mdkernels.integrations import official
from mdkernels.target_rows import LabelledTargets
from mdkernels.targets import open_targets
from mdkernels.train import train

data = train_fixtures.data


@pytest.fixture
def pair(data):
    corpus, targets = data
    labels = torch.from_numpy(corpus.token_ids[1:].astype(np.int64))
    return targets.rows(0, targets.num_rows), labels


def test_a_pair_trains_as_the_artefact_does(data, pair, tmp_path):
    from_artefact = train(config(data, tmp_path / "a", max_steps=3))
    from_pair = train(config((data[0], pair), tmp_path / "b", max_steps=3))
    assert same(weights(from_artefact.model), weights(from_pair.model))
    assert [row["kl"] for row in steps(from_artefact)] == [row["kl"] for row in steps(from_pair)]


def test_the_authors_file_trains(data, pair, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "knn_llama_train_32.arrow"
    official.write_targets(path, *pair)
    stored = official.read_targets(path)
    from_file = train(config((data[0], path), tmp_path / "a", max_steps=2))
    from_pair = train(config((data[0], stored), tmp_path / "b", max_steps=2))
    assert same(weights(from_file.model), weights(from_pair.model))


@pytest.mark.parametrize("row", [0, 100, -1])
def test_a_label_that_differs_is_named_before_the_first_step(data, pair, tmp_path, row):
    targets, labels = pair
    found = row % targets.num_rows
    for later in {found, targets.num_rows - 1}:
        labels[later] = (labels[later] + 1) % data[0].vocab_size
    message = (
        rf"row {found} is the first that differs, its label is {int(labels[found])}, "
        rf"the next token of the corpus {int(data[0].token_ids[found + 1])}\."
    )
    with pytest.raises(ArtifactError, match=message):
        train(config((data[0], (targets, labels)), tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_rows_missing_or_shifted_are_named(data, pair):
    corpus, (targets, labels) = data[0], pair
    rows = targets.num_rows
    short = LabelledTargets(targets.rows(0, rows - 2), labels[:-2])
    with pytest.raises(
        ArtifactError,
        match=rf"they have {rows - 2} rows, the corpus {rows}; row {rows - 2} is the first that "
        "only one",
    ):
        short.check_corpus(corpus)
    # One row left out in the middle: everything behind it belongs one row further on.
    middle = torch.arange(rows) != 50
    first = int((labels[51:] != labels[50:-1]).nonzero()[0, 0]) + 50
    shifted = LabelledTargets(targets.select(middle), labels[middle])
    with pytest.raises(ArtifactError, match=rf": row {first} is the first that differs"):
        shifted.check_corpus(corpus)


def test_values_outside_the_vocabulary_are_refused(data, pair):
    targets, labels = pair
    for name, value, message in (
        ("token_ids", data[0].vocab_size, f"{data[0].vocab_size}"),
        ("probs", float("nan"), "nan"),
    ):
        fields = {f: getattr(targets, f).clone() for f in ("row_offsets", "token_ids", "probs")}
        fields[name][7] = value
        with pytest.raises(ArtifactError, match=rf"do not fit corpus artefact.*{message}"):
            LabelledTargets(SparseTargets(**fields), labels).check_corpus(data[0])


def test_content_decides_over_identity(pair):
    targets, labels = pair
    first, again = (LabelledTargets(targets, labels.clone()) for _ in range(2))
    assert first.content_id == again.content_id
    probs = targets.probs.clone()
    probs[3] += 1e-3
    changed = SparseTargets(targets.row_offsets, targets.token_ids, probs)
    assert LabelledTargets(changed, labels).content_id != first.content_id
    assert open_targets(first) is first
    assert open_targets((targets, labels)).content_id == first.content_id


def test_what_is_no_pair_is_refused(pair):
    targets, labels = pair
    with pytest.raises(TypeError, match=r"expected a pair .* got 3 values"):
        open_targets((targets, labels, labels))
    with pytest.raises(TypeError, match=r"got \(Tensor, SparseTargets\)"):
        open_targets((labels, targets))
    with pytest.raises(ValueError, match=r"labels must be int64 .* got torch.int32"):
        open_targets((targets, labels.int()))
    with pytest.raises(ValueError, match="one next token per row"):
        open_targets((targets, labels[1:]))


def test_an_interrupted_run_on_other_targets_is_not_continued(data, pair, tmp_path):
    targets, labels = pair
    settings = {"save_every": 2, "eval_every": 3, "max_steps": 6}

    def stop(_model, _step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config((data[0], pair), tmp_path / "out", **settings), on_eval=stop)
    fewer = SparseTargets(targets.row_offsets, targets.token_ids, targets.probs * 0.5)
    with pytest.raises(ArtifactError, match=r"inputs.targets is .* there and"):
        train(config((data[0], (fewer, labels)), tmp_path / "out", **settings))
    model = tiny_model("llama", seed=3)
    resumed = train(config((data[0], pair), tmp_path / "out", model=model, **settings))
    assert [row["step"] for row in steps(resumed)] == list(range(1, 7))


def test_an_imported_file_is_an_artefact_of_its_corpus(data, pair, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(official, "_BATCH_ROWS", 100)  # several record batches
    corpus, (targets, labels) = data[0], pair
    path = tmp_path / "knn.arrow"
    official.write_targets(path, targets, labels)
    bars = []

    def bar(**options):
        bars.append(tqdm(**options | {"disable": False, "file": io.StringIO()}))
        return bars[0]

    monkeypatch.setattr(official, "tqdm", bar)
    imported = official.import_targets(path, corpus, tmp_path / "targets")
    read, _ = official.read_targets(path)
    assert imported.num_rows == corpus.num_rows == bars[0].total == bars[0].n
    for name in ("row_offsets", "token_ids", "probs"):
        assert torch.equal(getattr(imported.rows(0, corpus.num_rows), name), getattr(read, name))
    from_file = train(config((corpus, path), tmp_path / "a", max_steps=2))
    from_artefact = train(config((corpus, str(imported.path)), tmp_path / "b", max_steps=2))
    assert same(weights(from_file.model), weights(from_artefact.model))


def test_a_file_of_other_rows_is_not_imported(data, pair, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(official, "_BATCH_ROWS", 100)
    corpus, (targets, labels) = data[0], pair
    path, out, rows = tmp_path / "knn.arrow", tmp_path / "targets", corpus.num_rows

    def refused(targets, labels, message):
        official.write_targets(path, targets, labels, overwrite=True)
        with pytest.raises(ArtifactError, match=message):
            official.import_targets(path, corpus, out)
        assert [p.name for p in tmp_path.iterdir()] == ["knn.arrow"]

    other = labels.clone()
    other[150] = (other[150] + 1) % corpus.vocab_size
    refused(targets, other, "row 150 is the first that differs")
    refused(targets.rows(0, rows - 5), labels[:-5], f"{rows - 5} rows, the corpus {rows}; row")
    twice = SparseTargets(
        torch.cat([targets.row_offsets, targets.row_offsets[1:] + targets.nnz]),
        targets.token_ids.repeat(2),
        targets.probs.repeat(2),
    )
    refused(twice, labels.repeat(2), f"they have {2 * rows} rows, the corpus {rows}; row {rows} is")
    ids = targets.token_ids.clone()
    ids[targets.row_offsets[203]] = corpus.vocab_size
    wide = SparseTargets(targets.row_offsets, ids, targets.probs)
    refused(wide, labels, f"row 203 has token {corpus.vocab_size}, not below vocab_size")
