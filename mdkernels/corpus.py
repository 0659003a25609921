"""Stage 1: text -> token ids.

Reads: text files, a Hugging Face dataset, or strings.
Writes: token_ids (N,) uint16 or uint32; document_offsets (documents + 1,) int64.

A corpus is one stream of N token ids: its documents in order, each ended by the tokenizer's eos
token. It gives R = N - 1 *rows*. Row r is the position that reads token r and predicts token r + 1;
the datastore, the targets and every evaluation number their rows this way.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from . import long_documents
from .artifact import Artifact, ArtifactError, read_artifact
from .artifact_writer import ArtifactWriter
from .models import load_tokenizer, tokenizer_hash, tokenizer_vocab_size

SEPARATOR = "<|endoftext|>"
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_SUFFIXES = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in _OPENERS)
_BATCH_CHARS, _BATCH_DOCUMENTS = 4 << 20, 4096


class Corpus:
    """An opened corpus artefact."""

    kind = "corpus"

    def __init__(self, artifact: Artifact):
        artifact.require(token_ids=(("uint16", "uint32"), 1), document_offsets=("int64", 1))
        self.artifact, self.path, self.meta = artifact, artifact.path, artifact.meta
        self.content_id = artifact.content_id
        self.tokenizer_hash: str = self.meta["tokenizer_hash"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.eos_token_id: int = self.meta["config"]["eos_token_id"]
        self.text_bytes: int = self.meta["text_bytes"]
        """UTF-8 bytes of the documents, for bits per byte; separators are not counted."""
        if self.num_rows < 1:
            raise ArtifactError(f"{artifact}: has {len(self.token_ids)} tokens, expected 2 or more")
        if artifact.verified and int(self.token_ids.max()) >= self.vocab_size:
            raise ArtifactError(f"{artifact}: a token id is not below vocab_size {self.vocab_size}")

    @property
    def token_ids(self) -> np.ndarray:
        """(N,) read-only map; uint16 for vocabularies of at most 65536 entries, else uint32."""
        return self.artifact.array("token_ids")

    @property
    def document_offsets(self) -> np.ndarray:
        """(documents + 1,) int64: document d is token_ids[offsets[d] : offsets[d + 1]]."""
        return self.artifact.array("document_offsets")

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - 1

    def windows(self, block: int, stride: int) -> np.ndarray:
        return windows(self.num_rows, block, stride)


def open_corpus(corpus: Corpus | str | os.PathLike, *, verify: bool = False) -> Corpus:
    """Open a corpus directory; an opened corpus is returned as it is. See `read_artifact`."""
    if isinstance(corpus, Corpus):
        return corpus
    return Corpus(read_artifact(corpus, Corpus.kind, verify=verify))


def windows(num_rows: int, block: int, stride: int) -> np.ndarray:
    """(W, 2) int64 scored rows [start, stop) of each window; together rows 0..num_rows-1, in order.

    The first window scores min(block, num_rows) rows, each next one the next `stride` (fewer at the
    end). A window that scores [start, stop) reads token_ids[max(0, stop - block) : stop], so all
    windows have the same length where num_rows >= block, and rows after the first window see at
    least block - stride tokens before them.
    """
    if num_rows < 1 or not 1 <= stride <= block:
        raise ValueError(
            f"windows need num_rows >= 1 and 1 <= stride <= block, got num_rows={num_rows}, "
            f"block={block}, stride={stride}"
        )
    first = min(block, num_rows)
    starts = np.concatenate([[0], np.arange(first, num_rows, stride)]).astype(np.int64)
    return np.stack([starts, np.append(starts[1:], num_rows)], axis=1)


def build_corpus(
    inputs: str | os.PathLike | Sequence[str | os.PathLike] | Iterable[str],
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase,
    out: str | os.PathLike,
    *,
    as_text: bool = False,
    text_field: str = "text",
    split: str = "train",
    overwrite: bool = False,
) -> Corpus:
    """Tokenise documents into the corpus artefact `out`.

    Token ids are those of `tokenizer(document, add_special_tokens=False)`, then eos. Empty
    documents are dropped.

    Args:
        inputs: one path or several: UTF-8 `.txt` (documents separated by lines `<|endoftext|>`) or
            `.jsonl` (one document per line, in `text_field`), either of them also as .gz or .xz; a
            directory stands for all such files below it, sorted; `hf:NAME`, `hf:NAME:CONFIG` or
            `hf:DIRECTORY` (of save_to_disk, or laid out as on the hub) is the `split` of a Hugging
            Face dataset (needs the datasets package).
            With `as_text=True` an iterable of documents instead.
        tokenizer: loaded, or a local directory or hub id. It must have an eos token.
        out: directory to write, refused if it exists unless `overwrite`.

    Raises ValueError for unreadable or empty input, naming the file, and ArtifactError for `out`.
    """
    tokenizer = load_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no eos token to end documents with; set its eos_token")
    if as_text:
        documents, sources = _checked_strings(inputs), None
    else:
        sources = _sources(inputs)
        documents = (doc for source in sources for doc in _documents(source, text_field, split))
    vocab_size = tokenizer_vocab_size(tokenizer)
    header = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": vocab_size,
        "config": {"sources": sources, "eos_token_id": tokenizer.eos_token_id},
        "inputs": {},
    }
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    end_of_document = np.array([tokenizer.eos_token_id])
    encode = _encoder(tokenizer)
    with ArtifactWriter(out, Corpus.kind, header, overwrite=overwrite) as writer:
        token_ids, offsets = (
            writer.array("token_ids", dtype),
            writer.array("document_offsets", "int64"),
        )
        offsets.append(np.zeros(1, np.int64))
        text_bytes, some_text = 0, False
        total = None if sources is None else _text_size(sources)
        with tqdm(desc="corpus", total=total, unit="B", unit_scale=True, disable=None) as progress:
            for batch in _batches(documents):
                some_text = some_text or any(document.strip() for document in batch)
                size = sum(_utf8_bytes(document) for document in batch)
                pieces = [ids for ids in encode(batch) if len(ids)]
                if not pieces:
                    continue
                lengths = np.array([len(ids) + 1 for ids in pieces], np.int64)
                joined = np.concatenate([part for ids in pieces for part in (ids, end_of_document)])
                if joined.min() < 0 or joined.max() >= vocab_size:
                    raise ValueError(
                        f"tokenizer: gave token ids {joined.min()}..{joined.max()}, outside its "
                        f"vocabulary of {vocab_size}"
                    )
                offsets.append(token_ids.rows + np.cumsum(lengths))
                token_ids.append(joined.astype(dtype))
                text_bytes += size
                progress.update(size)
        if token_ids.rows < 2 or not some_text:
            shown = "the documents given" if sources is None else ", ".join(sources)
            raise ValueError(f"inputs: the corpus is empty, no text was found in {shown}")
        return Corpus(writer.commit(text_bytes=text_bytes))


def _encoder(tokenizer: PreTrainedTokenizerBase):
    """A function from a list of documents to their lists of token ids."""
    if not tokenizer.is_fast:
        return lambda batch: tokenizer(batch, add_special_tokens=False)["input_ids"]
    # A copy: truncation and padding of the caller's tokenizer are state we must not obey or change.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()

    most = 2 * long_documents.WINDOW if long_documents.can_split(backend) else math.inf

    def encode(batch: list[str]) -> list[Sequence[int]]:
        short = [document for document in batch if len(document) <= most]
        encodings = iter(backend.encode_batch_fast(short, add_special_tokens=False))
        return [
            next(encodings).ids
            if len(document) <= most
            else long_documents.encode_long(backend, document)
            for document in batch
        ]

    return encode


def _utf8_bytes(document: str) -> int:
    try:
        return len(document.encode())
    except UnicodeEncodeError as error:  # half a pair, as \ud83d alone in JSON
        raise ValueError(
            f"inputs: the document that starts {document[:60]!a} is no Unicode text: {error}; "
            "remove that character"
        ) from error


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _checked_strings(documents: Any) -> Iterator[str]:
    if isinstance(documents, (str, bytes, os.PathLike)):
        raise ValueError("inputs: with as_text=True pass an iterable of documents, not one string")
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(
                f"inputs: document {number} is {type(document).__name__}, expected str"
            )
        yield document


def _sources(inputs: Any) -> list[str]:
    """Files and dataset names in reading order; directories replaced by the files below them."""
    names = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    if not isinstance(names, Iterable) or isinstance(names, bytes):
        names = [names]
    sources: list[str] = []
    for given in names:
        if not isinstance(given, (str, os.PathLike)):
            raise TypeError(
                f"inputs: expected paths or dataset names, got {given!r:.60}; pass as_text=True if "
                "the inputs are the documents themselves"
            )
        name = os.fspath(given)
        if name.startswith("hf:"):
            if not name[3:].split(":")[0].strip():
                raise ValueError(
                    f"inputs: {name!r} names no dataset; expected hf:NAME, hf:NAME:CONFIG or "
                    "hf:DIRECTORY"
                )
            sources.append(name)
        # os.path, not Path: a long document passed as a path must not end in an OSError.
        elif os.path.isdir(name):
            below = (f for f in sorted(Path(name).rglob("*")) if f.is_file())
            files = [f for f in below if f.name.endswith(_SUFFIXES)]
            if not files:
                raise ValueError(f"inputs: directory {name!r} has no file ending in {_SUFFIXES}")
            sources += map(str, files)
        elif not os.path.isfile(name):
            raise ValueError(
                f"inputs: there is no file {name[:200]!r}; prefix dataset names with hf:, and pass "
                "as_text=True if the inputs are the documents themselves"
            )
        elif not name.endswith(_SUFFIXES):
            raise ValueError(f"inputs: {name!r} must end in one of {', '.join(_SUFFIXES)}")
        else:
            sources.append(name)
    return sources


def _text_size(sources: list[str]) -> int | None:
    """Bytes of all documents and the few of their separators; None where only reading would tell,
    as of packed files."""
    if not all(source.endswith(".txt") and not source.startswith("hf:") for source in sources):
        return None
    return sum(map(os.path.getsize, sources))


def _documents(source: str, text_field: str, split: str) -> Iterator[str]:
    if source.startswith("hf:"):
        yield from _hub_documents(source[3:], text_field, split)
        return
    path = Path(source)
    opener = _OPENERS.get(path.suffix, open)
    reader = _jsonl_documents if ".jsonl" in path.suffixes[-2:] else _text_documents
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            yield from reader(lines, source, text_field)
    except UnicodeDecodeError as error:
        raise ValueError(f"inputs: {source!r} is not UTF-8 text: {error}") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"inputs: {source!r} is damaged or not compressed: {error}") from error


def _text_documents(lines: Iterable[str], _source: str, _field: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.strip() == SEPARATOR:
            yield "".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    yield "".join(document).strip("\n")


def _jsonl_documents(lines: Iterable[str], source: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"inputs: {source!r} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"inputs: {source!r} line {number} has no string field {field!r} (found {found}); "
                "name the field with text_field (--text-field)"
            )
        yield record[field]


def _hub_documents(name: str, field: str, split: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"inputs: hf:{name} needs the datasets package (pip install datasets)"
        ) from error
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    parts = [name] if Path(name).is_dir() else name.split(":", 1)
    try:
        if saved:  # by save_to_disk; any other directory is laid out as on the hub
            table = datasets.load_from_disk(name)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise ValueError(f"it has no such split, only {sorted(table)}")
                table = table[split]
        else:
            table = datasets.load_dataset(*parts, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"inputs: hf:{name}, split {split!r} (--split), cannot be loaded: {error}"
        ) from error
    if field not in table.column_names:
        raise ValueError(
            f"inputs: hf:{name} has no column {field!r}, only {table.column_names}; name it with "
            "text_field (--text-field)"
        )
    for number, record in enumerate(table):
        if not isinstance(record[field], str):
            raise ValueError(
                f"inputs: hf:{name} row {number} has {record[field]!r:.60} in column {field!r}, "
                "expected a string; filter such rows, or name another column with text_field "
                "(--text-field)"
            )
        yield record[field]
