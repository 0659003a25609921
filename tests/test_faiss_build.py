"""A faiss build that is cut off goes on where it was, and ends in the same index."""

import numpy as np
import pytest
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer

from mdkernels import faiss_build
from mdkernels.artifact_writer import ArtifactWriter
from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.index import build_index

pytest.importorskip("faiss", reason="faiss is not installed (the faiss extra)")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    corpus = build_corpus(tiny_documents(6), tiny_tokenizer(), root / "corpus", as_text=True)
    return build_datastore(corpus, tiny_model("llama"), root / "store", block=32)


@pytest.fixture
def cut_off(monkeypatch):
    """Builds whose checkpoints come after each block of keys; the third of all ends its build."""
    monkeypatch.setattr(faiss_build, "ADD_ROWS", 64)
    checkpoint, calls = faiss_build._checkpoint, []

    def stop(*arguments):
        checkpoint(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(faiss_build, "_checkpoint", stop)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ8x4"])
def test_an_interrupted_build_continues(store, tmp_path, monkeypatch, cut_off, factory):
    whole = build_index(store, tmp_path / "whole", factory)
    with pytest.raises(KeyboardInterrupt):
        build_index(store, tmp_path / "i", factory, checkpoint_seconds=0)
    assert len(list((tmp_path / "i.partial").glob("added-*.faiss"))) == 1
    trained = []
    monkeypatch.setattr(faiss_build, "_trained", lambda *_: trained.append(1))
    resumed = build_index(store, tmp_path / "i", factory, checkpoint_seconds=0)
    assert not trained
    assert resumed.content_id == whole.content_id
    assert sorted(p.name for p in resumed.path.iterdir()) == ["index.faiss", "meta.json"]
    assert not (tmp_path / "i.partial").exists()


def test_a_commit_that_is_cut_off_leaves_the_whole_index(store, tmp_path, monkeypatch):
    """It reads all of it again, for minutes where it is large."""

    def stop(*_, **__):
        raise RuntimeError("cut off")

    whole = build_index(store, tmp_path / "whole", "IVF8,Flat")
    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "commit", stop)
        with pytest.raises(RuntimeError, match="cut off"):
            build_index(store, tmp_path / "i", "IVF8,Flat")
    for step in ("_trained", "_write"):
        monkeypatch.setattr(faiss_build, step, stop)
    resumed = build_index(store, tmp_path / "i", "IVF8,Flat")
    assert resumed.content_id == whole.content_id
    assert sorted(p.name for p in resumed.path.iterdir()) == ["index.faiss", "meta.json"]


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_checkpoint_is_never_parsed(store, tmp_path, cut_off, damage):
    whole = build_index(store, tmp_path / "whole", "IVF8,Flat")
    with pytest.raises(KeyboardInterrupt):
        build_index(store, tmp_path / "i", "IVF8,Flat", checkpoint_seconds=0)
    (path,) = (tmp_path / "i.partial").glob("added-*.faiss")
    if damage == "altered":
        content = np.fromfile(path, np.uint8)
        content[len(content) // 2] ^= 1
        content.tofile(path)
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=r"added-\d+\.faiss is missing or damaged: the index is"):
        rebuilt = build_index(store, tmp_path / "i", "IVF8,Flat")
    assert rebuilt.content_id == whole.content_id
    assert sorted(p.name for p in rebuilt.path.iterdir()) == ["index.faiss", "meta.json"]
