"""Keys and values against an independent forward pass; resume after an exception and a SIGKILL."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from pipeline_fixtures import (
    FAMILIES,
    HIDDEN_SIZE,
    VOCAB_SIZE,
    require_shared_data,
    save_tiny_checkpoint,
    tiny_documents,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GPTNeoXConfig, MistralConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mdkernels.artifact import ArtifactError, read_artifact
from mdkernels.corpus import build_corpus, windows
from mdkernels.datastore import build_datastore, open_datastore
from mdkernels.models import load_model, load_tokenizer, model_hash


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "corpus"
    return build_corpus(tiny_documents(3), tiny_tokenizer(), out, as_text=True)


def last_block(model):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[-1]


def expected_keys(model, token_ids, block, stride):
    """Keys by the definition: one window at a time, rebuilt from the residual stream.

    The last block adds its MLP's output to the residual it normalised, so subtracting that output
    from the block's output gives the residual back, without a hook on the MLP's input.
    """
    norm_name = "ln_2" if hasattr(last_block(model), "ln_2") else "post_attention_layernorm"
    outputs = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: outputs.update(
                {name: out[0] if isinstance(out, tuple) else out}
            )
        )
        for name, module in (("block", last_block(model)), ("mlp", last_block(model).mlp))
    ]
    keys = np.full((len(token_ids) - 1, model.config.hidden_size), np.nan)
    start = 0
    while start < len(keys):
        stop = min(start + (block if start == 0 else stride), len(keys))
        window = torch.tensor(token_ids[max(0, stop - block) : stop].tolist())[None]
        with torch.no_grad():
            model(input_ids=window, attention_mask=torch.ones_like(window))
            residual = outputs["block"].double() - outputs["mlp"].double()
            norm = getattr(last_block(model), norm_name)
            keys[start:stop] = norm(residual.float())[0, start - stop :].numpy()
        start = stop
    for handle in handles:
        handle.remove()
    return keys


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "stride", "batch_size"), [(32, 16, 4), (64, 64, 3), (48, 5, 7)])
def test_keys_and_values(corpus, tmp_path, family, block, stride, batch_size):
    model = tiny_model(family)
    store = build_datastore(
        corpus, model, tmp_path / "d", block=block, stride=stride, batch_size=batch_size
    )
    assert store.keys.shape == (corpus.num_rows, HIDDEN_SIZE)
    assert store.keys.dtype == np.float16
    np.testing.assert_array_equal(store.values, corpus.token_ids[1:])
    expected = expected_keys(model, corpus.token_ids, block, stride)
    np.testing.assert_allclose(store.keys, expected, rtol=2**-10, atol=1e-4)
    assert store.meta["inputs"] == {"corpus": corpus.content_id}
    assert store.meta["model"] == {"id": type(model).__name__, "hash": model_hash(model)}
    assert open_datastore(tmp_path / "d", verify=True).content_id == store.content_id


def test_a_corpus_shorter_than_a_window(tmp_path):
    corpus = build_corpus(["the tensor"], tiny_tokenizer(), tmp_path / "c", as_text=True)
    model = tiny_model("llama")
    store = build_datastore(corpus, model, tmp_path / "d", block=64)
    assert store.num_rows == corpus.num_rows < 64
    np.testing.assert_allclose(
        store.keys, expected_keys(model, corpus.token_ids, 64, 32), rtol=2**-10, atol=1e-4
    )


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen3Config, GPTNeoXConfig])
def test_other_families_with_a_key_position(corpus, tmp_path, config_class):
    config = config_class(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    store = build_datastore(corpus, model, tmp_path / "d", block=32)
    seen = []
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    blocks[-1].post_attention_layernorm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    start, stop = windows(corpus.num_rows, 32, 16)[1]
    with torch.no_grad():
        model(torch.tensor(corpus.token_ids[stop - 32 : stop].tolist())[None])
    np.testing.assert_allclose(
        store.keys[start:stop], seen[0][0, start - stop :].numpy(), rtol=2**-10, atol=1e-4
    )


def test_loaded_from_a_directory_in_another_dtype(corpus, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "m", "qwen2")
    options = {"block": 32, "device": "cpu"}
    exact = build_datastore(corpus, path, tmp_path / "a", **options)
    rounded = build_datastore(corpus, path, tmp_path / "b", dtype=torch.bfloat16, **options)
    assert rounded.meta["config"]["dtype"] == "torch.bfloat16"
    difference = np.abs(rounded.keys.astype(float) - exact.keys.astype(float))
    assert 0 < difference.mean() < 0.1


def test_training_mode_is_restored_and_the_head_never_runs(corpus, tmp_path):
    model = tiny_model("gpt2").train()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head ran"))
    build_datastore(corpus, model, tmp_path / "d", block=32)
    assert model.training
    assert not last_block(model).mlp._forward_pre_hooks


def test_mean_squared_distance(corpus, tmp_path, monkeypatch):
    store = build_datastore(corpus, tiny_model("llama"), tmp_path / "d", block=32)
    keys = store.keys.astype(np.float64)
    pairs = ((keys[:, None] - keys[None]) ** 2).sum(-1)
    n = len(keys)
    assert store.mean_squared_distance() == pytest.approx(pairs.sum() / (n * (n - 1)), rel=1e-12)
    monkeypatch.setattr("mdkernels.datastore._SAMPLE_ROWS", 64)
    assert store.mean_squared_distance() == pytest.approx(pairs.sum() / (n * (n - 1)), rel=0.1)


def test_what_cannot_be_stored_or_read_is_refused(corpus, tmp_path):
    out = tmp_path / "d"
    with pytest.raises(ValueError, match=r"windows of 65 tokens do not fit .* 64"):
        build_datastore(corpus, tiny_model("llama"), out, block=65)
    with pytest.raises(ValueError, match=r"embeds 300 tokens.*vocabulary of 320"):
        build_datastore(corpus, tiny_model("llama", vocab_size=300), out, block=32)
    with pytest.raises(ValueError, match=r"stride must be an integer in \[1, 32\], got 33"):
        build_datastore(corpus, tiny_model("llama"), out, block=32, stride=33)
    with pytest.raises(ValueError, match="batch_size"):
        build_datastore(corpus, tiny_model("llama"), out, block=32, batch_size=0)
    huge = tiny_model("llama")
    with torch.no_grad():
        last_block(huge).post_attention_layernorm.weight.fill_(1e5)
    with pytest.raises(ValueError, match=r"key of row \d+ reaches .*fp16 keys hold up to 65504"):
        build_datastore(corpus, huge, out, block=32)
    with torch.no_grad():
        last_block(huge).post_attention_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="reaches nan"):
        build_datastore(corpus, huge, out, block=32)
    with pytest.raises(ArtifactError, match=r"no corpus artefact at .*`mdkernels corpus`"):
        build_datastore(tmp_path / "nothing", tiny_model("llama"), out)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_tokenizer_is_refused(tmp_path):
    other = build_corpus(tiny_documents(2), tiny_tokenizer(319), tmp_path / "c", as_text=True)
    path = save_tiny_checkpoint(tmp_path / "m", "llama")
    with pytest.raises(ValueError, match="tokenizers differ"):
        build_datastore(other, path, tmp_path / "d", block=32)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupted_run_continues(corpus, tmp_path, after):
    options = {"block": 32, "stride": 16, "batch_size": 2, "checkpoint_seconds": 0.0}
    model = tiny_model("llama")
    whole = build_datastore(corpus, model, tmp_path / "whole", **options)
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) > after:
            raise Interrupt

    handle = model.model.register_forward_pre_hook(count)
    with pytest.raises(Interrupt):
        build_datastore(corpus, model, tmp_path / "d", **options)
    handle.remove()
    assert not (tmp_path / "d").exists()
    with pytest.raises(ArtifactError, match="again to resume"):
        open_datastore(tmp_path / "d")

    rest = []
    model.model.register_forward_pre_hook(lambda *_: rest.append(1))
    resumed = build_datastore(corpus, model, tmp_path / "d", **options)
    batches = -(-len(windows(corpus.num_rows, 32, 16)) // 2)
    assert len(rest) == batches - after
    assert resumed.content_id == whole.content_id
    assert not (tmp_path / "d.partial").exists()


def test_a_killed_process_continues(corpus, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from pipeline_fixtures import tiny_model
        from mdkernels.datastore import build_datastore
        calls, model = [], tiny_model("gpt2")
        def count(*_):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        model.transformer.register_forward_pre_hook(count)
        build_datastore(sys.argv[1], model, sys.argv[2], block=32, batch_size=2,
                        checkpoint_seconds=0)
    """)
    command = [sys.executable, "-c", script, str(corpus.path), str(tmp_path / "d")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "d").exists()
    model, rest = tiny_model("gpt2"), []
    whole = build_datastore(corpus, model, tmp_path / "whole", block=32, batch_size=2)
    model.transformer.register_forward_pre_hook(lambda *_: rest.append(1))
    resumed = build_datastore(corpus, model, tmp_path / "d", block=32, batch_size=2)
    assert len(rest) == -(-len(windows(corpus.num_rows, 32, 16)) // 2) - 3
    assert resumed.content_id == whole.content_id


def test_other_weights_do_not_continue_a_run(corpus, tmp_path):
    options = {"block": 32, "batch_size": 2, "checkpoint_seconds": 0.0}
    model, calls = tiny_model("llama"), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupt

    model.model.register_forward_pre_hook(stop)
    with pytest.raises(Interrupt):
        build_datastore(corpus, model, tmp_path / "d", **options)
    other = tiny_model("llama", seed=1)
    with pytest.warns(UserWarning, match="discarded"):
        store = build_datastore(corpus, other, tmp_path / "d", **options)
    whole = build_datastore(corpus, other, tmp_path / "whole", **options)
    assert store.content_id == whole.content_id


def test_rows_that_do_not_match_are_refused(corpus, tmp_path):
    from mdkernels.artifact_writer import ArtifactWriter

    header = {"tokenizer_hash": "t", "vocab_size": 9, "config": {}, "inputs": {}}
    for i, (rows, value, message) in enumerate(
        [(3, 1, "same number of rows"), (2, 9, "outside"), (2, -1, "outside")]
    ):
        with ArtifactWriter(tmp_path / f"{i}", "datastore", header) as writer:
            writer.array("keys", "float16", (4,)).append(np.zeros((2, 4), np.float16))
            writer.array("values", "int32").append(np.full(rows, value, np.int32))
            writer.commit()
        with pytest.raises(ArtifactError, match=message):
            open_datastore(tmp_path / f"{i}")
    with pytest.raises(ArtifactError, match="holds a 'corpus' artefact"):
        open_datastore(corpus.path)
    assert read_artifact(corpus.path, "corpus").content_id == corpus.content_id


def test_a_pretrained_model(tmp_path):
    path = require_shared_data("models/stories260K")
    corpus = build_corpus(
        ["Once upon a time there was a dog. " * 9], load_tokenizer(path), tmp_path / "c",
        as_text=True,
    )  # fmt: skip
    store = build_datastore(corpus, path, tmp_path / "d", block=128, device="cpu")
    expected = expected_keys(load_model(path), corpus.token_ids, 128, 64)
    np.testing.assert_allclose(store.keys, expected, rtol=2**-10, atol=1e-3)
