"""A GPU benchmark that was cut off goes on, and a process that dies or hangs costs one provider."""

import argparse
import json
import time

import bench_fixtures
import pytest
from bench_fixtures import make_case, providers

load = bench_fixtures.load


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
