"""The benchmarks of whole steps at smoke size: what they compare agrees, their files are whole."""

import json
import sys
from pathlib import Path

import pytest
from bench_fixtures import load  # noqa: F401 (a fixture)

pytest.importorskip("pyarrow")  # the authors' format


@pytest.fixture
def run(load, tmp_path, monkeypatch):  # noqa: F811
    """Run bench/<name>.py --smoke in this process; the document it writes."""

    def call(name, *options):
        command = [f"bench/{name}.py", "--smoke", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", command)
        load(name).main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return call


def check_document(document, name, providers):
    assert document["benchmark"] == name
    assert document["command"].startswith(f"python bench/{name}.py --smoke")
    assert document["environment"]["torch"]
    assert set(document["ms"]) == providers
    for ms in document["ms"].values():
        assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]


def test_loader(run):
    document = run("loader")
    check_document(document, "loader", {"ours", "official"})
    figures = document["figures"]
    assert figures["largest_difference"] < 1e-3
    assert figures["bytes_of_batch"]["official_dense"] > 4 * figures["bytes_of_batch"]["ours"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluate(run, dtype):
    document = run("evaluate", "--dtype", dtype)
    starts = ("from logits", "from hidden states", "20 weights")
    providers = {f"{side}, {start}" for side in ("official", "ours") for start in starts}
    check_document(document, "evaluate", providers | {"ours, from logits, all scored"})
    differences = document["figures"]["differences_in_nats"]
    assert set(differences) == {"from logits", "from hidden states", "curve"}
    # The chain in fp32 on bf16 inputs is as exact as ours; only the products round.
    assert differences["from logits"] < 1e-5
    assert differences["curve"] < 1e-5
    assert len(document["ratios"]) == 4
    goals = " ".join(one["goal"] for one in document["goals"])
    assert all(f"mix NLL {start} 8x" in goals for start in starts[:2])


def test_train_step(run):
    document = run("train_step")
    official = {"official", "official without anomaly mode"}
    check_document(document, "train_step", {"ours", *official})
    assert set(document["ratios"]) == {f"{name} / ours" for name in official}
    assert document["figures"]["gradient_difference"] < 5e-4


def test_a_step_that_differs_is_not_timed(run, load, monkeypatch):  # noqa: F811
    monkeypatch.setattr(load("train_step"), "KL_WEIGHT", 0.25)
    loop = load("official_loop")
    loss = loop.loss
    monkeypatch.setattr(loop, "loss", lambda *given: loss(*given[:-1], 0.5))
    with pytest.raises(load("cases").WrongResult, match="loss_difference is"):
        run("train_step")


def test_loss_curves_agree_to_the_noise_of_fp32(run, load, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MDK_SHARED_DATA", str(tmp_path))  # the same text wherever this runs
    document = run("loss_curves")
    losses = document["figures"]["losses"]
    assert {len(curve) for curve in losses.values()} == {25}
    assert losses["ours"][-1] < losses["ours"][0] - 0.1
    gaps = document["figures"]["differences"]
    noise = load("loss_curves").fp32_noise(gaps)
    assert 0 < noise < 1e-4
    assert gaps["ours - official"]["max"] <= 2 * noise
    assert (Path(tmp_path) / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
