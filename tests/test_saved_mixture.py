"""`generate` and `chat` with the directory of a saved mixture, which brings weight and memories."""

import io

import pytest
from pipeline_fixtures import save_tiny_checkpoint, tiny_tokenizer

from mdkernels import cli
from mdkernels.chat import chat
from mdkernels.generate import generate
from mdkernels.mixture import MemoryMixture

PROMPT, NEW = "the tensor returns", {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_tiny_checkpoint(root / "base", "llama")
    return base, save_tiny_checkpoint(root / "memory", "gpt2", seed=1)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "mixture"
    options = {"mix_weight": 0.97, "memory_temperature": 3.0}
    MemoryMixture.from_pretrained(*parts, **options).save_pretrained(out)
    return out


def text(base, memory, **options):
    return generate(base, memory, PROMPT, tokenizer=tiny_tokenizer(), **NEW, **options)[0][
        "mixture"
    ]


def test_its_own_weight_and_temperature_count(parts, saved):
    own = text(saved, None)
    assert own == text(*parts, mix_weight=0.97, memory_temperature=3.0)
    assert own != text(*parts)
    assert text(*parts) == text(*parts, mix_weight=0.5, memory_temperature=1.0)


def test_given_ones_count_instead(parts, saved):
    given = text(saved, None, mix_weight=0.5, memory_temperature=1.0)
    assert given == text(*parts, mix_weight=0.5, memory_temperature=1.0)


def test_on_the_command_line(parts, saved, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"tokenizer: {saved} holds none; .*--tokenizer"):
        generate(saved, None, PROMPT)
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    sampling = ["--max-new-tokens", "10", "--temperature", "1", "--seed", "3", "--quiet"]
    command = ["generate", "--base", str(saved), "--prompt", PROMPT, *sampling]
    assert cli.main([*command, "--tokenizer", str(tokenizer)]) == 0
    assert text(saved, None) in capsys.readouterr().out
    tiny_tokenizer().save_pretrained(saved)
    assert cli.main([*command, "--side-by-side"]) == 0
    assert text(saved, None) in capsys.readouterr().out


def test_chat(parts, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "mixture"  # without a temperature, for which chat has no option
    MemoryMixture.from_pretrained(*parts, mix_weight=0.97).save_pretrained(saved)

    def replies(base, memory, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO("the tensor\na kernel\n"))
        chat(base, memory, tokenizer=tiny_tokenizer(), max_new_tokens=8, **options)
        return capsys.readouterr().out

    own, given = replies(saved, None), replies(saved, None, mix_weight=0.1)
    assert own == replies(*parts, mix_weight=0.97)
    assert given == replies(*parts, mix_weight=0.1)
    assert own != given


def test_no_memory_needs_a_saved_mixture(parts, saved):
    live = MemoryMixture.from_pretrained(saved)
    for base in (parts[0], live, live.base):
        with pytest.raises(ValueError, match=r"memory: got none, and .* is not the directory of a"):
            text(base, None)
    with pytest.raises(ValueError, match=r"got 1 weight.* for 2 memories"):
        text(parts[0], [parts[1], parts[1]])
    with pytest.raises(ValueError, match=r"got 2 weight.* for 1 memories"):
        text(saved, None, mix_weight=[0.2, 0.3])
