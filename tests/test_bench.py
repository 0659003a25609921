"""The benchmark harness: its smoke suite runs, its files obey their schema, its statistics hold."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_fixtures
import pytest
from bench_fixtures import BENCH

load = bench_fixtures.load
OPS = ("knn_targets", "token_logprobs")  # the two cheapest; the whole smoke suite is a CI step


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The device folder that a smoke run of two ops leaves."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--suite", "smoke", "--out", str(out)]
    done = subprocess.run(
        [*command, "--ops", *OPS], capture_output=True, text=True, timeout=240, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    (device,) = out.iterdir()
    return device


@pytest.mark.parametrize("script", ["report", "plot"])
def test_a_folder_without_results_is_refused(tmp_path, script):
    command = [sys.executable, str(BENCH / f"{script}.py")]
    if script == "plot":
        pytest.importorskip("matplotlib", reason="matplotlib draws the plots")
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert usage.returncode == 0
    assert "DIR" in usage.stdout
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"{tmp_path}: no results of an operator (*.json); measure with bench/run.py"
    )


def test_smoke_writes_every_regime_and_a_floor(smoke, load):
    results = load("results")
    for op in OPS:
        document = results.read(smoke / f"{op}.json")
        assert set(document["environments"]) == {"stock", "tuned"}
        rows = document["rows"]
        for regime in ("stock", "tuned"):
            roles = [row["role"] for row in rows if row["regime"] == regime]
            assert roles.count("floor") >= 1
            assert roles.count("subject") >= 1
            assert roles.count("baseline") >= 1
        timed = [row for row in rows if row["role"] != "floor"]
        assert all(row["errors"] for row in timed), "a provider was timed without a check"
        assert all(row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"] for row in rows)


def test_smoke_draws_the_table_and_the_plots(smoke):
    text = (smoke / "README.md").read_text()
    for word in (*OPS, "stock", "tuned", "official_one_shot", "GB/s", "of floor"):
        assert word in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| N=9")}
    assert len(widths) == 1
    for name in ("floor", *(f"speedup_{op}" for op in OPS)):
        assert (smoke / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_schema_names_what_is_wrong(smoke, load, tmp_path):
    results = load("results")
    document = results.read(smoke / "knn_targets.json")
    for change, message in (
        (lambda d: d.pop("rows"), "expected the keys"),
        (lambda d: d["rows"][0].update(ms=1.0), r"rows\[0\].ms"),
        (lambda d: d["rows"][0].update(rounds="7"), r"rows\[0\].rounds"),
        (lambda d: d["goals"].append({}), r"goals\[0\]"),
    ):
        broken = copy.deepcopy(document)
        change(broken)
        with pytest.raises(ValueError, match=message):
            results.write(tmp_path / "x.json", broken)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text(json.dumps(document | {"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        results.read(tmp_path / "old.json")


def test_merge_keeps_the_regime_that_was_not_run(smoke, load):
    results = load("results")
    old = results.read(smoke / "knn_targets.json")
    new = copy.deepcopy(old)
    new["environments"] = {"tuned": old["environments"]["tuned"]}
    new["rows"] = [row for row in old["rows"] if row["regime"] == "tuned"]
    merged = results.merge(old, new)
    assert len(merged["rows"]) == len(old["rows"])
    assert set(merged["environments"]) == {"stock", "tuned"}
    assert results.merge(old | {"suite": "full"}, new) == new


def test_measure_reports_goals_by_per_round_ratios(load):
    cases, timing = load("cases"), load("timing")

    def spin(steps):
        return lambda: sum(range(steps))

    providers = [
        cases.Provider("mine", spin(200), cases.SUBJECT),
        cases.Provider("theirs", spin(20000)),
        cases.Provider("floor", spin(200), cases.FLOOR),
    ]
    case = cases.Case(
        op="spin",
        shape={"N": 1},
        dtype="fp32",
        providers=providers,
        check=lambda: {"mine": {"absolute": 0.0}},
        bytes_moved=1,
        floor="none",
        goals=[
            cases.Goal("mine", "theirs", {"stock": 1.5}),
            cases.Goal("mine", "theirs", {"stock": 1e9}),
            cases.Goal("mine", "floor", {"tuned": 1e9}),
        ],
    )
    rows, goals = timing.measure(case, "smoke", "stock")
    assert [goal["met"] for goal in goals] == [True, False]  # none of them has a tuned goal
    assert rows[1]["times_subject"]["mine"]["median"] > 1.5
    assert rows[1]["times_floor"]["median"] > 1.5


def test_wrong_results_are_not_timed(load):
    cases, timing = load("cases"), load("timing")
    calls = []

    def check():
        cases.require("mine", {"absolute": float("nan")}, {"absolute": 1e-5})

    case = cases.Case(
        op="wrong",
        shape={"N": 1},
        dtype="fp32",
        providers=[cases.Provider("mine", lambda: calls.append(1), cases.SUBJECT)],
        check=check,
        bytes_moved=1,
        floor="none",
    )
    with pytest.raises(cases.WrongResult, match="mine: absolute is nan"):
        timing.measure(case, "smoke", "stock")
    assert not calls


def test_regimes_set_nothing_but_their_own_variables(load, monkeypatch):
    regimes = load("regimes")
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD"):
        monkeypatch.setenv(name, "")
    stock = regimes.process_environment("stock")
    assert not {"GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "LD_PRELOAD"} & stock.keys()
    assert "hugetlb=1" in regimes.process_environment("tuned")["GLIBC_TUNABLES"]


def test_decoding_is_checked_and_timed(load, tmp_path):
    path = load("decode").main(["--smoke", "--out", str(tmp_path)])
    document = json.loads(path.read_text())
    assert all(speed > 0 for speed in document["figures"]["tiny: tokens_per_s"].values())
    assert document["ratios"]["tiny: base alone / mixture, auto drafts"]["median"] > 0
    drafts = document["figures"]["tiny: drafts"]["mixture, 4 drafts"]
    assert 0 < drafts["acceptance"] <= 1
    # Whatever was accepted, a pass emits what was kept and one more.
    assert 1 <= drafts["tokens_per_pass"] <= 5
    assert len(document["goals"]) == 5
