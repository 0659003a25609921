"""Targets against a plain float64 loop, fp16 storage, temperatures, resume, and refusals."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
import torch
from pipeline_fixtures import (
    FAMILIES,
    require_shared_data,
    tiny_documents,
    tiny_model,
    tiny_tokenizer,
)

from mdkernels import targets as T
from mdkernels.artifact import ArtifactError, read_artifact
from mdkernels.artifact_writer import ArtifactWriter
from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.index import build_index, open_index
from mdkernels.models import load_tokenizer
from mdkernels.targets import build_targets, open_targets


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "corpus"
    return build_corpus(tiny_documents(3), tiny_tokenizer(), out, as_text=True)


@pytest.fixture(scope="module")
def store(corpus):
    return build_datastore(corpus, tiny_model("llama"), corpus.path.parent / "store", block=32)


@pytest.fixture(scope="module")
def index(store):
    return build_index(store, store.path.parent / "index")


def expected_rows(keys, values, num_neighbors, temperature):
    """Every row as {token: probability}, by the definition, one row and one neighbour at a time.

    None where the choice is open: repeated text gives equal keys, and with them ties at rank K.
    """
    keys = keys.astype(np.float64)
    for row, query in enumerate(keys):
        distances = ((keys - query) ** 2).sum(1)
        order = np.argsort(distances, kind="stable")
        last = distances[order[num_neighbors - 1 : num_neighbors + 1]]
        if len(last) == 2 and last[1] - last[0] < 1e-4:
            yield None
            continue
        nearest = [i for i in order[:num_neighbors] if i != row]
        weights = [math.exp(-(distances[i] - distances[nearest[0]]) / temperature) for i in nearest]
        tokens = {}
        for i, weight in zip(nearest, weights, strict=True):
            token = int(values[i])
            tokens[token] = tokens.get(token, 0.0) + weight / sum(weights)
        yield tokens


def check_rows(targets, expected, tolerance):
    row_targets = targets.rows(0, targets.num_rows)
    offsets = row_targets.row_offsets.tolist()
    expected = list(expected)
    assert len(expected) == targets.num_rows
    assert sum(wanted is None for wanted in expected) < 0.02 * len(expected)
    for row, wanted in enumerate(expected):
        if wanted is None:
            continue
        part = slice(offsets[row], offsets[row + 1])
        found = dict(
            zip(row_targets.token_ids[part].tolist(), row_targets.probs[part].tolist(), strict=True)
        )
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
        for token in found.keys() | wanted.keys():
            assert found.get(token, 0) == pytest.approx(wanted.get(token, 0), abs=tolerance), row


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [100, 4096])
def test_targets_follow_their_definition(corpus, tmp_path, family, batch_size):
    store = build_datastore(corpus, tiny_model(family), tmp_path / "s", block=32)
    index = build_index(store, tmp_path / "i")
    targets = build_targets(
        store, index, tmp_path / "t", num_neighbors=24, knn_temperature=5.0, batch_size=batch_size
    )
    assert targets.num_rows == corpus.num_rows
    check_rows(targets, expected_rows(store.keys, store.values, 24, 5.0), tolerance=2e-5)
    targets.check_corpus(corpus)
    wanted = {"corpus": corpus.content_id, "datastore": store.content_id, "index": index.content_id}
    assert targets.meta["inputs"] == wanted


@pytest.mark.parametrize("more", [50, 10**12])
def test_more_neighbours_than_rows(store, index, tmp_path, more):
    targets = build_targets(
        store, index, tmp_path / "t", num_neighbors=store.num_rows + more, knn_temperature=8.0
    )
    check_rows(
        targets, expected_rows(store.keys, store.values, store.num_rows, 8.0), tolerance=2e-5
    )


def test_row_slices(store, index, tmp_path):
    targets = build_targets(store, index, tmp_path / "t", num_neighbors=9)
    dense = targets.rows(0, targets.num_rows).to_dense(store.vocab_size)
    for start, stop in ((0, 0), (0, 1), (5, 17), (targets.num_rows - 3, targets.num_rows)):
        part = targets.rows(start, stop).validate(store.vocab_size)
        assert part.row_offsets[0] == 0
        torch.testing.assert_close(part.to_dense(store.vocab_size), dense[start:stop])
    whole = targets.rows(0, targets.num_rows)
    one = targets.rows(5, 6)
    shift = one.probs.data_ptr() - whole.probs.data_ptr()
    assert shift == 4 * whole.row_offsets[5]  # a view of the map, no copy
    for bad in ((-1, 2), (3, 2), (0, targets.num_rows + 1)):
        with pytest.raises(IndexError):
            targets.rows(*bad)
    assert open_targets(targets) is targets
    again = open_targets(str(tmp_path / "t"), verify=True)
    assert (again.num_rows, again.nnz) == (targets.num_rows, targets.nnz)


def test_half_precision_rows_are_normalised_again(store, index, tmp_path):
    options = {"num_neighbors": 200, "relative_temperature": 0.02, "batch_size": 77}
    exact = build_targets(store, index, tmp_path / "a", **options)
    half = build_targets(store, index, tmp_path / "b", probs_dtype="float16", **options)
    assert half.artifact.array("probs").dtype == np.float16
    assert (half.artifact.array("probs") > 0).all()
    assert half.nnz < exact.nnz  # what fp16 rounds to 0 is not stored
    rows = half.rows(3, half.num_rows)
    assert rows.probs.dtype == torch.float32
    dense = rows.to_dense(store.vocab_size)
    torch.testing.assert_close(dense.sum(1), torch.ones(len(dense)))
    wanted = exact.rows(3, exact.num_rows).to_dense(store.vocab_size)
    torch.testing.assert_close(dense, wanted, rtol=2e-3, atol=1e-6)


def test_temperature_is_absolute_or_relative(store, index, tmp_path):
    scale = store.mean_squared_distance()
    default = build_targets(store, index, tmp_path / "a", num_neighbors=9)
    relative = build_targets(
        store, index, tmp_path / "b", num_neighbors=9, relative_temperature=0.05
    )
    absolute = build_targets(
        store, index, tmp_path / "c", num_neighbors=9, knn_temperature=0.05 * scale
    )
    assert default.content_id == relative.content_id == absolute.content_id
    for targets in (default, relative, absolute):
        config = targets.meta["config"]
        assert targets.knn_temperature == config["knn_temperature"] == pytest.approx(0.05 * scale)
        assert config["relative_temperature"] == pytest.approx(0.05)
        assert config["mean_squared_distance"] == scale


def test_stats_describe_the_rows(store, index, tmp_path):
    targets = build_targets(store, index, tmp_path / "t", num_neighbors=30, batch_size=100)
    rows = targets.rows(0, targets.num_rows)
    dense = rows.to_dense(store.vocab_size).double()
    lengths = rows.row_offsets.diff().numpy()
    own = torch.from_numpy(store.values.astype(np.int64))[:, None]
    expected = {
        "nnz_mean": lengths.mean(),
        "nnz_p50": np.percentile(lengths, 50),
        "nnz_p99": np.percentile(lengths, 99),
        "empty_rows": 0,
        "top_prob": float(dense.amax(1).mean()),
        "entropy": float(-torch.xlogy(dense, dense).sum(1).mean()),
        "own_token_prob": float(dense.gather(1, own).mean()),
    }
    assert targets.meta["stats"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 37, 1000, 2_000_000])
def test_stats_of_many_rows_take_little_memory(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(T, "_STATS_ROWS", 100_000 if rows > 1000 else 7)
    lengths = np.random.default_rng(rows).integers(0, 300, rows)
    np.concatenate([[0], lengths.cumsum()]).astype("<i8").tofile(tmp_path / "offsets")
    tracemalloc.start()
    stats = T._stats(tmp_path / "offsets", {"top_prob": rows / 2})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stats == pytest.approx(
        {
            "nnz_mean": lengths.mean(),
            "nnz_p50": np.percentile(lengths, 50),
            "nnz_p99": np.percentile(lengths, 99),
            "empty_rows": (lengths == 0).sum(),
            "top_prob": 0.5,
        },
        rel=1e-12,
    )
    assert peak < 2 << 20


def test_approximate_search_leaves_out_the_row_by_its_id(store, tmp_path):
    """Product quantisation moves self from rank 0, and one visited cell may hold nothing else."""
    pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")
    build_index(store, tmp_path / "i", "IVF64,PQ4x4", nprobe=1)
    index = open_index(tmp_path / "i", store)
    targets = build_targets(store, index, tmp_path / "t", num_neighbors=6, knn_temperature=1.0)
    queries = torch.from_numpy(store.keys.astype(np.float32))
    distances, ids = index.search(queries, 6)
    own = torch.arange(store.num_rows)[:, None]
    assert (ids[:, 0] != own[:, 0]).any()
    kept = (ids >= 0) & (ids != own)
    weights = (-distances.double()).masked_fill(~kept, -torch.inf).softmax(1).nan_to_num(0)
    tokens = torch.from_numpy(store.values.astype(np.int64))[ids.clamp(min=0)]
    dense = torch.zeros(store.num_rows, store.vocab_size).double().scatter_add(1, tokens, weights)
    found = targets.rows(0, targets.num_rows).to_dense(store.vocab_size).double()
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-6)
    empty = int((~kept.any(1)).sum())
    assert targets.meta["stats"]["empty_rows"] == empty
    assert targets.meta["config"]["nprobe"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 1}, "num_neighbors: must be at least 2"),
        ({"knn_temperature": 0.0}, "knn_temperature: must be positive"),
        ({"knn_temperature": -1.0}, "knn_temperature: must be positive"),
        ({"knn_temperature": math.nan}, "knn_temperature: must be positive"),
        ({"relative_temperature": math.inf}, "knn_temperature: must be positive"),
        ({"knn_temperature": 1.0, "relative_temperature": 1.0}, "give one of them"),
        ({"probs_dtype": "int8"}, "probs_dtype"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings(store, index, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_targets(store, index, tmp_path / "t", **options)
    assert list(tmp_path.iterdir()) == []


def test_artefacts_of_two_runs_are_refused(corpus, store, index, tmp_path):
    other_corpus = build_corpus(tiny_documents(4), tiny_tokenizer(), tmp_path / "c", as_text=True)
    other = build_datastore(other_corpus, tiny_model("llama"), tmp_path / "s", block=32)
    with pytest.raises(ArtifactError, match="does not fit datastore artefact"):
        build_targets(other, index, tmp_path / "t")
    with pytest.raises(ArtifactError, match="does not fit datastore artefact"):
        build_targets(other, index.path, tmp_path / "t")
    targets = build_targets(other, build_index(other, tmp_path / "i"), tmp_path / "t")
    targets.check_corpus(other_corpus)
    with pytest.raises(ArtifactError, match="does not fit corpus artefact") as caught:
        targets.check_corpus(corpus)
    assert corpus.content_id in str(caught.value)
    assert other_corpus.content_id in str(caught.value)


def test_a_stage_before_its_input(store, tmp_path):
    with pytest.raises(ArtifactError, match=r"no datastore artefact at .*`mdkernels datastore`"):
        build_targets(tmp_path / "s", tmp_path / "i", tmp_path / "t")
    with pytest.raises(ArtifactError, match=r"no index artefact at .*`mdkernels index`"):
        build_targets(store, tmp_path / "i", tmp_path / "t")
    with pytest.raises(ArtifactError, match=r"no targets artefact at .*`mdkernels targets`"):
        open_targets(tmp_path / "t")


@pytest.mark.parametrize(
    ("offsets", "ids", "probs"),
    [
        ([], [], []),
        ([0], [], []),
        ([0, 1], [1, 2], [0.5, 0.5]),
        ([1, 2], [1, 2], [0.5, 0.5]),
        ([0, 2], [1, 2], [0.5]),
        ([0, 3, 2], [1, 2], [0.5, 0.5]),
        ([0, 2], [1, 9], [0.5, 0.5]),
        ([0, 2], [1, -1], [0.5, 0.5]),
        ([0, 2], [1, 2], [0.5, math.nan]),
    ],
)
def test_rows_that_make_no_sense_are_refused(tmp_path, offsets, ids, probs):
    header = {
        "tokenizer_hash": "t", "vocab_size": 9, "inputs": {}, "config": {"knn_temperature": 1.0},
    }  # fmt: skip
    with ArtifactWriter(tmp_path / "t", "targets", header) as writer:
        writer.array("row_offsets", "int64").append(np.array(offsets, np.int64))
        writer.array("token_ids", "int32").append(np.array(ids, np.int32))
        writer.array("probs", "float32").append(np.array(probs, np.float32))
        writer.commit()
    read_artifact(tmp_path / "t", "targets", verify=True)
    with pytest.raises(ArtifactError, match="targets artefact"):
        open_targets(tmp_path / "t")


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("probs_dtype", ["float32", "float16"])
@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_continues(store, index, tmp_path, monkeypatch, after, probs_dtype):
    options = {"num_neighbors": 20, "batch_size": 64, "checkpoint_seconds": 0.0}
    options["probs_dtype"] = probs_dtype
    whole = build_targets(store, index, tmp_path / "whole", **options)
    calls, knn_targets = [], T.knn_targets

    def count(*args, **kwargs):
        calls.append(1)
        if len(calls) == after + 1:
            raise Interrupt
        return knn_targets(*args, **kwargs)

    monkeypatch.setattr(T, "knn_targets", count)
    with pytest.raises(Interrupt):
        build_targets(store, index, tmp_path / "t", **options)
    with pytest.raises(ArtifactError, match="again to resume"):
        open_targets(tmp_path / "t")
    resumed = build_targets(store, index, tmp_path / "t", **options)
    assert len(calls) == 1 + -(-store.num_rows // 64)
    assert resumed.content_id == whole.content_id
    assert resumed.meta["stats"] == pytest.approx(whole.meta["stats"], rel=1e-12)


def test_a_killed_process_continues(store, index, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from mdkernels import targets
        calls, knn_targets = [], targets.knn_targets
        def count(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return knn_targets(*args, **kwargs)
        targets.knn_targets = count
        targets.build_targets(*sys.argv[1:], num_neighbors=20, batch_size=64, checkpoint_seconds=0)
    """)
    arguments = [str(store.path), str(index.path), str(tmp_path / "t")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "t").exists()
    options = {"num_neighbors": 20, "batch_size": 64}
    whole = build_targets(store, index, tmp_path / "whole", **options)
    resumed = build_targets(*arguments, **options)
    assert resumed.content_id == whole.content_id
    assert resumed.meta["stats"] == pytest.approx(whole.meta["stats"], rel=1e-12)


def test_a_pretrained_model(tmp_path):
    """The whole chain on real weights; repeated text, so the datastore knows what comes next."""
    path = require_shared_data("models/stories260K")
    text = "Once upon a time there was a little dog named Tim. Tim liked to play in the park. "
    corpus = build_corpus([text * 4] * 3, load_tokenizer(path), tmp_path / "c", as_text=True)
    store = build_datastore(corpus, path, tmp_path / "s", block=128, device="cpu")
    targets = build_targets(store, build_index(store, tmp_path / "i"), tmp_path / "t")
    targets.check_corpus(corpus)
    assert targets.meta["stats"]["own_token_prob"] > 0.9
