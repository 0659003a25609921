"""`generate` and `chat` with the directory of a saved mixture, which brings weight and memories."""

import io

import pytest
import torch
from pipeline_fixtures import FAMILIES, save_tiny_checkpoint, save_tiny_pair, tiny_tokenizer

from mdkernels import cli
from mdkernels.chat import chat
from mdkernels.generate import generate
from mdkernels.mixture import MemoryMixture

PROMPT, NEW = "the tensor returns", {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("models"))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights_are_those_of_the_parts(tmp_path, family):
    """Rotary frequencies are no weights: in bf16 every position would be a little off."""
    base = save_tiny_checkpoint(tmp_path / "base", family)
    memory = save_tiny_checkpoint(tmp_path / "memory", family, seed=1)
    bf16 = {"dtype": torch.bfloat16}
    MemoryMixture.from_pretrained(base, memory).save_pretrained(tmp_path / "mixture")
    one = MemoryMixture.from_pretrained(tmp_path / "mixture", **bf16)
    two = MemoryMixture.from_pretrained(base, memory, **bf16)
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    for (name, x), (_, y) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        assert x.dtype == y.dtype, name


def test_no_memory_needs_a_saved_mixture(parts, saved):
    base, memory = parts
    live = MemoryMixture.from_pretrained(saved)
    two = [memory, memory]
    for models, options, message in (
        ((base, None), {}, r"memory: got none, and .* is not the directory of a saved"),
        ((live, None), {}, "memory: got none with a live base"),
        ((live.base, None), {}, "memory: got none with a live base"),
        ((base, two), {}, "got 1 weight.* for 2 memories"),
        ((saved, None), {"mix_weight": [0.2, 0.3]}, "got 2 weight.* for 1 memories"),
        ((saved, None), {"mix_weight": "a"}, "mix_weight: expected a number or one for each"),
        ((saved, memory), {}, "base: .* is a mixture itself, .*leave memory out"),
        ((saved, []), {}, "base: .* is a mixture itself, .*leave memory out"),
        ((live, memory), {}, "base: .* is a mixture itself, .*leave memory out"),
        ((base, saved), {}, "memory: .* is a mixture itself"),
        ((base, [None]), {}, "memory: got None in a list"),
    ):
        with pytest.raises(ValueError, match=message):
            text(*models, **options)
