"""The Python blocks of README.md, as they are printed there."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from integration_fixtures import topk_examples
from pipeline_fixtures import VOCAB_SIZE, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from train_fixtures import make_corpus, make_targets, same, weights
from transformers import AutoModelForCausalLM

import mdkernels
from mdkernels.datastore import open_datastore
from mdkernels.integrations import SparseKLTrainer
from mdkernels.targets import open_targets

README = Path(__file__).resolve().parents[1] / "README.md"
# What each block is recognised by; every block of the README has a test below.
MIXTURE, DRAFTS, LOSS = "MemoryMixture.from", "fast_decode", "from_padded"
LOOP, TRAINER, TRL = "for batch in loader", "import TrainingArguments", "SFTTrainer"
LIGHTNING, TOPK, MLP = "LightningModule", "from_topk_logprobs", "KeyDataset"
LM_EVAL = "MixtureLM"


@functools.cache
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def run(mark: str, names: dict) -> dict:
    """Execute the block with that mark, where `names` are what the README leaves to its reader."""
    (source,) = [text for text in blocks() if mark in text]
    exec(compile(source, f"README.md: {mark}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with runs/corpus, runs/datastore, runs/targets."""
    path = tmp_path_factory.mktemp("readme")
    make_targets(make_corpus(path / "runs" / "corpus", count=100), path / "runs")
    return path


@pytest.fixture
def names(root, monkeypatch):
    """A model with its optimizer, in a directory with runs/."""
    monkeypatch.chdir(root)
    model = tiny_model("llama", context=1024).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {"model": model, "optimizer": optimizer, "before": weights(model)}


def test_every_block_is_tested_and_short():
    marks = (MIXTURE, DRAFTS, LM_EVAL, LOSS, LOOP, TRAINER, LIGHTNING, TOPK, TRL, MLP)
    assert [sum(mark in text for mark in marks) for text in blocks()] == [1] * len(marks)
    for text in blocks():
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) < 10, text


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mixture(tmp_path, monkeypatch):
    """The hub id is also a relative path."""
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint("Qwen/Qwen2.5-1.5B", "qwen2", context=256)
    save_tiny_checkpoint("path/to/memory", "llama", context=256, seed=1)
    names = run(MIXTURE, {"torch": torch, "tokenizer": tiny_tokenizer()})
    loaded = AutoModelForCausalLM.from_pretrained("mixture")
    ids = names["ids"]["input_ids"]
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (loaded, names["model"]))
    assert torch.equal(found, expected)
    drawn = []
    generate = names["model"].generate
    names["model"].generate = lambda **options: drawn.append(generate(**options))
    run(DRAFTS, names)
    run(DRAFTS, names)
    assert drawn[0].shape[1] > ids.shape[1]
    assert torch.equal(*drawn)


def test_lm_eval(tmp_path):
    """One task, of one local file."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "rows.jsonl").write_text('{"text": "the tensor returns"}')
    task = {
        "task": "readme",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    mixture = mdkernels.MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.4)
    names = {"model": mixture, "tokenizer": tiny_tokenizer(), "tasks": [task]}
    found = run(LM_EVAL, names)["results"]["results"]["readme"]["word_perplexity,none"]
    ids = torch.tensor([[0, *tiny_tokenizer()("the tensor returns").input_ids]])
    with torch.no_grad():
        nats = float(mixture(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found == pytest.approx(math.exp(nats / 3), rel=1e-4)


def test_losses_of_padded_lists(names, capsys):
    ids = draw(6, 40, seed=1).argsort(1)[:, :5]
    probs = draw(6, 5, seed=2).softmax(1)
    inputs, labels = torch.arange(6).view(2, 3), torch.arange(6)
    run(LOSS, names | {"ids": ids, "probs": probs, "inputs": inputs, "labels": labels})
    logq = names["model"](inputs).logits.flatten(0, 1).double().log_softmax(1)
    dense = torch.zeros_like(logq).scatter(1, ids, probs.double())
    expected = F.kl_div(logq, dense, reduction="batchmean"), F.nll_loss(logq, labels)
    shown = [float(number) for number in capsys.readouterr().out.split()]
    assert shown == pytest.approx([float(t.detach()) for t in expected], rel=1e-5)
    assert names["model"].lm_head.weight.grad.abs().sum() > 0


def test_plain_loop_trainer_and_lightning(names):
    """One after the other, as they build upon each other."""
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is absent")
    pytest.importorskip("lightning", reason="lightning is not installed")
    model = names["model"]
    for mark in (LOOP, TRAINER, LIGHTNING):
        run(mark, names)
        assert not same(names["before"], weights(model))
        names["before"] = weights(model)
    assert names["trainer"].state.global_step == 3 * -(-len(names["windows"]) // 8)
    assert names["memory"].trainer.global_step == len(names["loader"])


def test_topk_teacher_against_dense_kl(names):
    """A teacher whose 4 most probable tokens are known; two positions are padding."""
    teacher = 3 * draw(2, 5, VOCAB_SIZE, seed=1)
    logprobs, token_ids = teacher.log_softmax(-1).topk(4)
    mask = torch.ones(2, 5, 4, dtype=torch.int64)
    mask[0, 4:], mask[1, 3, 1:] = 0, 0
    input_ids = torch.arange(10).view(2, 5)
    shift_labels = torch.tensor([[1, 2, 3, 4, -100], [-100, 7, 8, 9, 5]])
    given = {"token_ids": token_ids, "logprobs": logprobs, "mask": mask, "input_ids": input_ids}
    names |= given | {"shift_labels": shift_labels, "mdkernels": mdkernels}
    found = run(TOPK, names)["out"].loss
    known = logprobs.double().masked_fill(mask == 0, -torch.inf).softmax(-1).nan_to_num(0)
    dense = torch.zeros(2, 5, VOCAB_SIZE, dtype=torch.float64).scatter(-1, token_ids, known)
    logq = names["model"](input_ids).logits.double().log_softmax(-1)
    scored = shift_labels != -100
    kl = F.kl_div(logq[scored], dense[scored], reduction="batchmean")
    expected = 0.9 * kl + 0.1 * F.nll_loss(logq[scored], shift_labels[scored])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_trl_on_topk_columns(names, monkeypatch):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    monkeypatch.setenv("CI", "1")  # no telemetry
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    model = AutoModelForCausalLM.from_pretrained(save_tiny_checkpoint("gpt", "gpt2"))
    before = weights(model)
    data = Dataset.from_list(topk_examples())
    run(TRL, names | {"SparseKLTrainer": SparseKLTrainer, "model": model, "dataset": data})
    assert not same(before, weights(model))


def test_mlp_memory_on_the_keys(names):
    """Several epochs of the README's loop bring an MLP close to the targets."""
    store = open_datastore("runs/datastore")
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(
        torch.nn.Linear(store.dim, 64), torch.nn.GELU(), torch.nn.Linear(64, VOCAB_SIZE)
    )
    names |= {"mlp": mlp, "torch": torch, "mdkernels": mdkernels}
    names["optimizer"] = torch.optim.AdamW(mlp.parameters(), lr=1e-2)
    keys, targets = torch.tensor(store.keys).float(), open_targets("runs/targets")

    @torch.no_grad()
    def kl():
        everything = targets.rows(0, store.num_rows)
        return float(mdkernels.sparse_kl(mlp(keys), everything, kl_weight=1.0).kl)

    before = kl()
    for _ in range(8):
        run(MLP, names)
    assert kl() < 0.3 * before
