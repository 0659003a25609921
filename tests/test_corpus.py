"""Text to token ids: formats, separators, windows, and what is refused. Also models.py."""

import gzip
import io
import json
import lzma
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_fixtures import (
    EOS,
    FAMILIES,
    VOCAB_SIZE,
    require_shared_data,
    save_tiny_checkpoint,
    tiny_documents,
    tiny_model,
    tiny_tokenizer,
)
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mdkernels import corpus as C
from mdkernels.artifact import ArtifactError
from mdkernels.corpus import build_corpus, open_corpus, windows
from mdkernels.models import (
    capture_keys,
    key_module,
    lm_head,
    load_model,
    load_tokenizer,
    model_hash,
    tokenizer_hash,
    tokenizer_vocab_size,
)

DOCUMENTS = tiny_documents(7)


def ids_of(documents, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    pieces = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents]
    return [i for piece in pieces for i in (*piece, tokenizer.eos_token_id)]


def text_of(documents):
    return f"\n{EOS}\n".join(documents)


def test_documents_become_one_stream(tmp_path):
    corpus = build_corpus(iter(DOCUMENTS), tiny_tokenizer(), tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS)
    assert corpus.token_ids.dtype == np.uint16
    assert corpus.num_rows == len(ids_of(DOCUMENTS)) - 1
    for i, document in enumerate(DOCUMENTS):
        start, stop = corpus.document_offsets[i : i + 2]
        assert corpus.token_ids[start:stop].tolist() == ids_of([document])
    assert len(corpus.document_offsets) == len(DOCUMENTS) + 1
    assert corpus.vocab_size == VOCAB_SIZE
    assert corpus.eos_token_id == 0
    assert corpus.text_bytes == sum(len(d.encode()) for d in DOCUMENTS)
    assert corpus.tokenizer_hash == tokenizer_hash(tiny_tokenizer())
    assert open_corpus(corpus) is corpus
    again = open_corpus(str(tmp_path / "c"), verify=True)
    assert again.content_id == corpus.content_id


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz"])
def test_file_formats_give_the_same_corpus(tmp_path, suffix):
    documents = [*DOCUMENTS, "naïve — ☃\n\n two\tparagraphs"]
    jsonl = "\n".join(json.dumps({"body": d, "n": 1}) for d in documents) + "\n\n"
    text = jsonl if "jsonl" in suffix else f"{EOS}\n{text_of(documents)}\n{EOS}\n\n{EOS}\n"
    opener = {"xz": lzma.open, "gz": gzip.open}.get(suffix.rsplit(".")[-1], open)
    with opener(tmp_path / f"file{suffix}", "wt", encoding="utf-8") as stream:
        stream.write(text)
    corpus = build_corpus(
        tmp_path / f"file{suffix}", tiny_tokenizer(), tmp_path / "c", text_field="body"
    )
    assert corpus.token_ids.tolist() == ids_of(documents)


@pytest.mark.parametrize(("suffix", "known"), [(".txt", True), (".txt.gz", False)])
def test_the_bar_knows_how_much_plain_text_is_left(tmp_path, monkeypatch, suffix, known):
    bars = []

    def bar(**options):
        bars.append(tqdm(**options | {"disable": False, "file": io.StringIO()}))
        return bars[0]

    monkeypatch.setattr(C, "tqdm", bar)
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(tmp_path / f"a{suffix}", "wt", encoding="utf-8") as stream:
        stream.write("\n<|endoftext|>\n".join(tiny_documents(6)))
    built = build_corpus(tmp_path / f"a{suffix}", tiny_tokenizer(), tmp_path / "c")
    assert bars[0].n == built.text_bytes
    if known:
        assert built.text_bytes <= bars[0].total <= built.text_bytes + 16 * 6
    else:
        assert bars[0].total is None


def test_several_inputs_and_directories_keep_their_order(tmp_path):
    for i, document in enumerate(DOCUMENTS[:3]):
        (tmp_path / "texts" / str(i)).mkdir(parents=True)
        (tmp_path / "texts" / str(i) / "a.txt").write_text(document)
        (tmp_path / "texts" / str(i) / "ignored.md").write_text("no")
    (tmp_path / "last.txt").write_text(DOCUMENTS[3])
    paths = [tmp_path / "texts", str(tmp_path / "last.txt")]
    corpus = build_corpus(paths, tiny_tokenizer(), tmp_path / "c")
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS[:4])
    assert len(corpus.meta["config"]["sources"]) == 4


