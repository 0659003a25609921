"""Documents that are encoded in overlapping windows give the tokens of the whole."""

import lzma
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_fixtures import EOS, require_shared_data, tiny_documents, tiny_tokenizer
from test_corpus import ids_of

from mdkernels import long_documents
from mdkernels.corpus import build_corpus
from mdkernels.models import load_tokenizer


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(long_documents, "WINDOW", 1501)
    monkeypatch.setattr(long_documents, "OVERLAP", 307)


def whole(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


class Counting:
    """A tokenizer that counts the documents that it encodes at once."""

    def __init__(self, backend):
        self.backend, self.wholes = backend, 0

    def encode_batch(self, *args, **options):
        return self.backend.encode_batch(*args, **options)

    def encode(self, *args, **options):
        self.wholes += 1
        return self.backend.encode(*args, **options)


def long_text(length, seed=0):
    draw, texts = random.Random(seed), tiny_documents(40, seed=seed)
    between = ["\n", "\n\n\n", "   ", "\t", " 日本語🙂 ", "naïve", "\r\n", EOS]
    pieces = []
    while sum(map(len, pieces)) < length:
        pieces.append(draw.choice(texts))
        pieces.append(draw.choice(between))
    return "".join(pieces)[:length]


@pytest.mark.parametrize("length", [1, 306, 307, 308, 1501, 1502, 2695, 2696, 50_000])
def test_windows_give_the_tokens_of_the_whole(small_windows, length):
    backend = Counting(tiny_tokenizer().backend_tokenizer)
    text = long_text(length)
    found = long_documents.encode_long(backend, text)
    assert found.dtype == np.uint32
    assert backend.wholes == 0
    assert found.tolist() == whole(backend, text)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "models/stories260K"])
def test_real_tokenizers(small_windows, name):
    backend = Counting(load_tokenizer(require_shared_data(name)).backend_tokenizer)
    for seed in range(4):
        text = long_text(40_000, seed)
        assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)
    assert backend.wholes == 4  # those of this test


def test_real_text_at_the_real_size():
    folder = require_shared_data("general")
    backend = load_tokenizer(require_shared_data("tokenizers/gpt2")).backend_tokenizer
    with lzma.open(folder / "wikitext-2.train.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(1 << 21)
    assert len(text) > 3 * long_documents.WINDOW
    assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab", "🙂", "日本", "x " * 3, "aaaa\n"])
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "models/stories260K"])
def test_text_that_repeats_itself(small_windows, unit, name):
    backend = load_tokenizer(require_shared_data(name)).backend_tokenizer
    for length in (3001, 9001, 9007):
        text = (unit * length)[:length]
        assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab \n\t.é日🙂1<|>")), min_size=200, max_size=900))
def test_windows_of_any_text(text):
    backend = tiny_tokenizer().backend_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "WINDOW", 151)
        patch.setattr(long_documents, "OVERLAP", 97)
        assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


def test_a_corpus_with_long_and_short_documents(tmp_path, small_windows):
    documents = ["short", long_text(20_000), "", "also short", long_text(3001, 1), "end"]
    corpus = build_corpus(documents, tiny_tokenizer(), tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of([d for d in documents if d])
