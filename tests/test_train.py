"""The trainer against the official dense formulation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_fixtures
from pipeline_fixtures import FAMILIES, tiny_model, tiny_tokenizer
from train_fixtures import BLOCK, STRIDE, config, make_corpus, same, steps, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdkernels import memory_loss
from mdkernels.distributed import Processes
from mdkernels.schedule import Schedule
from mdkernels.train import TrainConfig, train

data = train_fixtures.data


def dense_reference(data, model, order, *, beta, lr, objective_steps, batch_size, weight_decay=0.0):
    """The official step: dense targets, F.kl_div and CrossEntropyLoss on the logits."""
    corpus, targets = data
    tokens = torch.from_numpy(corpus.token_ids.astype(np.int64))
    spans = corpus.windows(BLOCK, STRIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(objective_steps):
        picked = order[step * batch_size : (step + 1) * batch_size]
        logits, labels, dense = [], [], []
        for start, stop in spans[picked]:
            first = max(0, stop - BLOCK)
            full = model(tokens[first:stop][None]).logits[0]
            logits.append(full[start - first :])
            labels.append(tokens[start + 1 : stop + 1])
            dense.append(targets.rows(int(start), int(stop)).to_dense(full.shape[1]))
        logits, labels, dense = torch.cat(logits), torch.cat(labels), torch.cat(dense).float()
        kl = F.kl_div(logits.log_softmax(-1), dense, reduction="batchmean")
        ce = F.cross_entropy(logits, labels)
        loss = beta * kl + (1 - beta) * ce
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((loss.item(), kl.item(), ce.item()))
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("objective", "beta"), [("kl_ce", 0.5), ("kl", 1.0), ("ce", 0.0)])
def test_twenty_steps_follow_the_official_dense_loss(data, tmp_path, family, objective, beta):
    settings = config(
        data,
        tmp_path / "out",
        objective=objective,
        targets=data[1],
        model=tiny_model(family, seed=3),
        max_steps=20,
        schedule="constant",
    )
    result = train(settings)
    count = len(data[0].windows(BLOCK, STRIDE))
    order = np.concatenate(
        [np.random.default_rng((0, epoch)).permutation(count) for epoch in range(9)]
    )
    model = tiny_model(family, seed=3).train()
    losses = dense_reference(
        data, model, order, beta=beta, lr=3e-3, objective_steps=20, batch_size=4
    )
    for row, (loss, kl, ce) in zip(steps(result), losses, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=2e-4)
        assert row["kl"] == pytest.approx(kl, rel=2e-4)
        assert row["ce"] == pytest.approx(ce, rel=2e-4)
    assert steps(result)[0]["loss"] == pytest.approx(losses[0][0], rel=2e-6)


def test_gradients_of_one_step_equal_the_dense_loss(data, tmp_path):
    """SGD-like check that Adam's normalisation cannot hide: compare moments after one step."""
    settings = config(data, tmp_path / "out", max_steps=2, save_every=1, clip=None)
    train(settings)
    from safetensors.torch import load_file

    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    state = load_file(checkpoint / "training_state.safetensors")
    order = np.random.default_rng((0, 0)).permutation(len(data[0].windows(BLOCK, STRIDE)))
    model = tiny_model("llama", seed=3).train()
    corpus, targets = data
    tokens = torch.from_numpy(corpus.token_ids.astype(np.int64))
    rows, total = 0, 0.0
    for start, stop in corpus.windows(BLOCK, STRIDE)[order[:4]]:
        first = max(0, stop - BLOCK)
        logits = model(tokens[first:stop][None]).logits[0][start - first :].double()
        dense = targets.rows(int(start), int(stop)).to_dense(logits.shape[1]).double()
        q = logits.log_softmax(-1)
        total = total + 0.5 * (torch.xlogy(dense, dense) - dense * q).sum()
        total = total + 0.5 * F.nll_loss(q, tokens[start + 1 : stop + 1], reduction="sum")
        rows += int(stop - start)
    (total / rows).backward()
    for name, parameter in model.named_parameters():
        ours = state[f"adamw.{name}.exp_avg"] / (1 - 0.9)
        scale = parameter.grad.abs().max()
        assert (ours - parameter.grad).abs().max() < 1e-5 * scale + 1e-9, name


def test_only_scored_positions_reach_the_head(data, tmp_path, monkeypatch):
    shapes = set()
    op = memory_loss.linear_sparse_kl

    def recorded(hidden, *arguments, **options):
        shapes.add(tuple(hidden.shape))
        return op(hidden, *arguments, **options)

    monkeypatch.setattr(memory_loss, "linear_sparse_kl", recorded)
    model = tiny_model("llama", seed=3)
    called = set()
    handle = model.lm_head.register_forward_pre_hook(lambda _m, args: called.add(args[0].shape))
    train(config(data, tmp_path / "out", model=model, max_steps=6))
    handle.remove()
    assert called <= {(1, 8, 32)}  # the probe that compares the head with the model's logits
    assert (4 * STRIDE, 32) in shapes
    assert shapes <= {(4 * STRIDE, 32), (3 * STRIDE + BLOCK, 32)}


