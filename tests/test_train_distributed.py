"""Training with two gloo processes, DDP and FSDP2, against one process with twice the batch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train_fixtures
from pipeline_fixtures import tiny_model
from train_fixtures import (
    BLOCK,
    STRIDE,
    config,
    needs_peft,
    same,
    steps,
    weights,
)
from train_processes import FAMILY, SHARED
from transformers import AutoModelForCausalLM

from mdkernels.train import train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo backend"
)

MODES = list(FAMILY)


data = train_fixtures.data


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """What each of the two processes of tests/train_processes.py saw."""
    out = tmp_path_factory.mktemp("two")
    program = Path(__file__).with_name("train_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(program), str(data[0].path), str(data[1].path), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(2)] + [out]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_result_of_one(found, data, tmp_path, mode):
    model = tiny_model(FAMILY[mode], seed=3)
    alone = train(config(data, tmp_path / "out", model=model, **SHARED | {"batch_size": 4}))
    windows = math.ceil(0.5 * len(data[0].windows(BLOCK, STRIDE)))
    assert 0 < windows % 4 <= 2  # the last forward pass leaves the second process without a window
    together = found[0][mode]
    assert len(together["rows"]) == len(steps(alone))
    for here, there in zip(steps(alone), together["rows"], strict=True):
        for name in ("epoch", "lr"):
            assert here[name] == there[name]
        for name in ("loss", "kl", "ce", "grad_norm"):
            assert there[name] == pytest.approx(here[name], rel=1e-5)
    # Adam divides by the root of the second moment: where gradients nearly cancel, their rounding
    # moves a weight by a visible share of lr.
    for name, expected in weights(alone.model).items():
        assert (together["weights"][name] - expected).abs().max() < 0.02 * 3e-3, name


def test_ddp_exchanges_gradients_once_a_step_whatever_the_accumulation(found):
    # The first step may split its gradients otherwise: DDP learns their order in it.
    assert SHARED["grad_accum"] == 2
    assert found[0]["ddp-exchanges"] == len(found[0]["ddp"]["rows"])


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(found, mode):
    assert found[0][f"{mode}-stop"] == "Stop: enough"
    assert found[1][f"{mode}-stop"] == "RuntimeError: process 0 stopped with Stop: enough"
    whole, resumed = found[0][f"{mode}-whole"], found[0][f"{mode}-resumed"]
    assert same(whole["weights"], resumed["weights"])
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in run["rows"]]
        for run in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    assert [r["step"] for r in found[1][f"{mode}-resumed"]["rows"]] == [r["step"] for r in rows[0]]
    plain = [row["loss"] for row in found[0][mode]["rows"]]
    assert [row["loss"] for row in rows[0]] != plain  # dropout did something


def test_an_interrupted_run_with_another_model_is_refused_by_every_process(found):
    for rank in range(2):
        for mode in MODES:
            assert "ArtifactError" in found[rank][f"{mode}-other"]
            assert "model_hash is" in found[rank][f"{mode}-other"]


def test_a_sharded_model_is_saved_whole(found):
    assert same(found[0]["fsdp2"]["weights"], found[0]["fsdp2-saved"])
    assert found[1]["fsdp2"]["weights"] is None
    assert same(found[0]["ddp"]["weights"], found[1]["ddp"]["weights"])


def test_early_stop_under_fsdp2_keeps_the_best_step(found):
    assert found[0]["best-seen"] == [2, 4, 6]  # of 7 steps
    assert found[1]["best-seen"] == []
    path = found[2] / "best"
    saved = weights(AutoModelForCausalLM.from_pretrained(path))
    fourth = path / "checkpoints" / "step-00000004"
    assert same(saved, weights(AutoModelForCausalLM.from_pretrained(fourth)))
    assert same(saved, found[0]["best"]["weights"])
    evaluations = [row["eval"]["mean"] for row in found[0]["best"]["metrics"] if "eval" in row]
    logits = AutoModelForCausalLM.from_pretrained(path)(torch.arange(6)[None]).logits
    assert evaluations[1] == pytest.approx(logits.mean().item(), rel=1e-4)


@needs_peft
def test_adapters_under_fsdp2_are_merged_into_a_plain_model(found, data, tmp_path):
    changes = SHARED | {
        "batch_size": 4,
        "lora": 2,
        "lr": 1e-2,
        "model": tiny_model("qwen2", seed=3),
    }
    alone = train(config(data, tmp_path / "out", **changes))
    together = found[0]["lora"]
    assert together["weights"].keys() == weights(tiny_model("qwen2")).keys()
    for here, there in zip(steps(alone), together["rows"], strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_every_process(found):
    out = found[2]
    for rank in range(2):
        assert found[rank]["nan"].startswith("FloatingPointError: step 3: loss is nan")
    assert [p.name for p in (out / "nan.partial" / "checkpoints").iterdir()] == ["step-00000002"]


def test_ctrl_c_in_one_process_stops_all_behind_the_same_step(found):
    out = found[2]
    for rank in range(2):
        assert "Interrupted: stopped behind step 3 of 7" in found[rank]["ctrl-c"]
    assert [p.name for p in (out / "ctrl-c.partial" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_device_with_a_number_is_refused_for_several_processes(found):
    assert found[1]["device"].startswith("ValueError: device 'cuda:0': with several processes each")
