"""`mdkernels chat`: the tokens of plain greedy decoding over the whole conversation."""

import io

import pytest
import torch
from pipeline_fixtures import save_tiny_checkpoint, save_tiny_pair, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from mdkernels import cli
from mdkernels.chat import chat
from mdkernels.decode import decode
from mdkernels.mixture import MemoryMixture

NEW = 5
LINES = ["the tensor", "a kernel sorts"]
# Writes earlier replies otherwise than they were generated, as templates that drop thoughts do.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} "
    "{{ 'the index' if m['role'] == 'assistant' else m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("models"))


def replies(tokenizer, encode):
    """Each reply to LINES, with no cache kept between them."""
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.6)
    found, read = [], []
    for line in LINES:
        ids = encode(found, read, line)
        eos = {"eos_token_id": tokenizer.eos_token_id}
        read = decode(mixture, torch.tensor([ids]), max_new_tokens=NEW, **eos)[0].tolist()
        found.append(tokenizer.decode(read[len(ids) :], skip_special_tokens=True))
    return found


def plain(_, read, line):
    text = "\n" + line if read else line
    return read + tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def templated(said, _, line):
    text = "".join(f"user {asked}\nassistant the index\n" for asked in LINES[: len(said)])
    text += f"user {line}\nassistant "
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("encode", [plain, templated])
def test_replies_are_those_of_decoding_the_whole_conversation(
    checkpoints, encode, monkeypatch, capsys
):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE if encode is templated else None
    # An empty line is no turn.
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LINES[0]}\n  \n{LINES[1]}\n"))
    chat(*checkpoints, tokenizer=tokenizer, mix_weight=0.6, max_new_tokens=NEW)
    first, second = replies(tokenizer, encode)
    assert capsys.readouterr().out == f"> {first}\n> > {second}\n> \n"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_defaults_of_the_base_are_not_those_of_chat(
    tmp_path, temperature, monkeypatch, capsys
):
    """But for what ends a reply. Instruction-tuned checkpoints come with such ones."""
    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    memory = save_tiny_checkpoint(tmp_path / "memory", "gpt2", seed=1)
    tokenizer, options = tiny_tokenizer(), {"max_new_tokens": 12, "temperature": temperature}
    ids = tokenizer(LINES[0], add_special_tokens=False)["input_ids"]
    mixture = MemoryMixture.from_pretrained(base, memory)
    more = {} if temperature == 0.0 else {"seed": 1}
    new = decode(mixture, torch.tensor([ids]), **options, **more)[0, len(ids) :].tolist()
    end = new[5]
    GenerationConfig(
        do_sample=True,
        eos_token_id=[0, end],
        repetition_penalty=1.1,
        temperature=0.7,
        top_k=2,
        top_p=0.8,
    ).save_pretrained(base)
    monkeypatch.setattr("sys.stdin", io.StringIO(LINES[0] + "\n"))
    chat(base, memory, **options)
    reply = tokenizer.decode(new[: new.index(end) + 1], skip_special_tokens=True)
    assert capsys.readouterr().out == f"> {reply}\n> \n"


def test_a_closed_stdin(checkpoints, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="stdin: is closed"):
        chat(*checkpoints)


def test_the_models_read_each_token_once(checkpoints, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(LINES) + "\n"))
    seen = []
    embedding = torch.nn.Embedding.forward

    def count(self, ids):
        if self.num_embeddings == 320:
            seen.append(ids.numel())
        return embedding(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", count)
    chat(*checkpoints, max_new_tokens=NEW)
    tokenizer = tiny_tokenizer()
    asked = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (LINES[0], "\n" + LINES[1])
    ]
    # Two models; the last token of the conversation is never read.
    assert sum(seen) == 2 * (sum(asked) + 2 * NEW - 1)


def test_sampling_repeats_and_a_full_context_says_so(checkpoints, monkeypatch, capsys):
    base, memory = checkpoints
    command = ["chat", "--base", base, "--memory", memory, "--max-new-tokens", "8"]
    shown = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(LINES) + "\n"))
        assert cli.main([*command, "--temperature", "1"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("a kernel sorts the index\n" * 20))
    assert cli.main(command) == 2
    assert "context of" in capsys.readouterr().err
    assert cli.main([*command, "--temperature", "-1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "temperature: expected a finite number of at least 0, got -1" in captured.err
