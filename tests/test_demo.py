"""The demo: its reuse of stages, its text, its verdict, and one short run of everything."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from pipeline_fixtures import tiny_documents, tiny_tokenizer

from mdkernels import SparseTargets
from mdkernels.demo import live, report, run
from mdkernels.demo.recipe import FULL, SHORT
from mdkernels.demo.reuse import Stages
from mdkernels.demo.text import take_documents


class Counted:
    """A stage that writes its settings to a file and counts how often it is made."""

    def __init__(self):
        self.made = 0

    def make(self, path):
        self.made += 1
        path.write_text("content")
        return f"made {self.made} times"

    @staticmethod
    def open(path):
        text = path.read_text()
        if text != "content":
            raise ValueError("altered")
        return text


@pytest.fixture
def again(tmp_path):
    """Stages of one work directory, as a new call of the demo sees them."""
    said = []
    return lambda: Stages(tmp_path / "work", said.append), said


def test_a_stage_runs_once(again):
    new, said = again
    stage = Counted()
    for _ in range(2):
        stages = new()
        assert stages.run("a", stage.make, stage.open, settings=1) == "content"
    assert stage.made == 1
    assert stages.reused == {"a": True}
    assert stages.notes == {"a": "made 1 times"}
    assert stages.seconds["a"] >= 0.0
    assert "reused" in said[-1]


def test_new_settings_or_inputs_make_it_again(again):
    new, _ = again
    first, second = Counted(), Counted()

    def call(settings):
        stages = new()
        stages.run("a", first.make, first.open, settings=settings)
        stages.run("b", second.make, second.open, settings=0, after=("a",))

    call(1)
    call(1)
    call(2)
    assert (first.made, second.made) == (2, 2)


@pytest.mark.parametrize("damage", ["altered", "gone", "record"])
def test_a_damaged_result_is_made_again(again, tmp_path, damage):
    new, said = again
    stage = Counted()
    new().run("a", stage.make, stage.open, settings=1)
    file, record = tmp_path / "work/a", tmp_path / "work/a.json"
    if damage == "altered":
        file.write_text("other")
    elif damage == "gone":
        file.unlink()
    else:
        record.write_text("{")
    assert new().run("a", stage.make, stage.open, settings=1) == "content"
    assert stage.made == 2
    assert damage == "record" or any("cannot be used" in line for line in said)


def test_a_stage_that_fails_leaves_no_record(again, tmp_path):
    new, _ = again
    stage = Counted()
    new().run("a", stage.make, stage.open, settings=1)

    def fail(path):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        new().run("a", fail, stage.open, settings=2)
    # The old result still lies there, but nothing says that it belongs to any settings.
    assert not (tmp_path / "work/a.json").exists()


def test_take_documents_stops_at_the_count():
    tokenizer = tiny_tokenizer()
    texts = tiny_documents(12)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    wanted = lengths[0] + lengths[1] + 1
    assert take_documents(iter(texts), tokenizer, wanted) == texts[:3]
    assert take_documents(iter(texts), tokenizer, lengths[0]) == texts[:1]
    assert take_documents(iter(texts), tokenizer, 10**9) == texts


def _targets(rows=64, vocab=101):
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(rows, vocab, generator=generator)
    dense[dense < 0.9] = 0.0
    dense[0] = 0.0
    dense[0, 5] = 1.0
    dense /= dense.sum(1, keepdim=True)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return SparseTargets.from_dense(dense), labels, vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_comparison_measures_equal_losses(dtype):
    targets, labels, vocab = _targets()
    found = live.compare_losses(targets, labels, vocab, dtype, rounds=3)
    assert set(found["milliseconds"]) == set(report.FASTEST_FIRST)
    for name, median in found["milliseconds"].items():
        low, high = found["quartiles"][name]
        assert 0.0 < low <= median <= high
    logits = torch.randn(len(labels), vocab, dtype=torch.float64)
    losses = [float(loss(logits.clone(), targets, labels)) for loss in live.LOSSES.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_live_comparison_refuses_a_wrong_loss(monkeypatch):
    targets, labels, vocab = _targets()
    monkeypatch.setattr(live, "dense_loss", lambda z, t, y: 1.01 * live.sparse_loss(z, t, y))
    with pytest.raises(RuntimeError, match="differs from the dense one"):
        live.compare_losses(targets, labels, vocab, torch.float32, rounds=3)


def _results(gain, over_ce, recipe=FULL):
    return {
        "config": {"recipe": dataclasses.asdict(recipe)},
        "rows": {"memory": {"mixture": {"gain_nats": gain}}},
        "differences": {"memory-ce": {"nats": over_ce}},
    }


@pytest.mark.parametrize(
    ("gain", "over_ce", "verdicts"),
    [(0.6, 0.05, [True, True]), (0.5, 0.05, [False, True]), (0.6, -0.01, [True, False])],
)
def test_verdict_of_the_full_demo(gain, over_ce, verdicts):
    found = report.checks(_results(gain, over_ce))
    assert [check.passed for check in found] == verdicts
    assert [str(check)[:4] for check in found] == ["PASS" if v else "FAIL" for v in verdicts]


def test_a_mixture_that_is_not_a_number_fails():
    assert not any(check.passed for check in report.checks(_results(math.nan, math.nan)))


def test_the_short_demo_judges_only_the_gain_over_the_base():
    assert [check.least for check in report.checks(_results(0.2, -1.0, SHORT))] == [SHORT.min_gain]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_short_demo_end_to_end_and_again(tmp_path, capsys):
    """MDK_SHORT_DEMO: a folder that `mdkernels demo --short` has filled already."""
    if os.environ.get("MDK_SHORT_DEMO"):
        shutil.copytree(os.environ["MDK_SHORT_DEMO"], tmp_path, dirs_exist_ok=True)
    else:
        run(tmp_path, short=True)
        assert "perplexity" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["passed"]
    base = results["rows"]["base"]["alone"]["nats"]
    mixtures = {name: row["mixture"] for name, row in results["rows"].items() if name != "base"}
    assert all(mixture["nats"] < base for mixture in mixtures.values())
    assert mixtures["memory"]["gain_nats"] > SHORT.min_gain
    # The same mixture, scored by `evaluate` in fp32 from the saved models.
    again = results["checked"]["mixture"]["nats_per_token"]
    assert again == pytest.approx(mixtures["memory"]["nats"], abs=0.02)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"report.md", "results.json", "generations.md", "eval.json"} <= written
    text = (tmp_path / "report.md").read_text()
    assert "PASS" in text
    assert all(row.long in text for row in report.ROWS)
    assert all(one["mixture"].strip() for one in results["generations"])

    second = run(tmp_path, short=True)
    assert all(stage["reused"] for stage in second["stages"].values())
    assert json.loads(json.dumps(second["rows"])) == results["rows"]
    assert second["run"]["seconds"] < results["run"]["seconds"] / 4
