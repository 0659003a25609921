"""The GPU benchmark harness, without a GPU: it times nothing that is wrong, and its
tables say what is not measured yet."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import bench_fixtures
import pytest
import torch
from bench_fixtures import BENCH, Clock, make_case, measure, providers

load = bench_fixtures.load
ROOT = BENCH.parent
OPS = ("token_logprobs", "mix_sample")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The device folder that a smoke run of two ops on the stand-in leaves."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--device", "cpu", "--suite", "smoke"]
    done = subprocess.run(
        [*command, "--out", str(out), "--ops", *OPS], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (device,) = out.iterdir()
    return device


def test_smoke_checks_everything_and_judges_the_goals(smoke, load):
    results = load("results")
    for op in OPS:
        document = results.read(smoke / f"{op}.json")
        rows = document["rows"]
        assert {row["role"] for row in rows} == {"subject", "baseline", "floor"}
        assert all(row["errors"] for row in rows if row["role"] != "floor")
        assert {row["run"] for row in rows} == set(document["environments"])
        assert not [u for case in document["cases"] for u in case["unmeasured"]]
        wanted = {"token_logprobs": {"gold", "alignment"}, "mix_sample": {"gold", "decode"}}[op]
        assert wanted <= {goal["kind"] for goal in document["goals"]}
        assert {"at least", "at most"} == {goal["relation"] for goal in document["goals"]}


def test_table_says_what_is_not_measured(smoke):
    text = (smoke / "README.md").read_text()
    assert "## sparse_kl\n\nnot measured yet" in text
    assert "| knn_targets, 16384 x 1024: official loops | >= 100x | not measured yet |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| N=9 V=1001")}
    assert len(widths) == 2  # one subject, and two of them where alignments are compared


def test_goals_without_results_are_all_not_measured(load):
    report, goals = load("gpu.report"), load("gpu.goals")
    lines = report.goals_table([]).splitlines()[2:]
    assert len(lines) == sum(len(target.regimes) for target in goals.TARGETS)
    assert all(line.endswith("| not measured yet | not measured yet |") for line in lines)


def test_readme_shows_what_is_committed(load):
    report = load("gpu.report")
    table = report.goals_table(report.measured(BENCH / "results"), report.HEADLINES)
    assert table in (ROOT / "README.md").read_text(), "paste: python bench/report.py --goals"


def measured_goal(load, **changes) -> list[dict]:
    target = load("gpu.goals").TARGETS[0]
    goal = {"goal": target.identity, "subject": "cuda_inplace", "regime": "stream", "unit": "time"}
    goal |= {"relation": target.relation, "baseline": target.baseline, "met": True}
    goal |= {"measured": {"median": 0.91, "p20": 0.9, "p80": 0.92}, **changes}
    return [{"goals": [goal]}]


def test_goals_show_the_measured_value_and_the_verdict(load):
    report = load("gpu.report")
    first = report.goals_table(measured_goal(load)).splitlines()[2]
    assert first.endswith("| >= 85 % | not measured yet | 91 %, met |")
    missed = measured_goal(load, met=False, subject="triton_inplace")
    assert (
        report.goals_table(missed)
        .splitlines()[2]
        .endswith("91 %, **not met** | not measured yet |")
    )


def test_memory_and_launches_are_goals_of_their_own(load):
    targets = {target.identity: target for target in load("gpu.goals").TARGETS}
    memory, launches = targets["sparse_kl memory 50257"], targets["launches B=1"]
    row = {"peak_increment_bytes": 3_000_000, "output_bytes": 1_000_000, "launches": 2.0}
    assert (memory.value(row), launches.value(row)) == (2.0, 2.0)
    assert memory.value(row | {"peak_increment_bytes": None}) is None
    assert (
        load("gpu.report")
        .goals_table(measured_goal(load, goal=memory.identity, unit="MB", baseline="", met=False))
        .count("0.91 MB, **not met**")
        == 1
    )


def test_goals_keep_the_worst_of_several_shapes(load):
    report = load("gpu.report")
    worse = {"median": 0.5, "p20": 0.5, "p80": 0.5}
    found = measured_goal(load) + measured_goal(load, measured=worse, met=False)
    for documents in (found, found[::-1]):
        assert "50 %, **not met**" in report.goals_table(documents).splitlines()[2]


# ---- one case in this process


def test_ratios_and_goals(load):
    clock = Clock()
    found = measure(load, make_case(load, providers(load, clock)), clock)
    by_name = {row["provider"]: row for row in found["rows"]}
    assert by_name["eager"]["times_subject"]["cpu"]["median"] == pytest.approx(25.0)
    assert by_name["cpu"]["times_floor"]["median"] == pytest.approx(1.25)
    assert by_name["cpu"]["ms"]["median"] == pytest.approx(0.2)
    goals = {goal["goal"]: goal for goal in found["goals"]}
    assert goals["token_logprobs eager"]["met"]
    assert goals["token_logprobs roof"]["baseline"] == "floor"


@pytest.mark.parametrize("broken", ["cpu", "eager"])
def test_a_provider_that_fails_its_check_is_left_out(load, broken):
    cases = load("cases")
    calls = []

    def check(provider):
        if provider.name == broken:
            cases.require(broken, {"absolute": math.nan}, {"absolute": 1.0})
        return {"absolute": 0.0}

    mine = providers(load)
    next(p for p in mine if p.name == broken).call = lambda: calls.append(1)
    found = measure(load, make_case(load, mine, check))
    assert not calls, "timed although it is wrong"
    (entry,) = found["unmeasured"]
    assert (entry["provider"], entry["ours"]) == (broken, broken == "cpu")
    assert "absolute is nan" in entry["reason"]
    # Without one of ours there is nothing to compare.
    assert bool(found["rows"]) == (broken == "eager")


def test_a_backend_that_declines_is_no_failure(load):
    from mdkernels import BackendUnavailable

    def check(provider):
        if provider.name == "cpu":
            raise BackendUnavailable("no filters")
        return {"absolute": 0.0}

    (entry,) = measure(load, make_case(load, providers(load), check))["unmeasured"]
    assert not entry["ours"]


def test_a_lost_device_ends_the_process(load, monkeypatch):
    device, timing = load("gpu.device"), load("gpu.timing")
    monkeypatch.setattr(device.StandIn, "alive", lambda self: False)

    def check(provider):
        raise RuntimeError("illegal memory access")

    with pytest.raises(timing.DeviceLost, match="illegal memory access"):
        measure(load, make_case(load, providers(load), check))


def graph_device(load, monkeypatch, graph):
    device = load("gpu.device")
    monkeypatch.setattr(device.StandIn, "regimes", ("stream", "graph"))
    monkeypatch.setattr(device.StandIn, "graph", lambda self, call: graph(call), raising=False)
    mine = providers(load)
    for provider in mine:
        provider.graph, provider.units = provider.name != "eager", 3
    case = make_case(load, mine)
    case.regimes, case.op, case.kind, case.shape = ("stream", "graph"), "mix_sample", "decode", {}
    return case


def test_both_regimes_are_measured(load, monkeypatch):
    case = graph_device(load, monkeypatch, lambda call: call)
    found = measure(load, case)
    names = {regime: [] for regime in ("stream", "graph")}
    for row in found["rows"]:
        names[row["regime"]].append(row["provider"])
    assert names == {"stream": ["cpu", "eager", "floor"], "graph": ["cpu", "floor"]}
    assert {goal["regime"] for goal in found["goals"]} == {"stream"}  # eager is in no graph here
    (one,) = [r for r in found["rows"] if (r["provider"], r["regime"]) == ("cpu", "stream")]
    assert one["calls_per_sample"] == 3


def test_a_failed_capture_ends_the_process_and_is_left_out_of_that_regime(
    load, monkeypatch, tmp_path
):
    def graph(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    case, timing = graph_device(load, monkeypatch, graph), load("gpu.timing")
    steps = []
    device = load("gpu.device").StandIn()
    with pytest.raises(timing.DeviceLost, match="not permitted"):
        timing.measure(case, device, "smoke", lambda *step: steps.append(step))
    assert steps[-1] == ("cpu", "capture", "graph")
    runner = load("gpu.runner")
    state = runner.State(tmp_path / "state")
    plan = load("gpu.case").Plan(case.op, case.kind, case.shape, case.dtype, lambda: case)
    state.update(case=plan.key, provider="cpu", phase="capture", regime="graph", ours=True)
    runner._avoid(state, runner.LOST)
    monkeypatch.setattr(load("gpu.device").StandIn, "graph", lambda self, call: call)
    found = runner._measure(plan, device, "smoke", state)
    assert {row["regime"] for row in found["rows"]} == {"stream"}
    assert [(u["provider"], u["regime"]) for u in found["unmeasured"]] == [("cpu", "graph")]


# ---- inputs


@pytest.mark.parametrize("vocab", [1001, 50257, 50304, 151936])
def test_target_ids_are_distinct_within_a_row(load, vocab):
    loss = load("gpu.sparse_kl")
    k = min(1024, vocab // 16)
    targets, labels = loss.make_targets(loss.uniform_lengths(32, k), vocab, "cpu")
    targets.validate(vocab)
    assert all(len(row.unique()) == k for row in targets.token_ids.view(32, k))
    assert int(labels.max()) < vocab


def test_ragged_and_uniform_targets_are_as_many(load):
    loss = load("gpu.sparse_kl")
    lengths = loss.ragged_lengths(8192, 64, 1024)
    assert int(lengths.sum()) == 8192 * 64
    assert (int(lengths.min()), int(lengths.max())) == (1, 1023)
    assert float(lengths.double().std()) > 32


def test_truth_is_the_dense_loss(load):
    loss = load("gpu.sparse_kl")
    z = torch.randn(7, 101, dtype=torch.float64).requires_grad_()
    targets, labels = loss.make_targets(loss.uniform_lengths(7, 5), 101, "cpu")
    logq = z.log_softmax(1)
    p = targets.to_dense(101).double()
    kl = (torch.xlogy(p, p) - p * logq).sum()
    ce = -logq.gather(1, labels[:, None]).sum()
    wanted = (0.5 * kl + 0.5 * ce) / 7
    wanted.backward()
    truth = loss.Truth(z.detach(), targets, labels, 0.5)
    errors = truth.errors(float(wanted.detach()), z.grad)
    assert max(errors.values()) < 1e-10
    wrong = copy.deepcopy(z.grad)
    wrong[3, 50] += 1.0
    assert truth.errors(float(wanted.detach()), wrong)["grad_absolute"] == pytest.approx(7.0)
