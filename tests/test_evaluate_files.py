"""Files of `evaluate` that cannot be written: said before scoring, or with the scores shown."""

import errno
import os

import pytest
from pipeline_fixtures import tiny_documents, tiny_model, tiny_tokenizer

from mdkernels import evaluate as stage
from mdkernels.corpus import build_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora") / "test"
    return build_corpus(tiny_documents(6, seed=3), tiny_tokenizer(), path, as_text=True)


def test_a_place_that_cannot_be_written_is_found_before_scoring(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "gold_logprobs", lambda *a, **k: pytest.fail("scored"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        stage.evaluate(tiny_model("gpt2"), None, corpus, block=32, out=tmp_path / "file" / "e.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=rf"out: the directory {tmp_path} is not writable"):
        stage.evaluate(tiny_model("gpt2"), None, corpus, block=32, out=tmp_path / "e.json")


def test_a_full_disk_does_not_lose_the_scores(corpus, tmp_path, monkeypatch, capsys):
    def full(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "sync_path", full)
    with pytest.raises(OSError, match="No space left"):
        stage.evaluate(tiny_model("gpt2"), None, corpus, block=32, out=tmp_path / "e.json")
    assert "bits/byte" in capsys.readouterr().out
    assert not (tmp_path / "e.json").exists()
