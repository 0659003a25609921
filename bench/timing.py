"""Interleaved timing: every round takes one sample of every provider, so that a ratio compares
samples taken within the same second; medians with p20 and p80 over the rounds.

A sample is repeated while other processes disturb it. The order of the providers rotates from round
to round, and every provider runs the same `prepare` (which rewrites the inputs) before its sample,
so no provider inherits a cache state that another one does not get.
"""

import gc
import statistics
import time
from dataclasses import dataclass

from cases import FLOOR, SUBJECT, Case, Provider
from machine import OtherLoad, peak_increment


@dataclass
class Budget:
    """How long to measure a case: rounds within [min_rounds, max_rounds] until `seconds` are used.
    A sample of a repeatable provider makes enough calls to last `sample_seconds`."""

    min_rounds: int
    max_rounds: int
    seconds: float
    sample_seconds: float
    warmups: int
    retries: int  # of a disturbed sample, while the case is within twice its `seconds`


BUDGETS = {
    "full": Budget(
        min_rounds=7, max_rounds=25, seconds=6.0, sample_seconds=2e-3, warmups=1, retries=5
    ),
    "smoke": Budget(
        min_rounds=2, max_rounds=2, seconds=0.2, sample_seconds=1e-4, warmups=1, retries=0
    ),
}
DIRTY_SHARE = 0.04  # of one CPU, used by others or waited for during a sample


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": deciles[1], "p80": deciles[7]}


def _once(provider: Provider, calls: int) -> float:
    """Seconds per call. Freeing the result is part of a call: a training step pays for it too."""
    if provider.prepare is not None:
        provider.prepare()
    call = provider.call
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class _Sampler:
    def __init__(self, provider: Provider, budget: Budget, load: OtherLoad):
        self.provider, self.load, self.retries = provider, load, budget.retries
        for _ in range(budget.warmups):
            _once(provider, 1)
        once = _once(provider, 1)
        wanted = int(budget.sample_seconds / max(once, 1e-7)) + 1
        self.calls = min(wanted, 2000) if provider.repeatable else 1
        _once(provider, self.calls)
        self.seconds: list[float] = []
        self.discarded = 0
        self.contended = 0

    def sample(self, deadline: float) -> None:
        """Append a sample, taken again while others are busy. When the retries or the time for them
        run out, the last one counts and is reported as contended."""
        for attempt in range(self.retries + 1):
            mark = self.load.mark()
            seconds = _once(self.provider, self.calls)
            share = self.load.share_since(mark)
            if share is None or share < DIRTY_SHARE:
                break
            if attempt == self.retries or time.perf_counter() > deadline:
                self.contended += 1
                break
            self.discarded += 1
            time.sleep(0.01 * attempt)
        self.seconds.append(seconds)


def measure(case: Case, suite: str, regime: str) -> tuple[list[dict], list[dict]]:
    """Check, then time every provider. Returns (rows, goals) as they go into the results file."""
    budget = BUDGETS[suite]
    errors = case.check()
    peaks = {
        p.name: peak_increment(p.call, p.prepare) if regime == "stock" and p.role != FLOOR else None
        for p in case.providers
    }
    load = OtherLoad()
    samplers = [_Sampler(provider, budget, load) for provider in case.providers]
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() - started > budget.seconds:
                break
            shift = turn % len(samplers)
            for sampler in samplers[shift:] + samplers[:shift]:
                sampler.sample(started + 2 * budget.seconds)
    finally:
        gc.enable()
    load.close()
    rows = [_row(case, regime, sampler, samplers, errors, peaks) for sampler in samplers]
    return rows, _goals(case, regime, samplers)


def _ratio(over: _Sampler, under: _Sampler) -> dict[str, float]:
    """Per-round ratios, then their quantiles."""
    return quantiles([a / b for a, b in zip(over.seconds, under.seconds, strict=True)])


def _row(case, regime, sampler, samplers, errors, peaks) -> dict:
    provider = sampler.provider
    floor = next(s for s in samplers if s.provider.role == FLOOR)
    time_ms = {key: value * 1e3 for key, value in quantiles(sampler.seconds).items()}
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "regime": regime,
        "provider": provider.name,
        "role": provider.role,
        "ms": time_ms,
        "rounds": len(sampler.seconds),
        "calls_per_sample": sampler.calls,
        "samples_discarded": sampler.discarded,
        "samples_contended": sampler.contended,
        "times_subject": {
            s.provider.name: _ratio(sampler, s) for s in samplers if s.provider.role == SUBJECT
        },
        "times_floor": _ratio(sampler, floor),
        "floor": case.floor,
        "bytes_moved": case.bytes_moved,
        "gb_per_s": case.bytes_moved / time_ms["median"] / 1e6,
        "peak_increment_bytes": peaks[provider.name],
        "errors": errors.get(provider.name, {}),
        "notes": case.notes,
    }


def _goals(case: Case, regime: str, samplers: list[_Sampler]) -> list[dict]:
    by_name = {sampler.provider.name: sampler for sampler in samplers}
    goals = []
    for goal in case.goals:
        factor = goal.factor.get(regime)
        if factor is None:
            continue
        subject, baseline = by_name[goal.subject], by_name[goal.baseline]
        at_most = baseline.provider.role == FLOOR
        ratio = _ratio(subject, baseline) if at_most else _ratio(baseline, subject)
        goals.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "regime": regime,
                "subject": goal.subject,
                "baseline": goal.baseline,
                "relation": "at most" if at_most else "at least",
                "factor": factor,
                "measured": ratio,
                "met": ratio["median"] <= factor if at_most else ratio["median"] >= factor,
            }
        )
    return goals
