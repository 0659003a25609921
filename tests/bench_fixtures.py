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


class Clock:
    """Time that passes only where a provider says so: a ratio is then what it ought to be."""

    now = 0.0

    def passing(self, seconds):
        def call():
            self.now += seconds

        return call


def providers(load, clock=None):
    cases = load("cases")
    clock = clock or Clock()
    return [
        cases.Provider("cpu", clock.passing(2e-4), cases.SUBJECT),
        cases.Provider("eager", clock.passing(5e-3)),
        cases.Provider("floor", clock.passing(1.6e-4), cases.FLOOR),
    ]


def measure(load, case, clock=None):
    device = load("gpu.device").StandIn()
    if clock is not None:

        def seconds(call, times, prepare):
            start = clock.now
            for _ in range(times):
                call()
            return (clock.now - start) / times

        device.seconds = seconds
    return load("gpu.timing").measure(case, device, "smoke", lambda *step: None)
