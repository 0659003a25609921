"""Interleaved timing on a device: every round takes one sample of every provider, in rotating
order, cold caches before each; medians with p20 and p80 over the rounds, ratios per round.

A provider that fails (wrong result, out of memory, unsupported) is left out and named with its
reason; the others are measured. Nothing is timed that was not checked.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import FLOOR, SUBJECT, Provider
from timing import quantiles

from mdkernels import BackendUnavailable

from . import goals
from .case import GpuCase
from .device import Device


class DeviceLost(RuntimeError):
    """The device answers no more in this process."""


@dataclass
class Budget:
    min_rounds: int
    max_rounds: int
    share: float  # of the case's seconds
    sample_seconds: float


BUDGETS = {
    "full": Budget(min_rounds=5, max_rounds=40, share=1.0, sample_seconds=1e-3),
    "smoke": Budget(min_rounds=2, max_rounds=2, share=0.05, sample_seconds=1e-5),
}
SLOW = 1.0  # seconds: a provider above it is sampled in the first SLOW_ROUNDS rounds only
SLOW_ROUNDS = 3


class _Sampler:
    """One provider in one regime. `seconds[i]` belongs to round i, of one call of the op."""

    def __init__(self, provider: Provider, run: Callable, device: Device, budget: Budget):
        self.provider, self.run, self.device = provider, run, device
        once = self._once(1)  # it ran before, in its check
        wanted = int(budget.sample_seconds / max(once, 1e-7))
        self.times = max(1, min(wanted, 200)) if provider.repeatable else 1
        if provider.units > 1:  # its calls already rotate over inputs that are cold
            self.times = 1
        self.slow = once > SLOW
        self.seconds: list[float] = []

    def _once(self, times: int) -> float:
        return self.device.seconds(self.run, times, self.provider.prepare)

    def sample(self) -> None:
        self.seconds.append(self._once(self.times) / self.provider.units)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def measure(case: GpuCase, device: Device, suite: str, progress: Callable) -> dict:
    """{"rows", "goals", "unmeasured"} of a case. `progress(provider, phase, regime)` is told before
    each step that could take the process down."""
    unmeasured: list[dict] = []
    errors, peaks, launches = {}, {}, {}
    alive: list[Provider] = []

    def attempt(provider: Provider, phase: str, action: Callable, regime: str = ""):
        """action(), or None and an entry in `unmeasured`."""
        progress(provider.name, phase, regime)
        try:
            result = action()
            device.synchronize()
            return result
        except Exception as error:
            what = {"case": case.key, "provider": provider.name, "reason": _reason(error)}
            # A backend that says it cannot do this is left out, and counting launches is up to the
            # profiler; anything else of ours is a bug.
            excused = isinstance(error, BackendUnavailable) or phase == "launches"
            ours = provider.role == SUBJECT and not excused
            what |= {"phase": phase, "regime": regime, "ours": ours}
            unmeasured.append(what)
            del error
        # torch does not leave a capture that failed: stream and generator stay in it.
        if phase == "capture":
            raise DeviceLost(unmeasured[-1]["reason"])
        device.release()
        if not device.alive():
            raise DeviceLost(unmeasured[-1]["reason"])
        return None

    for provider in case.providers:
        if provider.role != FLOOR:
            errors[provider.name] = attempt(provider, "check", lambda p=provider: case.check(p))
            if errors[provider.name] is None:
                continue
        device.release()
        peaks[provider.name] = attempt(
            provider, "peak", lambda p=provider: (device.peak(p.call, p.prepare),)
        )
        if peaks[provider.name] is None:
            continue
        if case.count_launches and provider.role != FLOOR:
            launches[provider.name] = attempt(
                provider, "launches", lambda p=provider: (device.launches(p.call),)
            )
        alive.append(provider)

    rows, found = [], []
    for regime in case.regimes:
        if regime not in device.regimes:
            continue
        samplers = []
        for provider in alive:
            run = provider.call
            if regime == "graph":
                if not provider.graph:
                    continue
                run = attempt(provider, "capture", lambda p=provider: device.graph(p.call), regime)
            sampler = run and attempt(
                provider,
                "warm-up",
                lambda p=provider, r=run: _Sampler(p, r, device, BUDGETS[suite]),
                regime,
            )
            if sampler:
                samplers.append(sampler)
        if not any(s.provider.role == SUBJECT for s in samplers):
            continue
        progress("", "timing", regime)
        _rounds(samplers, BUDGETS[suite], case.seconds)
        for s in samplers:
            extra = {"errors": errors.get(s.provider.name) or {}, "peak": peaks[s.provider.name][0]}
            counted = launches.get(s.provider.name)
            extra["launches"] = counted[0] / s.provider.units if counted and counted[0] else None
            rows.append(_row(case, regime, s, samplers, extra))
        found += _goals(case, regime, samplers, rows, suite)
    return {"rows": rows, "goals": found, "unmeasured": unmeasured}


def _rounds(samplers: list[_Sampler], budget: Budget, seconds: float) -> None:
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(budget.max_rounds):
            used = time.perf_counter() - started
            if turn >= budget.min_rounds and used > seconds * budget.share:
                break
            shift = turn % len(samplers)
            for sampler in samplers[shift:] + samplers[:shift]:
                if not (sampler.slow and turn >= SLOW_ROUNDS):
                    sampler.sample()
    finally:
        gc.enable()


def _ratio(over: _Sampler, under: _Sampler) -> dict[str, float]:
    """Per-round ratios of the rounds that have both, then their quantiles."""
    return quantiles([a / b for a, b in zip(over.seconds, under.seconds, strict=False)])


def _row(case: GpuCase, regime: str, sampler: _Sampler, samplers: list, extra: dict) -> dict:
    provider = sampler.provider
    floor = next((s for s in samplers if s.provider.role == FLOOR), sampler)
    time_ms = {key: value * 1e3 for key, value in quantiles(sampler.seconds).items()}
    return {
        "op": case.op,
        "kind": case.kind,
        "shape": case.shape,
        "dtype": case.dtype,
        "regime": regime,
        "provider": provider.name,
        "role": provider.role,
        "ms": time_ms,
        "rounds": len(sampler.seconds),
        "calls_per_sample": sampler.times * provider.units,
        "samples_discarded": 0,
        "samples_contended": 0,
        "times_subject": {
            s.provider.name: _ratio(sampler, s) for s in samplers if s.provider.role == SUBJECT
        },
        "times_floor": _ratio(sampler, floor),
        "floor": case.floor,
        "bytes_moved": case.bytes_moved,
        "gb_per_s": case.bytes_moved / time_ms["median"] / 1e6,
        "peak_increment_bytes": extra["peak"],
        "output_bytes": case.outputs(provider),
        "launches": extra["launches"],
        "errors": extra["errors"],
        "notes": case.notes,
    }


def _goals(case: GpuCase, regime: str, samplers: list, rows: list[dict], suite: str) -> list[dict]:
    by_name = {s.provider.name: s for s in samplers}
    floor = next((s for s in samplers if s.provider.role == FLOOR), None)
    mine = {row["provider"]: row for row in rows if row["regime"] == regime}
    result = []
    for target in goals.of_case(case.op, case.kind, case.shape, regime, suite):
        for name, subject in by_name.items():
            if subject.provider.role != SUBJECT or not target.is_subject(name):
                continue
            baseline = target.baseline_of(name)
            if target.unit == "time":
                other = floor if baseline == FLOOR else by_name.get(baseline)
                if other is None:
                    continue
                pair = (subject, other) if target.relation == goals.AT_MOST else (other, subject)
                measured = _ratio(*pair)
            else:
                value = target.value(mine[name])
                if value is None:
                    continue
                measured = quantiles([value])
            middle = measured["median"]
            met = (
                middle <= target.factor
                if target.relation == goals.AT_MOST
                else (middle >= target.factor)
            )
            result.append(
                {
                    "op": case.op,
                    "kind": case.kind,
                    "shape": case.shape,
                    "dtype": case.dtype,
                    "regime": regime,
                    "subject": name,
                    "baseline": baseline,
                    "relation": target.relation,
                    "factor": target.factor,
                    "unit": target.unit,
                    "goal": target.identity,
                    "measured": measured,
                    "met": met,
                }
            )
    return result


def no_grad(function: Callable) -> Callable:
    """As decoding and evaluation call it."""

    def call():
        with torch.no_grad():
            return function()

    return call
