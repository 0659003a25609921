"""The records beside the weights of an interrupted run: incomplete, damaged, or on a full disk."""

import errno
import os
import shutil

import pytest
import train_fixtures
from pipeline_fixtures import tiny_model
from safetensors import SafetensorError
from train_fixtures import Stop, config, same, steps, weights

from mdkernels import checkpoint
from mdkernels.artifact import ArtifactError
from mdkernels.artifact_writer import ArtifactWriter
from mdkernels.train import train

data = train_fixtures.data


def run(data, out, stop=None, seen=None, **changes):
    """A run of 12 steps with checkpoints at 2, 4, ..., stopped at the evaluation of step `stop`;
    `seen` gets the steps that it evaluated."""

    def hook(_model, step):
        if seen is not None:
            seen.append(step)
        if step == stop:
            raise Stop
        return {"mixture_perplexity": step}

    settings = {"save_every": 2, "eval_every": 1, "model": tiny_model("llama", seed=3)} | changes
    settings = config(data, out, **settings)
    if stop is None:
        return train(settings, on_eval=hook)
    with pytest.raises(Stop):
        train(settings, on_eval=hook)
    return None


def listed(out):
    return sorted(os.listdir(out.with_name(out.name + ".partial") / "checkpoints"))


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def test_a_checkpoint_that_a_kill_kept_from_being_recorded_outlives_no_newer_one(data, tmp_path):
    """A kill between the rename of checkpoint 8 and the record of progress, then a stop at 7."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    run(data, out, stop=5)
    progress = (work / "progress.json").read_bytes()
    shutil.copytree(work / "checkpoints", tmp_path / "fourth")
    run(data, out, stop=9)
    (work / "progress.json").write_bytes(progress)
    shutil.copytree(tmp_path / "fourth", work / "checkpoints", dirs_exist_ok=True)
    assert listed(out) == ["step-00000004", "step-00000008"]
    run(data, out, stop=7)
    assert listed(out) == ["step-00000006"]
    resumed = run(data, out)
    assert same(weights(resumed.model), weights(run(data, tmp_path / "whole").model))


def test_a_run_started_again_resumes_before_its_first_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    run(data, out, stop=5)
    run(data, out, stop=1, resume=False)
    resumed = run(data, out)
    assert same(weights(resumed.model), weights(run(data, tmp_path / "whole").model))
    assert [row["step"] for row in steps(resumed)] == list(range(1, 13))


@pytest.mark.parametrize("content", [b'{"arr', b"\xff\x00", b"null", b"", None])
def test_a_damaged_record_of_progress_does_not_discard_the_run(data, tmp_path, content):
    out, progress = tmp_path / "out", tmp_path / "out.partial" / "progress.json"
    run(data, out, stop=5)
    whole = progress.read_bytes()
    progress.unlink()
    if content is not None:
        progress.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"progress\.json is missing, damaged or .*resume=False"
    ):
        run(data, out)
    assert listed(out) == ["step-00000004"]
    progress.write_bytes(whole)
    seen = []
    run(data, out, seen=seen)
    assert seen[0] == 5


@pytest.mark.parametrize("content", [b'{"conf', b"\xff\x00", b"null"])
def test_a_damaged_copy_of_the_config_does_not_matter(data, tmp_path, content):
    out = tmp_path / "out"
    run(data, out, stop=5)
    (tmp_path / "out.partial" / "run.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="or of another config"):
        run(data, out, lr=0.5)
    seen = []
    run(data, out, seen=seen)
    assert seen[0] == 5


@pytest.mark.parametrize("content", [b"", b"\xff\xfe" + bytes(5000), b"7\n" * 3000])
def test_damaged_metrics_are_named(data, tmp_path, content):
    out, log = tmp_path / "out", tmp_path / "out.partial" / "metrics.jsonl"
    run(data, out, stop=5)
    log.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl is damaged: .* delete it to go on"):
        run(data, out)
    assert log.read_bytes() == content
    log.unlink()
    assert [row["step"] for row in steps(run(data, out))] == list(range(5, 13))


def test_a_damaged_best_step_is_found_before_training_goes_on(data, tmp_path):
    out, best = tmp_path / "out", tmp_path / "out.partial" / "checkpoints" / "step-00000001"
    run(data, out, stop=8, keep_best=True)
    assert listed(out) == ["step-00000001", "step-00000006"]
    shutil.copytree(best, tmp_path / "copy")
    flip(best / "model.safetensors")
    seen = []
    message = rf"step-00000006 is damaged \(its best step, step-00000001: .*delete {best} to go on"
    with pytest.raises(ArtifactError, match=message):
        run(data, out, seen=seen, keep_best=True)
    assert seen == []
    shutil.copytree(tmp_path / "copy", best, dirs_exist_ok=True)
    assert run(data, out, keep_best=True).best_step == 1


@pytest.mark.parametrize("rising", [True, False])
def test_a_run_goes_on_without_a_best_step_that_was_deleted(data, tmp_path, rising):
    def hook(_model, step):
        if len(seen) == 8:
            raise Stop
        seen.append(step)
        later = step if rising else -step
        return {"mixture_perplexity": -99 if step == 1 else later}

    settings = {"save_every": 2, "eval_every": 1, "keep_best": True, "patience": 20}
    out, seen = tmp_path / "out", []
    with pytest.raises(Stop):
        train(config(data, out, model=tiny_model("llama", seed=3), **settings), on_eval=hook)
    shutil.rmtree(tmp_path / "out.partial" / "checkpoints" / "step-00000001")
    seen.clear()
    with pytest.warns(UserWarning, match=r"step-00000001: it is missing.*goes on from step-000000"):
        result = train(
            config(data, out, model=tiny_model("llama", seed=3), **settings), on_eval=hook
        )
    assert seen[0] > 7
    assert (result.steps, result.best_step) == (12, seen[0] if rising else 12)
    kept = checkpoint.path_of(out / "checkpoints", result.best_step)
    if rising:
        assert same(weights(type(result.model).from_pretrained(kept)), weights(result.model))


def test_leftovers_of_a_kill_are_not_committed(data, tmp_path):
    out = tmp_path / "out"
    run(data, out, stop=11)
    half = tmp_path / "out.partial" / "checkpoints" / ".deleting-step-00000008"
    half.mkdir()
    run(data, out)
    assert os.listdir(out / "checkpoints") == ["step-00000010"]


def test_a_full_disk_at_the_end_is_no_traceback(data, tmp_path, monkeypatch):
    def full(directory, model, tokenizer):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run(data, tmp_path / "out", stop=11)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", full)
        with pytest.raises(OSError, match=r"out could not be written: .*No space left"):
            run(data, tmp_path / "out")
    assert run(data, tmp_path / "out").steps == 12


def test_a_full_disk_is_named_and_the_lock_released(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    writer = ArtifactWriter(out, "corpus", {})
    arrays = [writer.array(name, "int64") for name in ("a", "b")]
    monkeypatch.setattr(arrays[0], "close", refuse)  # as its flush does
    with pytest.raises(OSError, match=rf"No space left on device: '{out}\.partial'"), writer:
        refuse()
    assert arrays[1]._file.closed
    with ArtifactWriter(out, "corpus", {}) as writer:
        writer.array("a", "int64")