def test_batches_do_not_change_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "_BATCH_CHARS", 100)
    corpus = build_corpus(["", *DOCUMENTS, ""], tiny_tokenizer(), tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS)


def test_tokenizer_state_is_neither_obeyed_nor_changed(tmp_path):
    tokenizer = load_tokenizer(save_tiny_checkpoint(tmp_path / "m", "llama"))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    corpus = build_corpus(DOCUMENTS, tokenizer, tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    assert tokenizer.backend_tokenizer.padding["length"] == 9


def test_large_vocabularies_take_uint32(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(save_tiny_checkpoint(tmp_path / "m", "gpt2"))._tokenizer,
        eos_token=EOS,
    )
    tokenizer.add_tokens([f"<filler {i}>" for i in range(70_000 - VOCAB_SIZE)])
    corpus = build_corpus(["a <filler 69000> b"], tokenizer, tmp_path / "c", as_text=True)
    assert corpus.token_ids.dtype == np.uint32
    assert corpus.vocab_size == 70_000
    assert 69_000 + VOCAB_SIZE in corpus.token_ids.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "corpus is empty"),
        ("a.txt", b"\n\n<|endoftext|>\n", "corpus is empty"),
        ("a.txt", " \n<|endoftext|>\n\t\u00a0 \n".encode(), r"no text was found in .*a\.txt"),
        ("a.jsonl", b'{"text": "  "}\n{"text": ""}\n{"text": "\\n"}', "corpus is empty"),
        ("a.jsonl", b'{"text": " \\n \\t "}', "corpus is empty"),
        ("a.txt", b"abc \xff\xfe", r"a\.txt' is not UTF-8"),
        ("a.txt.xz", b"abc", r"a\.txt\.xz' is damaged or not compressed"),
        ("a.txt.xz", lzma.compress(b"word " * 999)[:-30], "is damaged"),
        ("a.txt.gz", gzip.compress(b"word " * 999, mtime=0)[:-9], "is damaged"),
        ("a.txt.gz", b"abc", "is damaged"),
        ("a.txt.gz", gzip.compress(b"word " * 999, mtime=0)[:15] + bytes(9), r"gz' is damaged"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}', r"line 1 has no string field 'text' \(found \['txt'\]\)"),
        ("a.jsonl", b'{"text": 3}', "no string field 'text'"),
        ("a.jsonl", b"[3]", "found list"),
        ("a.jsonl", b'{"text": "so\\ud83d"}', r"starts 'so\\ud83d' is no Unicode text"),
        ("a.pdf", b"abc", "must end in one of"),
    ],
)
def test_unreadable_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_corpus(tmp_path / name, tiny_tokenizer(), tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_white_space_beside_text_is_kept(tmp_path):
    corpus = build_corpus([" \n", "a b"], tiny_tokenizer(), tmp_path / "c", as_text=True)
    assert len(corpus.document_offsets) == 3


def test_inputs_that_are_no_paths(tmp_path):
    with pytest.raises(ValueError, match=r"no file '.*as_text=True"):
        build_corpus(DOCUMENTS, tiny_tokenizer(), tmp_path / "c")
    with pytest.raises(ValueError, match="not one string"):
        build_corpus("the tensor", tiny_tokenizer(), tmp_path / "c", as_text=True)
    with pytest.raises(ValueError, match="document 1 is int"):
        build_corpus(["a b c", 3], tiny_tokenizer(), tmp_path / "c", as_text=True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="has no file ending in"):
        build_corpus(tmp_path / "nothing", tiny_tokenizer(), tmp_path / "c")
    with pytest.raises(ValueError, match="corpus is empty"):
        build_corpus([], tiny_tokenizer(), tmp_path / "c", as_text=True)


def test_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()._tokenizer)
    with pytest.raises(ValueError, match="no eos token"):
        build_corpus(DOCUMENTS, tokenizer, tmp_path / "c", as_text=True)
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        build_corpus(DOCUMENTS, tmp_path / "nowhere", tmp_path / "c", as_text=True)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "tokenizer_vocab_size", lambda tokenizer: 300)
    with pytest.raises(ValueError, match="outside its vocabulary of 300"):
        build_corpus(DOCUMENTS, tiny_tokenizer(), tmp_path / "c", as_text=True)


