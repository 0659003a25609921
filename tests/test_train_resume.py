"""What a failed or refused training run leaves behind, and how it goes on."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import train_fixtures
from pipeline_fixtures import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from train_fixtures import Stop, config, make_corpus, same, steps, weights
from transformers import AutoModelForCausalLM

from mdkernels import checkpoint
from mdkernels.artifact import ArtifactError
from mdkernels.evaluate import evaluate
from mdkernels.generate import generate
from mdkernels.train import TrainConfig, train

data = train_fixtures.data


def stop_at(step):
    def hook(_model, now):
        if now == step:
            raise Stop

    return hook


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


@pytest.mark.parametrize("step", [1, 3, 4, 11])
def test_stopping_anywhere_changes_nothing(data, tmp_path, step):
    whole = train(config(data, tmp_path / "whole", save_every=3, keep=2))
    settings = config(data, tmp_path / "out", save_every=3, keep=2, eval_every=1)
    with pytest.raises(Stop):
        train(settings, on_eval=stop_at(step))
    assert not (tmp_path / "out").exists()
    again = dataclasses.replace(settings, model=tiny_model("llama", seed=3))
    resumed = train(again)
    assert same(weights(whole.model), weights(resumed.model))
    assert without_times(steps(resumed)) == without_times(steps(whole))


def test_resume_false_starts_again(data, tmp_path):
    settings = config(data, tmp_path / "out", save_every=3, eval_every=1)
    with pytest.raises(Stop):
        train(settings, on_eval=stop_at(8))
    fresh = {"model": tiny_model("llama", seed=3), "lr": 1e-3}
    with pytest.warns(UserWarning, match="was discarded"):
        result = train(dataclasses.replace(settings, resume=False, **fresh))
    expected = train(config(data, tmp_path / "other", lr=1e-3))
    assert same(weights(result.model), weights(expected.model))
    assert len(steps(result)) == 12


def test_another_config_does_not_discard_an_interrupted_run(data, tmp_path):
    settings = config(data, tmp_path / "out", save_every=3, eval_every=1)
    with pytest.raises(Stop):
        train(settings, on_eval=stop_at(8))
    other = dataclasses.replace(settings, lr=0.5, model=tiny_model("llama", seed=3))
    with pytest.raises(ArtifactError, match=r"config.lr is 0.003 there and 0.5 here"):
        train(other)
    assert (tmp_path / "out.partial" / "checkpoints" / "step-00000006").is_dir()


def test_checkpoints_are_kept_by_count(data, tmp_path):
    train(config(data, tmp_path / "out", save_every=2, keep=3))
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000010"]


def test_a_full_disk_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    settings = config(data, tmp_path / "out", save_every=3)
    write = checkpoint.save_file
    calls = []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(settings)
    partial = tmp_path / "out.partial" / "checkpoints"
    assert os.listdir(partial) == ["step-00000003"]
    resumed = train(dataclasses.replace(settings, model=tiny_model("llama", seed=3)))
    whole = train(config(data, tmp_path / "whole"))
    assert same(weights(whole.model), weights(resumed.model))


def test_a_finished_run_is_replaced_only_on_request_and_only_when_done(data, tmp_path):
    out = tmp_path / "out"
    first = train(config(data, out))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="overwrite"):
        train(config(data, out))
    with pytest.raises(Stop):
        train(config(data, out, overwrite=True, seed=1, eval_every=2), on_eval=stop_at(4))
    assert (out / "model.safetensors").read_bytes() == before
    second = train(config(data, out, overwrite=True, seed=1))
    assert not same(weights(first.model), weights(second.model))
    assert (out / "model.safetensors").read_bytes() != before


def test_a_loss_that_is_not_finite_stops_with_its_step(data, tmp_path):
    model = tiny_model("llama", seed=3)
    settings = config(data, tmp_path / "out", model=model, save_every=2, eval_every=1)

    def poison(trained, step):
        if step == 5:
            trained.lm_head.weight.data[7, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 6: loss is nan"):
        train(settings, on_eval=poison)
    assert not (tmp_path / "out").exists()
    saved = tmp_path / "out.partial" / "checkpoints" / "step-00000004"
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert all(bool(p.isfinite().all()) for p in loaded.parameters())


def test_targets_of_another_corpus_are_refused_before_the_first_step(data, tmp_path):
    corpus, targets = data
    shorter = make_corpus(tmp_path / "shorter", 5)
    with pytest.raises(ArtifactError, match=rf"inputs is .*{corpus.content_id}.* here"):
        train(config((shorter, targets), tmp_path / "out"))
    changed = build_swapped(corpus, tmp_path / "changed")
    assert changed.num_rows == corpus.num_rows
    with pytest.raises(ArtifactError, match=rf"{corpus.content_id}.*{changed.content_id}"):
        train(config((changed, targets), tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def build_swapped(corpus, path):
    """The same number of tokens, other text: the documents in reverse order."""
    from mdkernels.corpus import build_corpus

    ids, offsets = corpus.token_ids, corpus.document_offsets
    texts = [
        tiny_tokenizer().decode(ids[offsets[i] : offsets[i + 1] - 1])
        for i in range(len(offsets) - 1)
    ]
    return build_corpus(texts[::-1], tiny_tokenizer(), path, as_text=True)


def test_models_that_cannot_train_here_are_refused(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"torch.bfloat16; .* fp32"):
        train(config(data, out, model=tiny_model("llama").bfloat16()))
    with pytest.raises(ValueError, match="block: 128"):
        train(config(data, out, block=128))
    with pytest.raises(ValueError, match="vocabulary of 320"):
        train(config(data, out, model=tiny_model("llama", vocab_size=256)))
    frozen = tiny_model("llama")
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        train(config(data, out, model=frozen))
    unsaved = tiny_model("llama")
    unsaved.generation_config.temperature = 0.7  # without do_sample
    with pytest.raises(ValueError, match=r"(?s)refuses to save its config.*`temperature`"):
        train(config(data, out, model=unsaved))
    diverged = tiny_model("llama")
    diverged.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits that are not finite"):
        train(config(data, out, model=diverged))
    with pytest.raises(ValueError, match="device 'nowhere'"):
        train(config(data, out, device="nowhere"))
    assert not list(tmp_path.glob("out*"))


def test_a_model_directory_of_another_tokenizer_is_refused(data, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "model", "llama", vocab_size=330)
    with pytest.raises(ValueError, match="tokenizers differ"):
        train(config(data, tmp_path / "out", model=path, tokenizer=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "kl-ce"}, "did you mean 'kl_ce'"),
        ({"objective": "kl", "targets": None}, "learns from kNN targets, got targets=None"),
        ({"kl_weight": 2}, r"kl_weight must be a number >= 0.0 and <= 1.0, got 2"),
        ({"kl_weight": float("nan")}, "kl_weight must be"),
        ({"objective": "kl", "kl_weight": 0.5}, "belongs to objective"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"stride": 33}, r"stride must be an integer in \[1, 32\], got 33"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"epochs": 1, "max_steps": 5}, "one of epochs and max_steps"),
        ({"max_steps": None}, "one of epochs and max_steps"),
        ({"lr": 0.0}, "lr must be a number > 0"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas must be a number >= 0.0 and < 1.0"),
        ({"clip": -1}, "clip must be"),
        ({"valid": "somewhere"}, "base is None"),
        ({"track": 5}, "track: expected a list of names, got 5"),
    ],
)
def test_settings_outside_their_range_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(data, tmp_path / "out", **changes)


def test_inputs_of_another_type_are_named(data, tmp_path):
    for name, kind in (("corpus", "corpus"), ("targets", "targets"), ("model", "model")):
        with pytest.raises(TypeError, match=rf"{kind}: expected .*director.*, got int"):
            train(config(data, tmp_path / "out", **{name: 5}))
    with pytest.raises(TypeError, match=r"tokenizer: expected a directory.*, got int"):
        train(config(data, tmp_path / "out", tokenizer=5))
    with pytest.raises(ValueError, match="out: expected a directory to write, got None"):
        config(data, None)


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ValueError, match="unknown setting 'learning_rat'"):
        TrainConfig.from_dict({"learning_rat": 1})
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        TrainConfig.from_dict({"batchsize": 1})


def test_a_damaged_or_unfinished_run_is_no_model(data, tmp_path):
    corpus, _ = data
    out = tmp_path / "out"
    train(config(data, out))
    whole = (out / "model.safetensors").read_bytes()
    altered = whole[:-40] + bytes(4) + whole[-36:]
    for damaged, message in ((whole[:-8], "has .* bytes"), (altered, "was altered")):
        (out / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ArtifactError, match=rf"model.safetensors: {message}"):
            evaluate(out, None, corpus, block=32)
        with pytest.raises(ArtifactError, match=r"model.safetensors"):
            train(config(data, tmp_path / "next", model=out))
    (out / "model.safetensors").write_bytes(whole)
    assert evaluate(out, None, corpus, block=32)["base"]["perplexity"] > 1
    with pytest.raises(Stop):
        train(config(data, tmp_path / "stopped", save_every=1, eval_every=1), on_eval=stop_at(2))
    with pytest.raises(ArtifactError, match=r"unfinished run left .*stopped.partial"):
        evaluate(tmp_path / "stopped", None, corpus, block=32)
    with pytest.raises(ArtifactError, match=r"unfinished run left .*stopped.partial"):
        generate(out, tmp_path / "stopped", "the index")
