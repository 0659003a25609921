"""The loss inside a model's forward, its dataset and its collator, against dense float64."""

import pickle

import pytest
import torch
from integration_fixtures import assert_close, dense_loss, gradients
from pipeline_fixtures import FAMILIES, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from torch.utils.data import DataLoader
from train_fixtures import BLOCK, STRIDE, make_corpus, make_targets
from transformers import Gemma2Config, Gemma2ForCausalLM

from mdkernels import SparseTargets
from mdkernels.artifact import ArtifactError
from mdkernels.integrations import causal_lm
from mdkernels.integrations.causal_lm import causal_lm_loss
from mdkernels.integrations.keys import KeyDataset
from mdkernels.integrations.windows import SparseTargetsCollator, WindowDataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    corpus = make_corpus(root / "corpus", count=6)
    return WindowDataset(corpus, make_targets(corpus, root), block=BLOCK, stride=STRIDE)


@pytest.fixture(scope="module")
def batch(data):
    """The first window scores all of its rows, the others half of them."""
    return SparseTargetsCollator()([data[i] for i in range(3)])


def test_windows_cover_every_row_once(data):
    tokens = torch.from_numpy(data.corpus.token_ids.astype("int64"))
    labels = torch.cat([item["shift_labels"][item["shift_labels"] != -100] for item in data])
    assert torch.equal(labels, tokens[1:])
    row = 0
    for item in data:
        assert len(item["input_ids"]) == len(item["shift_labels"]) == BLOCK
        # A label inside the window is the input one further.
        inside = item["shift_labels"][:-1] != -100
        assert torch.equal(item["shift_labels"][:-1][inside], item["input_ids"][1:][inside])
        rows = data.targets.rows(row, row + item["targets"].num_rows)
        assert torch.equal(item["targets"].token_ids, rows.token_ids)
        row += rows.num_rows
    assert row == data.corpus.num_rows


def test_windows_travel_as_paths(data):
    packed = pickle.dumps(data)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert len(copy) == len(data)
    assert torch.equal(copy[2]["targets"].probs, data[2]["targets"].probs)


def test_windows_refuse_targets_of_another_corpus(data, tmp_path):
    other = make_corpus(tmp_path / "other", count=5, seed=9)
    with pytest.raises(ArtifactError, match="corpus"):
        WindowDataset(other, data.targets, block=BLOCK)


def test_batches_from_worker_processes(data):
    """Workers return copies of their rows, not of the whole memory-mapped file."""
    options = {"batch_size": 4, "collate_fn": SparseTargetsCollator()}
    plain = list(DataLoader(data, **options))
    for found, expected in zip(DataLoader(data, num_workers=2, **options), plain, strict=True):
        assert found.keys() == expected.keys()
        for name in ("input_ids", "labels", "shift_labels", "scored"):
            assert torch.equal(found[name], expected[name])
        for part in ("row_offsets", "token_ids", "probs"):
            here, there = getattr(found["targets"], part), getattr(expected["targets"], part)
            assert torch.equal(here, there)
            assert here.untyped_storage().nbytes() <= here.nbytes + 64


def test_pinning_and_moving_reach_the_targets(batch, monkeypatch):
    from accelerate.utils import send_to_device
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t.numel()) or t)
    assert isinstance(pin_memory(batch)["targets"], SparseTargets)
    assert batch["targets"].nnz in pinned
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert moved["targets"].device.type == moved["scored"].device.type == "meta"


def test_collator_pads_and_shifts():
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 50, (n,), generator=draw) for n in (5, 3)]
    masked = tokens[0].clone()
    masked[:2] = -100  # a prompt
    targets = [SparseTargets.from_dense(torch.rand(n, 50, generator=draw)) for n in (3, 2)]
    examples = [
        {"input_ids": tokens[0].tolist(), "labels": masked.tolist(), "targets": targets[0]},
        {"input_ids": tokens[1], "shift_labels": [int(tokens[1][1]), 7, -100]}
        | {"targets": targets[1]},
    ]
    batch = SparseTargetsCollator(pad_token_id=49)(examples)
    a, b = tokens[0].tolist(), tokens[1].tolist()
    assert batch["input_ids"].tolist() == [a, [*b, 49, 49]]
    assert batch["shift_labels"].tolist() == [[-100, *a[2:], -100], [b[1], 7, -100, -100, -100]]
    assert batch["labels"] is batch["shift_labels"]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["scored"].tolist() == [1, 2, 3, 5, 6]
    dense = torch.cat([t.to_dense(50) for t in targets])
    assert torch.equal(batch["targets"].to_dense(50), dense)
    model = tiny_model("llama").double()
    found = causal_lm_loss(model, batch | {"targets": batch["targets"]}, kl_weight=0.3)
    assert float(found.loss) == pytest.approx(float(dense_loss(model, batch, 0.3)), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": SparseTargets.empty(2)}, "number 1 has 2 rows of targets for 3 scored"),
        ({"shift_labels": [1, 2, 3]}, "expected input_ids, and labels"),
        ({"labels": [1, 2, 3]}, r"shapes .* expected vectors of one length"),
        ({"text": "a"}, r"\['text'\], expected only"),
        ({"targets": None}, "number 1 has no targets, but others have"),
        ({"targets": [1]}, "number 1 has targets of type list"),
        ({"input_ids": [1.5, 2, 3, 4]}, r"input_ids of number 1 is torch.float32 \(4,\)"),
        ({"labels": [[1, 2, 3, 4]]}, r"labels of number 1 is torch.int64 \(1, 4\)"),
        ({"labels": "abcd"}, "labels of number 1 is str, expected a vector of integers"),
        ({"input_ids": None}, "input_ids of number 1 is NoneType"),
    ],
)
def test_collator_names_the_bad_example(changes, message):
    good = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "targets": SparseTargets.empty(3)}
    with pytest.raises(ValueError, match=message):
        SparseTargetsCollator()([good, good | changes])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_dense_ones(batch, family, monkeypatch):
    """Tied and untied heads; and only scored rows reach the head."""
    model = tiny_model(family).double()
    expected = gradients(model, loss := dense_loss(model, batch, 0.3))
    shapes = []
    original = causal_lm.linear_sparse_kl
    monkeypatch.setattr(
        causal_lm,
        "linear_sparse_kl",
        lambda hidden, *a, **k: shapes.append(hidden.shape) or original(hidden, *a, **k),
    )
    for given in (batch, {k: v for k, v in batch.items() if k != "scored"}):
        out = causal_lm_loss(model, given, kl_weight=0.3)
        assert float(out.loss) == pytest.approx(float(loss), rel=1e-6)
        assert float(0.3 * out.kl + 0.7 * out.ce) == pytest.approx(float(loss), rel=1e-6)
        assert_close(gradients(model, out.loss), expected, 1e-6)
    assert shapes == 2 * [(BLOCK + 2 * STRIDE, HIDDEN_SIZE)]
    # The head is itself again.
    assert model(batch["input_ids"]).logits.shape == (3, BLOCK, VOCAB_SIZE)


