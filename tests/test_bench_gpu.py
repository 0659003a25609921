"""The GPU benchmark harness, without a GPU: it resumes, survives crashes and hangs, times nothing
that is wrong, and its tables say what is not measured yet."""

import argparse
import copy
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
OPS = ("token_logprobs", "mix_sample")


@pytest.fixture
def load(monkeypatch):
    """Import a module of bench/ as run.py does, and forget it afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


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


def test_goals_keep_the_worst_of_several_shapes(load):
    report = load("gpu.report")
    worse = {"median": 0.5, "p20": 0.5, "p80": 0.5}
    found = measured_goal(load) + measured_goal(load, measured=worse, met=False)
    for documents in (found, found[::-1]):
        assert "50 %, **not met**" in report.goals_table(documents).splitlines()[2]


# ---- one case in this process


def make_case(load, providers, check=None):
    case = load("gpu.case")
    return case.GpuCase(
        op="token_logprobs",
        kind="gold",
        shape={"N": 1},
        dtype="bf16",
        providers=providers,
        check=check or (lambda provider: {"absolute": 0.0}),
        bytes_moved=1000,
        floor="none",
    )


def spin(steps):
    return lambda: sum(range(steps))


def providers(load):
    cases = load("cases")
    return [
        cases.Provider("cpu", spin(200), cases.SUBJECT),
        cases.Provider("eager", spin(20000)),
        cases.Provider("floor", spin(300), cases.FLOOR),
    ]


def measure(load, case):
    device = load("gpu.device").StandIn()
    return load("gpu.timing").measure(case, device, "smoke", lambda *step: None)


def test_ratios_and_goals(load):
    found = measure(load, make_case(load, providers(load)))
    by_name = {row["provider"]: row for row in found["rows"]}
    assert by_name["eager"]["times_subject"]["cpu"]["median"] > 5
    assert by_name["cpu"]["times_floor"]["median"] < 1.5
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


# ---- resuming


@pytest.fixture
def worker(load, monkeypatch, tmp_path):
    """work() on two cases of a made-up module, and which of them it built."""
    runner, case = load("gpu.runner"), load("gpu.case")
    built = []

    def build(name):
        if name in worker.failing:
            raise KeyboardInterrupt  # as a kill does, past every handler
        built.append(name)
        made = make_case(load, providers(load))
        made.kind = name
        return made

    class Module:
        @staticmethod
        def plans(suite, device):
            for name in ("gold", "alignment"):
                yield case.Plan("token_logprobs", name, {"N": 1}, "bf16", lambda n=name: build(n))

    def worker(**changes):
        built.clear()
        options = {"device": "cpu", "suite": "smoke", "ops": ["token_logprobs"], "cases": ""}
        options |= {"out": tmp_path, "state": tmp_path / "state", "force": False}
        options |= {"deadline": time.time() + 100, **changes}
        (tmp_path / "state").unlink(missing_ok=True)
        runner.work(argparse.Namespace(**options))
        return list(built)

    device = load("gpu.device")
    monkeypatch.setattr(device.StandIn, "peak", lambda self, call, prepare: 0)  # collects garbage
    worker.failing, worker.state = set(), tmp_path / "state"
    worker.file = tmp_path / "cpu-stand-in" / "token_logprobs.json"
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: Module)
    return worker


def test_a_killed_run_goes_on_where_it_stopped(worker, load):
    worker.failing.add("alignment")
    with pytest.raises(KeyboardInterrupt):
        worker()
    document = load("results").read(worker.file)
    assert [case["key"].split()[1] for case in document["cases"]] == ["gold"]
    before = document["rows"]
    worker.failing.clear()
    assert worker() == ["alignment"]
    document = load("results").read(worker.file)
    assert document["rows"][: len(before)] == before
    assert len(document["rows"]) == 2 * len(before)
    assert worker() == []
    assert worker(force=True) == ["gold", "alignment"]
    assert worker(force=True, cases="gold") == ["gold"]
    assert len(load("results").read(worker.file)["rows"]) == 2 * len(before)


def test_other_sources_are_measured_again_and_old_results_kept_until_then(
    worker, load, monkeypatch
):
    worker()
    monkeypatch.setattr(load("machine"), "sources", lambda: "changed")
    assert worker(cases="gold") == ["gold"]
    document = load("results").read(worker.file)
    assert len(document["environments"]) == 2
    runs = {row["kind"]: row["run"] for row in document["rows"]}
    assert runs["gold"].startswith("changed")
    assert not runs["alignment"].startswith("changed")
    assert worker() == ["alignment"]
    assert len(load("results").read(worker.file)["environments"]) == 1


def test_out_of_time_leaves_the_rest_for_the_next_run(worker):
    assert worker(deadline=time.time() - 1) == []
    left = json.loads(worker.state.read_text())["left"]
    assert [key.split()[1] for key in left] == ["gold", "alignment"]


# ---- a process that dies or hangs

WORKER = """
import json, sys, time
from pathlib import Path
path = Path(sys.argv[sys.argv.index("--state") + 1])
state = json.loads(path.read_text()) if path.exists() else {"avoid": [], "done": [], "left": []}
if not state["avoid"]:
    state |= {"case": "op kind N=1 bf16", "provider": "cuda", "phase": "check", "ours": True}
    state["regime"] = ""
    path.write_text(json.dumps(state))
    ACTION
state["left"] = [entry["provider"] + ": " + entry["reason"] for entry in state["avoid"]]
path.write_text(json.dumps(state))
"""


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("import os; os.abort()", "the process ended with status -6."),
        ("sys.exit(86)", "the process ended with status 86."),
        ("time.sleep(60)", "no sign of life."),
    ],
)
def test_the_step_that_took_the_process_down_is_left_out(
    load, monkeypatch, tmp_path, action, reason
):
    runner = load("gpu.runner")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("ACTION", action))
    monkeypatch.setattr(runner, "RUN", script)
    monkeypatch.setattr(runner, "PATIENCE", {"smoke": 2.0})
    options = {"device": "cpu", "suite": "smoke", "out": tmp_path, "cases": "", "force": False}
    args = argparse.Namespace(**options, deadline=0.0)
    assert runner._run_group(["sparse_kl"], args, tmp_path / "state") == [f"cuda: {reason}"]


def test_avoided_providers_are_in_the_results_with_their_reason(load, tmp_path):
    runner, case = load("gpu.runner"), load("gpu.case")
    state = runner.State(tmp_path / "state")
    made = make_case(load, providers(load))
    plan = case.Plan(made.op, made.kind, made.shape, made.dtype, lambda: made)
    entry = {"case": plan.key, "provider": "eager", "phase": "check", "regime": ""}
    state.update(avoid=[entry | {"reason": "no sign of life", "ours": False}])
    device = load("gpu.device").StandIn()
    found = runner._measure(plan, device, "smoke", state)
    assert {row["provider"] for row in found["rows"]} == {"cpu", "floor"}
    assert found["unmeasured"][0]["reason"] == "no sign of life"


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