def test_existing_corpus_is_kept(tmp_path):
    corpus = build_corpus(DOCUMENTS, tiny_tokenizer(), tmp_path / "c", as_text=True)
    with pytest.raises(ArtifactError, match="exists"):
        build_corpus(DOCUMENTS[:2], tiny_tokenizer(), tmp_path / "c", as_text=True)
    with pytest.raises(ValueError, match="document 1 is int"):
        build_corpus(["a", 3], tiny_tokenizer(), tmp_path / "c", as_text=True, overwrite=True)
    assert open_corpus(tmp_path / "c", verify=True).content_id == corpus.content_id
    build_corpus(DOCUMENTS[:2], tiny_tokenizer(), tmp_path / "c", as_text=True, overwrite=True)
    assert open_corpus(tmp_path / "c").token_ids.tolist() == ids_of(DOCUMENTS[:2])


@pytest.mark.parametrize("name", ["hf:", "hf: ", "hf::config"])
def test_hub_datasets_need_a_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"inputs: '{name}' names no dataset; expected hf:NAME"):
        build_corpus(name, tiny_tokenizer(), tmp_path / "c")


@pytest.mark.parametrize("inputs", [None, 3, [None], b"text"])
def test_inputs_of_the_wrong_type(tmp_path, inputs):
    with pytest.raises(TypeError, match="inputs: expected paths or dataset names, got"):
        build_corpus(inputs, tiny_tokenizer(), tmp_path / "c")


def test_hub_datasets_say_what_is_missing(tmp_path):
    try:
        import datasets
    except ImportError:
        with pytest.raises(ValueError, match="pip install datasets"):
            build_corpus("hf:some/name", tiny_tokenizer(), tmp_path / "c")
        return
    table = datasets.Dataset.from_dict({"body": DOCUMENTS})
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "d"))
    source = f"hf:{tmp_path / 'd'}"
    corpus = build_corpus(source, tiny_tokenizer(), tmp_path / "c", text_field="body")
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS)
    with pytest.raises(ValueError, match="no column 'text'"):
        build_corpus(source, tiny_tokenizer(), tmp_path / "e")
    with pytest.raises(ValueError, match=r"split 'test' .*cannot be loaded: .*only \['train'\]"):
        build_corpus(source, tiny_tokenizer(), tmp_path / "e", split="test")


@pytest.mark.parametrize("layout", ["train.parquet", "data/train-00000-of-00001.parquet"])
def test_hub_layout_in_a_directory(tmp_path, monkeypatch, layout):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "d" / layout
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(str(file))
    corpus = build_corpus(f"hf:{tmp_path / 'd'}", tiny_tokenizer(), tmp_path / "c")
    assert corpus.token_ids.tolist() == ids_of(DOCUMENTS)
    with pytest.raises(ValueError, match=r"inputs: hf:.*split 'test' .*cannot be loaded: .*test"):
        build_corpus(f"hf:{tmp_path / 'd'}", tiny_tokenizer(), tmp_path / "e", split="test")