def test_autocast_and_gradient_checkpointing(batch):
    model = tiny_model("llama").train()
    expected = gradients(model, loss := dense_loss(model, batch, 0.5))
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_lm_loss(model, batch)
    assert out.loss.dtype == torch.float32
    assert float(out.loss) == pytest.approx(float(loss), rel=2e-2)
    assert_close(gradients(model, out.loss), expected, 0.1)


def test_batch_without_scored_positions_has_no_gradient(batch):
    model = tiny_model("llama")
    empty = torch.full_like(batch["labels"], -100)
    out = causal_lm_loss(
        model, {"input_ids": batch["input_ids"], "shift_labels": empty}, kl_weight=0.0
    )
    assert float(out.loss) == 0
    assert all(not g.any() for g in gradients(model, out.loss).values())


def test_lora(batch):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_model("llama")
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero by default, and so all gradients of A
    expected = gradients(lora, dense_loss(lora, batch, 0.5))
    found = gradients(lora, causal_lm_loss(lora, batch).loss)
    assert_close(found, expected, 1e-4)
    assert any(g.any() for g in found.values())


def test_models_it_cannot_serve_are_refused(batch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE}
    capped = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=30.0, **sizes, **heads))
    with pytest.raises(ValueError, match="changes its logits after the LM head"):
        causal_lm_loss(capped, batch)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"compile model\.base_model"):
        causal_lm_loss(torch.compile(model), batch)
    with pytest.raises(ValueError, match="DataParallel"):
        causal_lm_loss(torch.nn.DataParallel(model), batch)
    for name in ("targets", "shift_labels", "input_ids"):
        with pytest.raises(ValueError, match=f"batch: has no {name}"):
            causal_lm_loss(model, {k: v for k, v in batch.items() if k != name})
    with pytest.raises(TypeError, match="model: expected a live Hugging Face causal LM, got int"):
        causal_lm_loss(3, batch)
    with pytest.raises(TypeError, match=r"batch: expected a mapping .*, got list"):
        causal_lm_loss(model, [batch])
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ValueError, match="already replaced"):
        causal_lm_loss(model, batch)


def test_keys_with_their_targets(data, tmp_path):
    root = data.targets.path.parent
    rows = KeyDataset(root / "datastore", data.targets, batch_size=100)
    copy = pickle.loads(pickle.dumps(rows))
    store = rows.datastore
    items = list(DataLoader(copy, batch_size=None, num_workers=1))
    assert [len(item["labels"]) for item in items[:-1]] == [100] * (len(rows) - 1)
    assert torch.equal(torch.cat([i["keys"] for i in items]), torch.tensor(store.keys).float())
    labels = torch.cat([item["labels"] for item in items])
    assert labels.tolist() == data.corpus.token_ids[1:].tolist()
    found = SparseTargets.cat([item["targets"] for item in items])
    expected = data.targets.rows(0, store.num_rows)
    assert torch.equal(found.row_offsets, expected.row_offsets)
    assert torch.equal(found.token_ids, expected.token_ids)
    other = make_targets(make_corpus(tmp_path / "corpus", count=3), tmp_path)
    with pytest.raises(ArtifactError, match="datastore"):
        KeyDataset(root / "datastore", other)
    with pytest.raises(TypeError, match="expected an artefact of the targets stage"):
        KeyDataset(root / "datastore", (expected, labels))
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got '3'"):
        KeyDataset(root / "datastore", data.targets, batch_size="3")
    with pytest.raises(ValueError, match="block must be an integer >= 1, got '32'"):
        WindowDataset(data.corpus, block="32")


def test_windows_with_targets_from_elsewhere(data):
    """A pair (SparseTargets, labels) travels with its data, having no path."""
    rows = data.targets.rows(0, data.corpus.num_rows)
    labels = torch.from_numpy(data.corpus.token_ids[1:].astype("int64"))
    pair = WindowDataset(data.corpus, (rows, labels), block=BLOCK, stride=STRIDE)
    copy = pickle.loads(pickle.dumps(pair))
    assert torch.equal(copy[1]["targets"].token_ids, data[1]["targets"].token_ids)
    with pytest.raises((ArtifactError, ValueError), match="label"):
        WindowDataset(data.corpus, (rows, labels.flip(0)), block=BLOCK, stride=STRIDE)
