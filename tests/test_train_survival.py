"""kill -9 at random points, a disk that is full, and checkpoints that were damaged on it."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import train_fixtures
from pipeline_fixtures import tiny_model
from train_fixtures import config, same, steps, weights

from mdkernels.artifact import ArtifactError
from mdkernels.corpus import open_corpus
from mdkernels.preflight import usable_checkpoint
from mdkernels.targets import open_targets
from mdkernels.train import train

SAVE_EVERY, STEPS = 2, 30


data = train_fixtures.data


def dropout_model():
    """Random state matters in it: a resume that forgot it would differ."""
    model = tiny_model("gpt2", seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def in_child(action) -> int:
    """Run `action` in a forked process; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return pid


def last_line(metrics: Path) -> int:
    """The last step in a metrics file that may end in half a line."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def survive(corpus: str, targets: str, root: str) -> None:
    """In a process of its own, single-threaded: whole run, killed and resumed run, full disk."""
    data, root = (open_corpus(corpus), open_targets(targets)), Path(root)
    settings = {"max_steps": STEPS, "save_every": SAVE_EVERY, "model": dropout_model()}
    report = {"kills": []}
    status = os.waitpid(in_child(lambda: train(config(data, root / "whole", **settings))), 0)[1]
    report["whole"] = status

    def run():
        train(config(data, root / "killed", **settings))

    work, draw = root / "killed.partial", random.Random(int.from_bytes(os.urandom(4)))
    for least in (2, 8, 14):  # steps, then up to a few more or a checkpoint half written
        pid = in_child(run)
        while last_line(work / "metrics.jsonl") < least:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        progress = work / "progress.json"
        saved = json.loads(progress.read_text())["state"]["step"] if progress.exists() else 0
        report["kills"].append([status, last_line(work / "metrics.jsonl"), saved])
    report["resumed"] = os.waitpid(in_child(run), 0)[1]

    def full(_model, step):
        if step == 5:  # from now on no file may grow beyond 20 kB: the next checkpoint does not fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def run_full():
        try:
            train(config(data, root / "full", eval_every=1, **settings), on_eval=full)
        except OSError as error:
            (root / "error").write_bytes(str(error).encode())

    report["full"] = os.waitpid(in_child(run_full), 0)[1]
    print(json.dumps(report))


SCRIPT = """
    import torch
    torch.set_num_threads(1)
    from test_train_survival import survive
    survive({corpus!r}, {targets!r}, {root!r})
"""


@pytest.fixture(scope="module")
def survived(data, tmp_path_factory):
    """(report, folder) of one process for all of it: importing torch takes longer than the runs."""
    root = tmp_path_factory.mktemp("survived")
    script = textwrap.dedent(SCRIPT).format(
        corpus=str(data[0].path), targets=str(data[1].path), root=str(root)
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), root


def test_kills_at_random_points_lose_only_the_steps_since_the_last_checkpoint(survived):
    report, root = survived
    assert (report["whole"], report["resumed"]) == (0, 0)
    for status, reached, saved in report["kills"]:
        assert status == signal.SIGKILL
        assert 0 <= reached - saved <= SAVE_EVERY
    assert not (root / "killed.partial").exists()
    whole, killed = root / "whole", root / "killed"
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    ]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    for mine, other in zip(*rows, strict=True):
        assert mine | {"tokens_per_s": 0} == other | {"tokens_per_s": 0}


def test_a_limit_of_the_system_on_writing_leaves_the_last_checkpoint(survived, data):
    report, root = survived
    assert report["full"] == 0
    error = (root / "error").read_text()
    # EFBIG is what the limit gives in place of ENOSPC.
    assert "step-00000006 could not be written" in error
    assert "too large" in error
    directory = root / "full.partial" / "checkpoints"
    assert os.listdir(directory) == ["step-00000004"]
    settings = {"max_steps": STEPS, "save_every": SAVE_EVERY, "model": dropout_model()}
    resumed = train(config(data, root / "full", **settings))
    name = "model.safetensors"
    assert (resumed.path / name).read_bytes() == (root / "whole" / name).read_bytes()


class Stop(Exception):
    pass


def stopped_run(data, out, keep):
    """A run of 12 steps, stopped after checkpoints at 3, 6 and 9; the settings to resume it."""

    def stop(_model, step):
        if step == 10:
            raise Stop

    settings = config(data, out, save_every=3, keep=keep, eval_every=1)
    with pytest.raises(Stop):
        train(settings, on_eval=stop)
    return dataclasses.replace(settings, model=tiny_model("llama", seed=3))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()


DAMAGES = (
    ("model.safetensors", "altered", "was altered, its checksum does not match"),
    ("training_state.safetensors", "truncated", r"has \d+ bytes, \d+ were written"),
    ("training_state.json", "missing", "is missing"),
    ("checksums.json", "truncated", "cannot be read"),
    ("checksums.json", "missing", "it has no"),
)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, tmp_path):
    settings = stopped_run(data, tmp_path / "out", keep=2)
    directory = tmp_path / "out.partial" / "checkpoints"
    assert usable_checkpoint(directory, 9).name == "step-00000009"
    for number, (name, how, message) in enumerate(DAMAGES):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(directory, copy)
        damage(copy / "step-00000009" / name, how)
        with pytest.warns(
            UserWarning, match=rf"step-00000009 is damaged .*{message}.*goes on from"
        ):
            assert usable_checkpoint(copy, 9).name == "step-00000006"
    damage(directory / "step-00000009" / "model.safetensors", "altered")
    with pytest.warns(UserWarning, match="goes on from step-00000006, later steps are repeated"):
        resumed = train(settings)
    whole = train(config(data, tmp_path / "whole", save_every=3, keep=2))
    assert same(weights(whole.model), weights(resumed.model))
    assert [row["step"] for row in steps(resumed)] == list(range(1, 13))
    kept = sorted(os.listdir(tmp_path / "out" / "checkpoints"))
    assert kept == ["step-00000006", "step-00000009"]


def test_without_a_usable_checkpoint_the_run_is_left_alone(data, tmp_path):
    settings = stopped_run(data, tmp_path / "out", keep=1)
    only = tmp_path / "out.partial" / "checkpoints" / "step-00000009"
    whole = (only / "model.safetensors").read_bytes()
    damage(only / "model.safetensors", "truncated")
    message = rf"{only} is damaged \(model.safetensors has .*resume=False"
    with pytest.raises(ArtifactError, match=message):
        train(settings)
    (only / "model.safetensors").write_bytes(whole)
    again = dataclasses.replace(settings, model=tiny_model("llama", seed=3))
    assert len(steps(train(again))) == 12


def test_a_fraction_of_an_epoch_reads_that_many_windows_and_resumes(data, tmp_path):
    """1.3 epochs in batches that straddle the epochs, and end in a short one."""
    count = len(data[0].windows(32, 16))
    size = count // 3 + 1
    settings = {"epochs": 1.3, "batch_size": size, "save_every": 2, "eval_every": 1}
    whole = train(config(data, tmp_path / "whole", **settings))
    windows = -(-13 * count // 10)
    assert whole.steps == -(-windows // size) == 4
    assert steps(whole)[-1]["epoch"] == pytest.approx(windows / count)

    def stop(_model, step):
        if step == 3:  # read windows of both epochs
            raise Stop

    with pytest.raises(Stop):
        train(config(data, tmp_path / "out", **settings), on_eval=stop)
    resumed = train(config(data, tmp_path / "out", **settings))
    assert same(weights(whole.model), weights(resumed.model))