def test_accumulated_batches_equal_one_large_batch(data, tmp_path):
    one = train(config(data, tmp_path / "one", batch_size=8, epochs=2))
    accumulated = train(config(data, tmp_path / "many", batch_size=2, grad_accum=4, epochs=2))
    assert one.steps == accumulated.steps
    for left, right in zip(steps(one), steps(accumulated), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_a_fraction_of_an_epoch_is_meant_as_it_is_written():
    """In floats 1.1 * 100 is a little more than 110."""
    data = range(100)  # as many windows
    for epochs, count in ((1.1, 110), (0.07, 7), (1, 100), (1.101, 111), (1e-9, 1)):
        settings = TrainConfig(
            corpus="c", model="m", out="o", objective="ce", epochs=epochs, batch_size=10
        )
        assert Schedule(data, settings, Processes("cpu")).windows == count


def test_every_window_is_read_once_per_epoch(data, tmp_path, monkeypatch):
    from mdkernels.batches import WindowBatches

    seen = []
    gather = WindowBatches.gather
    monkeypatch.setattr(
        WindowBatches,
        "gather",
        lambda self, spans, *more, **options: (
            seen.extend(map(tuple, spans)) or gather(self, spans, *more, **options)
        ),
    )
    result = train(config(data, tmp_path / "out", epochs=2, batch_size=5))
    spans = sorted(map(tuple, data[0].windows(BLOCK, STRIDE)))
    count = len(spans)
    assert sorted(seen[:count]) == spans
    assert sorted(seen[count:]) == spans
    assert seen[:count] != seen[count:]
    assert result.epochs == 2
    assert result.steps == -(-2 * count // 5)


@pytest.mark.parametrize("objective", ["kl_ce", "kl", "ce"])
def test_training_learns_and_the_result_loads(data, tmp_path, objective):
    result = train(config(data, tmp_path / "out", objective=objective, epochs=4, lr=1e-2))
    rows = steps(result)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    assert same(weights(loaded), weights(result.model))
    assert len(AutoTokenizer.from_pretrained(result.path)) == len(tiny_tokenizer())
    assert not result.model.training
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert (rows[0]["kl"] is None) == (objective == "ce")
    assert not (tmp_path / "out.partial").exists()


def test_a_tokenizer_may_write_any_file(data, tmp_path):
    class Chatty(type(tiny_tokenizer())):
        def save_pretrained(self, directory, **options):
            saved = super().save_pretrained(directory, **options)
            (Path(directory) / "Additional-Templates").mkdir()
            (Path(directory) / "Read-Me.md").write_text("hello")
            return saved

    tokenizer = Chatty(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    result = train(config(data, tmp_path / "out", tokenizer=tokenizer, max_steps=1))
    assert (result.path / "Read-Me.md").read_text() == "hello"
    assert (result.path / "Additional-Templates").is_dir()


def test_bfloat16_stays_close_to_float32(data, tmp_path):
    plain = steps(train(config(data, tmp_path / "a")))
    low = steps(train(config(data, tmp_path / "b", dtype="bfloat16")))
    for left, right in zip(plain, low, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-2)


@pytest.mark.slow
def test_compiled_trunk_gives_the_same_run(data, tmp_path):
    small = {"max_steps": 4, "save_every": None}
    models = [tiny_model("llama", seed=3, layers=1) for _ in range(2)]
    plain = steps(train(config(data, tmp_path / "a", model=models[0], **small)))
    compiled = steps(train(config(data, tmp_path / "b", model=models[1], compile=True, **small)))
    for left, right in zip(plain, compiled, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_schedules():
    from mdkernels.optimizer import lr_factor

    def factors(schedule, warmup):
        made = TrainConfig(
            corpus="c",
            model="m",
            out="o",
            objective="ce",
            max_steps=8,
            schedule=schedule,
            warmup_steps=warmup,
        )
        return [lr_factor(step, 8, made) for step in range(1, 9)]

    assert factors("constant", 0) == [1.0] * 8
    assert factors("linear", 0) == [1 - i / 8 for i in range(8)]
    assert factors("linear", 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = factors("cosine", 2)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:3]) + sorted(cosine[3:], reverse=True)


def test_weight_decay_leaves_norms_biases_and_embeddings(data, tmp_path):
    from mdkernels.optimizer import adamw

    for family in FAMILIES:
        model = tiny_model(family)
        optimizer = adamw(model, config(data, tmp_path, weight_decay=0.1))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, plain = (
            {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
        )
        assert len(decayed) + len(plain) == len(names)
        assert all(dict(model.named_parameters())[name].dim() == 2 for name in decayed)
        assert not any("emb" in n or "wte" in n or "wpe" in n or "lm_head" in n for n in decayed)


def test_evaluation_during_training_changes_nothing_but_is_recorded(data, tmp_path):
    plain = train(config(data, tmp_path / "a"))
    calls = []

    def hook(model, step):
        assert not model.training
        torch.rand(5)
        calls.append(step)
        return {"step_squared": step * step}

    watched = train(config(data, tmp_path / "b", eval_every=5), on_eval=hook)
    assert calls == [5, 10, 12]
    assert [row for row in watched.metrics if "eval" in row] == [
        {"step": step, "eval": {"step_squared": step * step}} for step in calls
    ]
    assert same(weights(plain.model), weights(watched.model))


def test_built_in_mixture_evaluation(data, tmp_path):
    valid = make_corpus(tmp_path / "valid", 3, seed=9)
    result = train(
        config(data, tmp_path / "out", valid=valid, base=tiny_model("gpt2"), eval_every=6)
    )
    evaluations = [row["eval"] for row in result.metrics if "eval" in row]
    assert len(evaluations) == 2
    for row in evaluations:
        best = min(row["base_perplexity"], row["memory_perplexity"])
        assert row["mixture_perplexity"] <= best * (1 + 1e-6)
