"""Every stage end to end through the command line, on real artefacts, in seconds."""

import json
import lzma
import shutil

import pytest
import torch
from pipeline_fixtures import (
    FAMILIES,
    require_shared_data,
    save_tiny_checkpoint,
    tiny_documents,
)
from transformers import AutoModelForCausalLM

from mdkernels import cli
from mdkernels.corpus import open_corpus
from mdkernels.targets import open_targets

SEPARATOR = "\n<|endoftext|>\n"


def command(*arguments):
    """Run one command line that must succeed."""
    assert cli.main(list(map(str, arguments))) == 0, arguments


def write_documents(path, documents):
    path.write_text(SEPARATOR.join(documents), encoding="utf-8")
    return path


def stages(root, base, key_model, *, block, neighbors, train_steps, temperature):
    """corpus -> datastore -> index -> targets -> train -> evaluate; returns the evaluation."""
    for split in ("train", "valid", "test"):
        command(
            "corpus", "--inputs", root / f"{split}.txt", "--tokenizer", base, "--out", root / split
        )
    windows = ("--block", block, "--batch-size", 8)
    command(
        "datastore", "--corpus", root / "train", "--model", key_model, "--out", root / "datastore",
        *windows,
    )  # fmt: skip
    command("index", "--datastore", root / "datastore", "--out", root / "index")
    command(
        "targets", "--datastore", root / "datastore", "--index", root / "index",
        "--num-neighbors", neighbors, "--knn-temperature", temperature, "--out", root / "targets",
    )  # fmt: skip
    command(
        "train", "--corpus", root / "train", "--targets", root / "targets", "--model", base,
        "--max-steps", train_steps, "--lr", "3e-3", "--device", "cpu", "--out", root / "memory",
        "--valid", root / "valid", "--base", base, *windows,
    )  # fmt: skip
    command(
        "evaluate", "--base", base, "--memory", root / "memory", "--corpus", root / "test",
        "--valid", root / "valid", "--device", "cpu", "--out", root / "eval.json", *windows,
    )  # fmt: skip
    return json.loads((root / "eval.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_mixture(family, tmp_path, capsys):
    for i, split in enumerate(("train", "valid", "test")):
        write_documents(tmp_path / f"{split}.txt", tiny_documents(12 if i == 0 else 4, seed=20 + i))
    base = save_tiny_checkpoint(tmp_path / "base", family)
    key_model = save_tiny_checkpoint(tmp_path / "key", "llama", seed=5)
    report = stages(
        tmp_path, base, key_model, block=32, neighbors=16, train_steps=30, temperature=20.0
    )

    corpus, targets = open_corpus(tmp_path / "train"), open_targets(tmp_path / "targets")
    assert targets.num_rows == corpus.num_rows
    targets.rows(0, corpus.num_rows).validate(corpus.vocab_size)
    # A random base knows nothing: 30 steps on text of the same grammar must show in the mixture.
    assert report["mixture"]["gain_nats"] > 0.5
    assert report["mixture"]["gain_interval"][0] > 0
    assert report["mixture"]["mix_weight"][0] > 0.5

    rows = [json.loads(line) for line in (tmp_path / "memory" / "metrics.jsonl").open()]
    scores = rows[-1]["eval"]
    assert scores["mixture_perplexity"] < scores["base_perplexity"]
    shown = f"mixture perplexity {scores['mixture_perplexity']:.2f} (base "
    assert shown in capsys.readouterr().out
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert memory.config.model_type == family
    assert torch.isfinite(memory(torch.ones(1, 4, dtype=torch.int64)).logits).all()

    command(
        "generate", "--base", base, "--memory", tmp_path / "memory", "--prompt", "the tensor",
        "--mix-weight", 0.9, "--max-new-tokens", 8, "--side-by-side", "--device", "cpu",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.startswith("--- base\nthe tensor")
    assert "--- mixture\nthe tensor" in shown


def test_a_stage_before_its_input_exists_says_which_command_makes_it(tmp_path, capsys):
    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    nowhere = tmp_path / "nowhere"
    capsys.readouterr()
    out = ("--out", tmp_path / "out")
    for made_by, arguments in (
        ("corpus", ("datastore", "--corpus", nowhere, "--model", base)),
        ("datastore", ("index", "--datastore", nowhere)),
        ("corpus", ("train", "--corpus", nowhere, "--objective", "ce", "--model", base,
                    "--epochs", 1)),
    ):  # fmt: skip
        assert cli.main(list(map(str, (*arguments, *out)))) == 2
        err = capsys.readouterr().err
        assert f"no {made_by} artefact at {nowhere}" in err
        assert f"`mdkernels {made_by}`" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_artefact_stops_the_next_stage(tmp_path, capsys):
    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    text = write_documents(tmp_path / "train.txt", tiny_documents(3))
    command("corpus", "--inputs", text, "--tokenizer", base, "--out", tmp_path / "corpus")
    whole = tmp_path / "corpus" / "token_ids.bin"
    original = whole.read_bytes()
    for damaged in (original[:-2], original + b"\0\0", original[:10] + b"\7\7" + original[12:]):
        shutil.copytree(tmp_path / "corpus", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / "token_ids.bin").write_bytes(damaged)
        arguments = ("train", "--corpus", tmp_path / "bad", "--objective", "ce", "--model", base,
                     "--max-steps", 1, "--block", 32, "--out", tmp_path / "out")  # fmt: skip
        assert cli.main(list(map(str, arguments))) == 2
        assert "token_ids.bin" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pretrained_model_and_real_text(tmp_path):
    """A 260K-parameter pretrained Llama as base, key model and start of the memory."""
    model = require_shared_data("models/stories260K")
    text = require_shared_data("general/wikitext-2.valid.txt.xz")
    with lzma.open(text, "rt", encoding="utf-8") as stream:
        lines = stream.read(60_000)
    for i, split in enumerate(("train", "valid", "test")):
        (tmp_path / f"{split}.txt").write_text(lines[20_000 * i : 20_000 * (i + 1)])
    report = stages(
        tmp_path, model, model, block=128, neighbors=64, train_steps=30, temperature=5.0
    )
    # From children's stories to encyclopedia text: a first run gained 1.91 nats.
    assert report["mixture"]["gain_nats"] > 1.0
    assert report["mixture"]["nats_per_token"] <= report["memories"][0]["nats_per_token"]
