"""What the tests of the benchmark harness share: its modules, and a made-up case on a GPU."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def load(monkeypatch):
    """Import a module of bench/ as run.py does, and forget it afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


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
