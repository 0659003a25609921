"""Adapters, trackers, Ctrl-C, and resuming exactly under every option that could break
it."""

import dataclasses
import os
import signal

import pytest
import torch
import train_fixtures
from pipeline_fixtures import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from train_fixtures import Stop, config, needs_peft, same, steps, weights
from transformers import AutoModelForCausalLM

from mdkernels import cli
from mdkernels import train as train_module
from mdkernels.interrupt import CtrlC
from mdkernels.train import train

data = train_fixtures.data


def rows_of(result):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in result.metrics]


# --- exact resume


def dropout_model(family="gpt2"):
    model = tiny_model(family, seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


HARD = {
    "epochs": 1.3,  # in the middle of the second epoch, with a short last step
    "batch_size": 5,
    "grad_accum": 3,
    "schedule": "linear",
    "warmup_steps": 2,
    "dtype": "bfloat16",
    "activation_checkpointing": True,
    "save_every": 2,
    "eval_every": 1,
}


@pytest.mark.parametrize("lora", [None, pytest.param(2, marks=needs_peft)])
def test_resume_is_exact_under_everything_at_once(data, tmp_path, lora):
    options = (
        HARD
        if lora is None
        else {
            **HARD,
            "lora": lora,
            "lora_dropout": 0.2,
            "lora_targets": ("c_attn", "c_fc"),
            "lr": 1e-2,
        }
    )
    whole = train(config(data, tmp_path / "whole", model=dropout_model(), **options))

    def stop(_model, step):
        torch.rand(3)  # an evaluation may use random numbers
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(config(data, tmp_path / "out", model=dropout_model(), **options), on_eval=stop)
    resumed = train(config(data, tmp_path / "out", model=dropout_model(), **options))
    assert same(weights(whole.model), weights(resumed.model))
    assert rows_of(whole) == rows_of(resumed)
    assert whole.steps == 10


def test_activation_checkpointing_repeats_the_dropout(data, tmp_path):
    plain = train(config(data, tmp_path / "a", model=dropout_model()))
    low = train(config(data, tmp_path / "b", model=dropout_model(), activation_checkpointing=True))
    assert same(weights(plain.model), weights(low.model))
    other = train(config(data, tmp_path / "c"))
    assert steps(other)[0]["loss"] != steps(plain)[0]["loss"]


# --- no waiting for the device


class Reads(TorchDispatchMode):
    """Operators that would wait for a GPU, because the host needs what they return."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
        if func.name().split("::")[1].split(".")[0] in waits:
            self.found.add(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_no_operator_of_a_step_reads_a_value_back(data, tmp_path, monkeypatch, family):
    """What sync debug mode shows on a GPU (test_train_gpu.py), as far as a CPU can tell."""
    step, reads = train_module._Run._step, Reads()

    def watched(self, number):
        with reads:
            step(self, number)

    with Reads() as control:
        float(torch.ones(3).sum())
    assert control.found == {"aten::_local_scalar_dense"}
    monkeypatch.setattr(train_module._Run, "_step", watched)
    options = {"dtype": "bfloat16", "grad_accum": 2, "max_steps": 2}
    train(config(data, tmp_path / "out", model=tiny_model(family, seed=3), **options))
    assert reads.found == set()


# --- adapters


@needs_peft
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_adapters_train_alone_and_end_merged_in_a_plain_directory(data, tmp_path, family):
    before = weights(tiny_model(family, seed=3))
    options = {"model": tiny_model(family, seed=3), "lora": 4, "lr": 2e-2, "save_every": 5}
    result = train(config(data, tmp_path / "out", max_steps=14, **options))
    rows = steps(result)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    names = {path.name for path in result.path.iterdir()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.startswith("adapter")}
    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    after = weights(loaded)
    assert type(loaded) is type(tiny_model(family))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("emb" in n or "wte" in n or "norm" in n or "lm_head" in n for n in changed)
    for name in changed:
        difference = (after[name] - before[name]).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 4
    checkpoint = result.path / "checkpoints" / "step-00000010"
    found = {path.name for path in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in found
    assert "model.safetensors" not in found


@needs_peft
def test_adapter_on_chosen_layers_and_refusals(data, tmp_path, monkeypatch):
    result = train(
        config(data, tmp_path / "out", lora=2, lora_targets=["q_proj"], lr=1e-2, lora_alpha=8)
    )
    before, after = weights(tiny_model("llama", seed=3)), weights(result.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    with pytest.raises(ValueError, match="lora_targets: the LM head cannot have an adapter"):
        train(config(data, tmp_path / "head", lora=2, lora_targets=["lm_head"]))
    tied = {"lora": 2, "lora_targets": ["q_proj", "embed_tokens"], "model": tiny_model("qwen2")}
    with pytest.raises(ValueError, match="lora_targets: the embedding is tied to the LM head"):
        train(config(data, tmp_path / "tied", **tied))
    with pytest.raises(ValueError, match=r"lora_targets \['nowhere'\]"):
        train(config(data, tmp_path / "none", lora=2, lora_targets=["nowhere"]))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'mdkernels\[lora\]'"):
        train(config(data, tmp_path / "missing", lora=2))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 0}, "lora must be an integer >= 1"),
        ({"lora_alpha": 4.0}, r"lora_alpha belongs to low-rank adapters, got 4.0.*--lora RANK"),
        ({"lora_targets": ["q_proj"]}, "lora_targets belongs to"),
        ({"lora": 2, "lora_targets": []}, "lora_targets: expected names"),
        ({"patience": 0, "eval_every": 1}, "patience must be an integer >= 1"),
        ({"patience": 2}, "patience compares evaluations during training: give eval_every"),
        ({"keep_best": True}, "keep_best compares"),
        ({"parallel": "fsdp"}, "did you mean 'fsdp2'"),
        ({"parallel": "fsdp2", "compile": True}, "compile is not supported with parallel"),
        ({"track": "tensorboard"}, "track: expected a list"),
        ({"seed": 2**64}, r"seed must be an integer in \[0, 18446744073709551615\]"),
        ({"overwrite": "false"}, "overwrite must be True or False, got 'false'"),
        ({"betas": 0.9}, "betas: expected two numbers, got 0.9"),
        ({"clip": float("inf")}, "clip must be a number that is finite and > 0.0, got inf"),
    ],
)
def test_options_outside_their_range_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(data, tmp_path / "out", **changes)


def test_what_cannot_work_here_is_refused_before_the_first_step(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs several processes and there is one"):
        train(config(data, tmp_path / "out", parallel="ddp"))
    with pytest.raises(ValueError, match="warmup_steps: 13 are more than the 12 steps"):
        train(config(data, tmp_path / "out", warmup_steps=13))
    with pytest.raises(ValueError, match="there are none: give valid and base, or on_eval"):
        train(config(data, tmp_path / "out", patience=1, eval_every=1))
    options = {"valid": data[0], "base": tiny_model("llama"), "eval_every": 1, "keep_best": True}
    with pytest.raises(ValueError, match=r"monitor must be .* did you mean 'memory_perplexity'"):
        train(config(data, tmp_path / "out", monitor="memory_perplexty", **options))
    live = tiny_model("llama")
    with pytest.raises(ValueError, match=r"base: shares model\.embed\S+ with model, .* in place"):
        train(config(data, tmp_path / "out", model=live, base=live, valid=data[0]))
    live.requires_grad_(False)
    with pytest.raises(ValueError, match=r"base: is the model itself, .* adapters in place"):
        train(config(data, tmp_path / "out", model=live, base=live, valid=data[0], lora=2))
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord', expected .*tensorboard"):
        train(config(data, tmp_path / "out", track=["tensorbord"]))
    with pytest.raises(ImportError, match="track: aim is not installed: pip install aim"):
        train(config(data, tmp_path / "out", track=["aim"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision is 'bf16': choose the arithmetic with"):
        train(config(data, tmp_path / "out"))
    assert not torch.distributed.is_initialized()
    assert not list(tmp_path.glob("out*"))


# --- trackers


def tracked(data, out, tracker, stop=None):
    """A run whose metrics go to `tracker`; cut off at step `stop`, or whole, from where it was."""

    def score(_model, step):
        if step == stop:
            raise Stop
        return {"mixture_perplexity": 1.0 + step}

    return train(config(data, out, track=[tracker], save_every=2, eval_every=2), on_eval=score)


def test_tensorboard_gets_the_metrics_once_each(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stop):
        tracked(data, tmp_path / "out", "tensorboard", stop=6)
    result = tracked(data, tmp_path / "out", "tensorboard")
    events = EventAccumulator(str(result.path / "tracking" / "mdkernels")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == 12
    expected = {row["step"]: row["loss"] for row in steps(result)}
    assert losses == pytest.approx(expected, rel=1e-6)
    evaluated = [event.step for event in events.Scalars("eval/mixture_perplexity")]
    assert evaluated == [2, 4, 6, 8, 10, 12]


def test_wandb_offline_is_one_run_across_an_interruption(data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from accelerate import PartialState

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)  # where its folder goes
    PartialState._reset_state()  # as in a fresh process
    logged, runs, init = [], [], wandb.init

    def started(**options):
        run = init(**options)
        log = run.log
        run.log = lambda row, step: (logged.append((step, row)), log(row, step=step))
        runs.append(run)
        return run

    monkeypatch.setattr(wandb, "init", started)

    with pytest.raises(Stop):
        tracked(data, tmp_path / "out", "wandb", stop=6)
    result = tracked(data, tmp_path / "out", "wandb")
    assert len(runs) == 2
    assert runs[0].id == runs[1].id
    for run in runs:
        assert (run.project, run.config["lr"], run.config["block"]) == ("mdkernels", 3e-3, 32)
        assert list(tmp_path.glob(f"wandb/offline-run-*-{run.id}/run-{run.id}.wandb"))
    expected = {row["step"]: row["loss"] for row in steps(result)}
    assert {step: row["loss"] for step, row in logged if "loss" in row} == expected
    evaluated = [step for step, row in logged if "eval/mixture_perplexity" in row]
    assert evaluated == [2, 4, 6, 8, 10, 12]
    tracked(data, tmp_path / "other", "wandb")
    assert runs[2].id != runs[0].id


# --- Ctrl-C


def test_ctrl_c_saves_the_finished_step_and_the_same_command_goes_on(data, tmp_path):
    whole = train(config(data, tmp_path / "whole", model=dropout_model(), save_every=None))

    def press(_model, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    settings = config(data, tmp_path / "out", model=dropout_model(), save_every=None, eval_every=5)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"behind step 6 of 12.*out\.partial; the same"):
        train(settings, on_eval=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert os.listdir(tmp_path / "out.partial" / "checkpoints") == ["step-00000006"]
    resumed = train(dataclasses.replace(settings, model=dropout_model()))
    assert same(weights(whole.model), weights(resumed.model))
    assert rows_of(whole) == rows_of(resumed)


def test_a_second_ctrl_c_aborts_but_a_forwarded_one_does_not(monkeypatch, capsys):
    clock = iter([10.0, 10.3, 12.0])
    monkeypatch.setattr("mdkernels.interrupt.time.monotonic", lambda: next(clock))
    with CtrlC("finishing") as ctrl_c:
        os.kill(os.getpid(), signal.SIGINT)
        assert ctrl_c.pressed
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher passes on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err.strip() == "finishing"


def test_the_command_line_says_how_to_go_on_and_exits_with_130(monkeypatch, capsys):
    from mdkernels import cli_commands
    from mdkernels.interrupt import Interrupted

    def stopped(**_settings):
        raise Interrupted("stopped behind step 6 of 12")

    monkeypatch.setattr(cli_commands, "train", stopped)
    assert cli.main(["train", "--corpus", "c", "--model", "m", "--out", "o"]) == 130
    assert capsys.readouterr().err == "\nmdkernels train: stopped behind step 6 of 12\n"
