"""Runs the cases, every op in a process of its own (all in one for the smoke suite), which a crash
or a hang of a new kernel may take down without ending the run: a state file names the step in
progress, the process is started again without that provider, and the results say why it is missing.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .case import Plan
from .device import choose, require
from .store import Store

RUN = Path(__file__).resolve().parents[1] / "run.py"
PATIENCE = {"full": 100.0, "smoke": 60.0}  # seconds without a sign of life
RESTARTS = 8  # per process
BANDWIDTH_BYTES = {"full": 2 << 30, "smoke": 1 << 20}
LOST = 86  # exit status of a process whose device answers no more


class State:
    """The step in progress and what to leave out, shared with the process that started this one."""

    def __init__(self, path: Path):
        self.path = path
        self.content = {"case": "", "provider": "", "phase": "", "regime": ""}
        self.content |= {"avoid": [], "done": [], "left": []}
        if path.exists():
            self.content = json.loads(path.read_text())

    def update(self, **changes) -> None:
        self.content |= changes
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps(self.content))
        partial.replace(self.path)

    def avoided(self, case: str) -> list[dict]:
        return [entry for entry in self.content["avoid"] if entry["case"] == case]


def command_line(args) -> str:
    options = "" if args.suite == "full" else f" --suite {args.suite}"
    return f"python bench/run.py --device {args.device}{options}"


def work(args) -> None:
    """The process of some ops."""
    from . import floors

    device = choose(args.device)
    state = State(args.state)
    roofs = None
    for op in args.ops:
        store = Store(args.out, op, device, args.suite, command_line(args))
        plans = importlib.import_module(f"gpu.{op}").plans(args.suite, device)
        todo = [p for p in plans if args.cases in p.key and p.key not in state.content["done"]]
        todo = [p for p in todo if args.force or not store.finished(p.key)]
        if todo and roofs is None:
            state.update(case="", provider="", phase="bandwidth")
            roofs = floors.bandwidth(device, BANDWIDTH_BYTES[args.suite])
        store.environment["bandwidth"] = roofs
        for plan in todo:
            if time.time() > args.deadline:
                state.update(left=[*state.content["left"], plan.key])
            else:
                _one(plan, device, args.suite, state, store)


def _one(plan: Plan, device, suite: str, state: State, store: Store) -> None:
    from .timing import DeviceLost

    started = time.monotonic()
    try:
        measured = _measure(plan, device, suite, state)
    except DeviceLost as lost:
        state.update(reason=str(lost))
        sys.exit(LOST)
    store.add(plan, measured)
    state.update(done=[*state.content["done"], plan.key])
    _report(plan, measured, time.monotonic() - started)
    del measured
    device.release()


def _measure(plan: Plan, device, suite: str, state: State) -> dict:
    from .timing import DeviceLost, measure

    avoided = state.avoided(plan.key)
    unmeasured = [entry for entry in avoided if entry["provider"]]
    whole = [entry for entry in avoided if not entry["provider"]]
    if whole:
        return {"rows": [], "goals": [], "unmeasured": whole}
    state.update(case=plan.key, provider="", phase="inputs", regime="", reason="")
    try:
        case = plan.build()
        device.synchronize()
    except Exception as error:
        entry = {"provider": "", "phase": "inputs", "regime": "", "ours": False}
        entry["reason"] = f"{type(error).__name__}: {error}"[:300]
        if not device.alive():
            raise DeviceLost(entry["reason"]) from error
        return {"rows": [], "goals": [], "unmeasured": [entry]}
    left_out = {(entry["provider"], entry["regime"]) for entry in unmeasured}
    case.providers = [
        p
        for p in case.providers
        if (p.name, "") not in left_out and (p.name, "stream") not in left_out
    ]
    for provider in case.providers:
        provider.graph &= (provider.name, "graph") not in left_out
    roles = {p.name: p.role == "subject" for p in case.providers}

    def progress(provider: str, phase: str, regime: str) -> None:
        ours = roles.get(provider, False)
        state.update(case=plan.key, provider=provider, phase=phase, regime=regime, ours=ours)

    result = measure(case, device, suite, progress)
    result["unmeasured"] += unmeasured
    return result


def _report(plan: Plan, measured: dict, seconds: float) -> None:
    for regime in dict.fromkeys(row["regime"] for row in measured["rows"]):
        rows = [row for row in measured["rows"] if row["regime"] == regime]
        times = ", ".join(f"{row['provider']} {row['ms']['median']:.4g}" for row in rows)
        print(f"{plan.key} {regime}: {times} ms", file=sys.stderr)
    for entry in measured["unmeasured"]:
        mark = "FAILED" if entry["ours"] else "left out"
        print(
            f"  {mark} {entry['provider']} ({entry['phase']}): {entry['reason']}", file=sys.stderr
        )
    print(f"  {seconds:.1f} s", file=sys.stderr, flush=True)


def run(args) -> tuple[Path, list[str]]:
    """Measure `args.ops`; returns (the device's folder, the cases that time ran out for)."""
    require(args.device)
    left: list[str] = []
    groups = [[op] for op in args.ops] if args.suite == "full" else [args.ops]
    with tempfile.TemporaryDirectory() as scratch:
        for group in groups:
            left += _run_group(group, args, Path(scratch) / f"{group[0]}.state")
    return args.out / choose(args.device).name, left


def _run_group(ops: list[str], args, path: Path) -> list[str]:
    command = [sys.executable, str(RUN), "--worker", "--device", args.device]
    command += ["--suite", args.suite, "--out", str(args.out), "--state", str(path)]
    command += ["--deadline", str(args.deadline), "--cases", args.cases]
    command += ["--force"] * args.force + ["--ops", *ops]
    for _ in range(RESTARTS):
        status = _watched(command, path, PATIENCE[args.suite])
        state = State(path)
        if status == 0:
            return state.content["left"]
        _avoid(state, status)
    sys.exit(f"{' '.join(ops)}: gave up after {RESTARTS} failures; see above")


def _watched(command: list[str], path: Path, patience: float) -> int | None:
    """Exit status; None after a kill because the state did not change for `patience` seconds."""
    process = subprocess.Popen(command)
    try:
        last, content = time.monotonic(), None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.5)
            now = path.read_text() if path.exists() else None
            if now != content:
                last, content = time.monotonic(), now
            if time.monotonic() - last > patience:
                return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _avoid(state: State, status: int | None) -> None:
    """Note the step that ended the process, so that the next one leaves it out."""
    step = state.content
    if not step["case"]:
        sys.exit(f"the benchmark process failed outside of a case (status {status}); see above")
    how = "no sign of life" if status is None else f"the process ended with status {status}"
    reason = f"{how}. {step.get('reason') or ''}".strip()
    entry = {"case": step["case"], "provider": step["provider"], "phase": step["phase"]}
    entry |= {"regime": step["regime"], "reason": reason, "ours": step.get("ours", False)}
    print(
        f"{step['case']}: {step['provider'] or 'the case'}: {reason}", file=sys.stderr, flush=True
    )
    state.update(avoid=[*step["avoid"], entry])
