"""Early stop: the run ends where it should and keeps its best step, resumed or not."""

import json

import pytest
import train_fixtures
from train_fixtures import Stop, config, same, steps, weights
from transformers import AutoModelForCausalLM

from mdkernels.artifact import ArtifactError
from mdkernels.train import train

data = train_fixtures.data


def scores(values, stop=None):
    """A hook that gives the evaluations at steps 2, 4, ... these values."""

    def hook(_model, step):
        if step == stop:
            raise Stop
        return {"mixture_perplexity": values[step // 2 - 1]}

    return hook


def rows_of(result):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in result.metrics]


CURVE = [9.0, 7.0, 8.0, float("nan"), 7.5, 1.0]  # the third without improvement is at step 10


def test_patience_stops_and_keeps_the_best_step(data, tmp_path):
    plain = train(config(data, tmp_path / "plain", max_steps=12, save_every=2, keep=9))
    result = train(
        config(data, tmp_path / "out", eval_every=2, patience=3, save_every=None),
        on_eval=scores(CURVE),
    )
    assert (result.steps, result.best_step) == (10, 4)
    assert len(steps(result)) == 10
    fourth = tmp_path / "plain" / "checkpoints" / "step-00000004"
    expected = weights(AutoModelForCausalLM.from_pretrained(fourth))
    assert same(weights(AutoModelForCausalLM.from_pretrained(result.path)), expected)
    assert same(weights(result.model), expected)
    meta = json.loads((result.path / "meta.json").read_text())
    assert (meta["steps"], meta["best_step"]) == (10, 4)
    assert not same(weights(plain.model), expected)


@pytest.mark.parametrize(("stop", "save_every"), [(6, 3), (10, None), (8, 2)])
def test_a_resumed_run_stops_at_the_same_step_with_the_same_weights(
    data, tmp_path, stop, save_every
):
    options = {"eval_every": 2, "patience": 3, "save_every": save_every}
    whole = train(config(data, tmp_path / "whole", **options), on_eval=scores(CURVE))
    with pytest.raises(Stop):
        train(config(data, tmp_path / "out", **options), on_eval=scores(CURVE, stop))
    kept = {p.name for p in (tmp_path / "out.partial" / "checkpoints").iterdir()}
    assert "step-00000004" in kept  # the best outlives `keep`
    resumed = train(config(data, tmp_path / "out", **options), on_eval=scores(CURVE))
    assert (resumed.steps, resumed.best_step) == (10, 4)
    assert same(weights(whole.model), weights(resumed.model))
    assert json.dumps(rows_of(whole)) == json.dumps(rows_of(resumed))  # NaN equals itself as text


def test_keep_best_without_patience_runs_to_the_end(data, tmp_path):
    options = {"eval_every": 2, "keep_best": True, "monitor": "score"}
    result = train(
        config(data, tmp_path / "out", **options), on_eval=lambda _m, step: {"score": -step}
    )
    assert (result.steps, result.best_step) == (12, 12)
    with pytest.raises(ValueError, match=r"step 2 gave score = None.*returned mixture"):
        train(config(data, tmp_path / "other", **options), on_eval=scores(CURVE))


def test_a_damaged_best_checkpoint_is_not_passed_off_as_the_result(data, tmp_path):
    def hook(_model, step):
        if step == 12:
            path = tmp_path / "out.partial" / "checkpoints" / "step-00000002" / "model.safetensors"
            content = path.read_bytes()
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        return {"mixture_perplexity": step}

    with pytest.raises(ArtifactError, match="the best step, is damaged"):
        train(config(data, tmp_path / "out", eval_every=2, keep_best=True), on_eval=hook)
