"""Documents that are encoded in overlapping windows give the tokens of the whole."""

import lzma
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_fixtures import EOS, require_shared_data, tiny_documents, tiny_tokenizer
from test_corpus import ids_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdkernels import long_documents
from mdkernels.corpus import build_corpus
from mdkernels.models import load_tokenizer


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(long_documents, "WINDOW", 3001)
    monkeypatch.setattr(long_documents, "OVERLAP", 607)


def whole(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


class Counting:
    """A tokenizer that notes what it encodes beside the windows of the first try."""

    def __init__(self, backend):
        self.backend, self.lengths = backend, []

    def encode_batch(self, *args, **options):
        return self.backend.encode_batch(*args, **options)

    def encode(self, text, **options):
        self.lengths.append(len(text))
        return self.backend.encode(text, **options)


def long_text(length, seed=0):
    draw, texts = random.Random(seed), tiny_documents(40, seed=seed)
    between = ["\n", "\n\n\n", "   ", "\t", " 日本語🙂 ", "naïve", "\r\n", EOS]
    pieces = []
    while sum(map(len, pieces)) < length:
        pieces.append(draw.choice(texts))
        pieces.append(draw.choice(between))
    return "".join(pieces)[:length]


@pytest.mark.parametrize("length", [1, 606, 607, 608, 3001, 3002, 5395, 5396, 50_000])
def test_windows_give_the_tokens_of_the_whole(small_windows, length):
    backend = Counting(tiny_tokenizer().backend_tokenizer)
    text = long_text(length)
    found = long_documents.encode_long(backend, text)
    assert found.dtype == np.uint32
    assert backend.lengths == []
    assert found.tolist() == whole(backend.backend, text)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "models/stories260K"])
def test_real_tokenizers(small_windows, name):
    backend = Counting(load_tokenizer(require_shared_data(name)).backend_tokenizer)
    for seed in range(4):
        text = long_text(40_000, seed)
        assert long_documents.encode_long(backend, text).tolist() == whole(backend.backend, text)
    assert backend.lengths == []


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
    for length in (6003, 9001, 9007):
        text = (unit * length)[:length]
        assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab \n\t.é日🙂1<|>")), min_size=302, max_size=900))
def test_windows_of_any_text(text):
    backend = tiny_tokenizer().backend_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "WINDOW", 301)
        patch.setattr(long_documents, "OVERLAP", 157)
        patch.setattr(long_documents, "_AGREEMENT", 16)
        assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


def digits_in_threes():
    """No token shows where the pre-tokenizer began to count, but for the rare 12 that it cuts."""
    ids = {c: i for i, c in enumerate(["x", "0", "1", "2", "12"])}
    backend = Tokenizer(models.BPE(ids, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+"), "isolated")
    draw = random.Random(0)
    return backend, "x" + "".join("12" if draw.random() < 0.05 else "0" for _ in range(1_050_000))


def test_words_that_are_counted_from_far_away():
    backend, text = digits_in_threes()
    assert long_documents.encode_long(backend, text).tolist() == whole(backend, text)


def test_a_place_where_windows_disagree_is_avoided(small_windows):
    """The second window begins at 2394, inside a run of one letter."""
    backend = Counting(load_tokenizer(require_shared_data("tokenizers/gpt2")).backend_tokenizer)
    text = long_text(20_000)
    text = text[:2299] + "a" * 400 + text[2699:]
    found = long_documents.encode_long(backend, text).tolist()
    assert found == whole(backend.backend, text)
    assert backend.lengths == [3001 + 607]


def test_unigram_models_see_the_whole(tmp_path, small_windows):
    """Their ties are broken by the rounding of scores that are summed up from the start."""
    scores = [("<unk>", -20.0), ("aa", -5.31), ("ll", -5.7), (EOS, 0.0)]
    scores += [(c, -4 - 0.0137 * i) for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    draw = random.Random(0)
    text = " ".join(draw.choices(["balll", "llama", "aaa", "hello", "the"], k=20_000))
    assert not long_documents.can_split(tokenizer.backend_tokenizer)
    corpus = build_corpus([text], tokenizer, tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of([text], tokenizer)


def test_a_corpus_with_long_and_short_documents(tmp_path, small_windows):
    documents = ["short", long_text(20_000), "", "also short", long_text(6003, 1), "end"]
    corpus = build_corpus(documents, tiny_tokenizer(), tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of([d for d in documents if d])