@pytest.mark.parametrize("value", [None, 7, ["a"]])
def test_hub_records_without_text_are_named(tmp_path, monkeypatch, value):
    class Table(list):
        column_names = ("text",)

    table = Table([{"text": "the tensor"}, {"text": value}])
    loader = types.SimpleNamespace(load_dataset=lambda name, split: table)
    monkeypatch.setitem(sys.modules, "datasets", loader)
    with pytest.raises(ValueError, match=r"hf:some/name row 1 has .* 'text', expected a string"):
        build_corpus("hf:some/name", tiny_tokenizer(), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@given(num_rows=st.integers(1, 300), block=st.integers(1, 64), data=st.data())
def test_windows_cover_every_row_once(num_rows, block, data):
    stride = data.draw(st.integers(1, block))
    spans = windows(num_rows, block, stride)
    assert spans.dtype == np.int64
    assert np.concatenate([np.arange(*span) for span in spans]).tolist() == list(range(num_rows))
    assert spans[0].tolist() == [0, min(block, num_rows)]
    assert (spans[1:-1, 1] - spans[1:-1, 0] == stride).all()
    assert (spans[1:, 1] - spans[1:, 0] <= stride).all()
    starts = np.maximum(0, spans[:, 1] - block)
    assert (starts <= spans[:, 0]).all()
    if num_rows >= block:
        assert (spans[:, 1] - starts == block).all()


@pytest.mark.parametrize("bad", [(0, 4, 2), (9, 4, 5), (9, 4, 0), (9, 0, 0)])
def test_bad_windows(bad):
    with pytest.raises(ValueError, match="1 <= stride <= block"):
        windows(*bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load_as_saved(tmp_path, family):
    path = save_tiny_checkpoint(tmp_path / "m", family)
    model, tokenizer = load_model(path), load_tokenizer(path)
    assert not model.training
    assert (
        model_hash(model)
        == model_hash(tiny_model(family))
        != model_hash(tiny_model(family, seed=1))
    )
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tiny_tokenizer())
    assert load_model(model) is model
    assert load_tokenizer(tokenizer) is tokenizer
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 9))
    with torch.no_grad(), capture_keys(model) as keys:
        logits = lm_head(model)(model.base_model(input_ids).last_hidden_state)
        torch.testing.assert_close(logits, model(input_ids).logits, rtol=0, atol=0)
        assert keys().shape == (2, 9, 32)


def test_unknown_family_and_missing_model(tmp_path):
    model = tiny_model("gpt2")
    model.config.model_type = "bert"
    with pytest.raises(ValueError, match=r"model_type 'bert'.*'gpt2'.*'llama'.*'qwen2'"):
        key_module(model)
    missing = r"cannot load a model from '.*nowhere': there is no such directory; as a hub id: "
    with pytest.raises(ValueError, match=missing) as raised:
        load_model(tmp_path / "nowhere")
    assert ".." not in str(raised.value)


def test_a_model_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(save_tiny_checkpoint(tmp_path / "model", "llama"))
    assert load_model(".").config.model_type == "llama"


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = save_tiny_checkpoint(tmp_path / "model", "llama")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load a model from '.*model'"):
        load_model(path)


def test_tokenizer_hash_follows_content():
    tokenizer = tiny_tokenizer()
    same = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=EOS)
    same.pad_token, same.padding_side, same.chat_template = EOS, "left", "{{ messages }}"
    assert tokenizer_hash(same) == tokenizer_hash(tokenizer)
    others = [tiny_tokenizer(VOCAB_SIZE - 1)]
    for part, change in (
        ("pre_tokenizer", lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True)),
        ("normalizer", lambda spec: spec.update(normalizer={"type": "Lowercase"})),
        ("merges", lambda spec: spec["model"]["merges"].reverse()),
        ("added", lambda spec: spec["added_tokens"][0].update(lstrip=True)),
    ):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        change(spec)
        backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
        others.append(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS))
        assert tokenizer_hash(others[-1]) != tokenizer_hash(tokenizer), part
    assert len({tokenizer_hash(t) for t in others}) == len(others)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "models/stories260K"])
def test_real_tokenizers(tmp_path, name):
    path = require_shared_data(name)
    tokenizer = load_tokenizer(path)
    expected = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_hash(load_tokenizer(tmp_path / "copy")) == expected
    if len(tokenizer) < 100_000:  # hashing a large vocabulary takes seconds
        assert tokenizer_hash(AutoTokenizer.from_pretrained(path, use_fast=False)) == expected
    documents = ["Naïve <|endoftext|> text,\n\n  with 12 345 spaces. ", "日本語 🙂", *DOCUMENTS]
    corpus = build_corpus(documents, tokenizer, tmp_path / "c", as_text=True)
    assert corpus.token_ids.tolist() == ids_of(documents, tokenizer)
    assert corpus.vocab_size == tokenizer_vocab_size(tokenizer) == len(tokenizer)
