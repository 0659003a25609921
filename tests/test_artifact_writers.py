"""Several writers of one artefact: one wins, the others are told, and nothing is damaged."""

import shutil

import numpy as np
import pytest

from mdkernels import artifact_writer as W
from mdkernels.artifact import ArtifactError, read_artifact
from mdkernels.artifact_writer import ArtifactWriter

HEADER = {"config": {"block": 4}}


def write(path, rows):
    with ArtifactWriter(path, "datastore", HEADER) as writer:
        writer.array("x", "int32").append(np.arange(rows, dtype=np.int32))
        writer.commit()
    return path


def test_a_second_writer_is_refused_until_the_old_artefact_is_deleted(tmp_path, monkeypatch):
    """Deleting one takes a while, and happens in a directory that has the name of the next run."""
    path = write(tmp_path / "a", 5)
    delete, refused = shutil.rmtree, []

    def slow(directory, **options):
        with pytest.raises(ArtifactError, match="being written by another process") as caught:
            ArtifactWriter(path, "datastore", HEADER, overwrite=True)
        refused.append(caught)
        delete(directory, **options)

    with ArtifactWriter(path, "datastore", HEADER, overwrite=True) as writer:
        writer.array("x", "int32").append(np.zeros(2, np.int32))
        monkeypatch.setattr(W.shutil, "rmtree", slow)
        writer.commit()
    assert len(refused) == 1
    assert read_artifact(path, "datastore").array("x").shape == (2,)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_was_overtaken_replaces_nothing(tmp_path, monkeypatch):
    """`out` was free when it looked, and taken when it had the lock."""
    path, acquire = tmp_path / "a", W._acquire_lock

    def late(work):
        monkeypatch.setattr(W, "_acquire_lock", acquire)
        write(path, 3)
        return acquire(work)

    monkeypatch.setattr(W, "_acquire_lock", late)
    with pytest.raises(ArtifactError, match="overwrite=True"):
        ArtifactWriter(path, "datastore", HEADER)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_behind_the_commit_leaves_the_next_run_alone(tmp_path):
    path = tmp_path / "a"

    def stage():
        with ArtifactWriter(path, "datastore", HEADER) as writer:
            writer.array("x", "int32").append(np.zeros(3, np.int32))
            writer.commit()
            following.append(ArtifactWriter(path, "datastore", HEADER, overwrite=True))
            raise RuntimeError("stop")

    following = []
    with pytest.raises(RuntimeError, match="stop"):
        stage()
    with following[0] as writer:
        with pytest.raises(ArtifactError, match="being written"):
            ArtifactWriter(path, "datastore", HEADER, overwrite=True)
        writer.array("x", "int32")
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_kill_left_of_a_replaced_artefact_is_no_obstacle(tmp_path, monkeypatch):
    path = write(tmp_path / "a", 5)
    monkeypatch.setattr(W, "_exchange", lambda first, second: False)
    shutil.copytree(path, path.with_name("a.replaced"))
    with ArtifactWriter(path, "datastore", HEADER, overwrite=True) as writer:
        writer.array("x", "int32")
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
