"""What the benchmarks of whole steps share: interleaved samples, and the results file.

One JSON per benchmark and device, `results/<device>/end_to_end/<name>.json`, rewritten whole:

    format, benchmark, device, command, environment, setting     what was measured, where
    ms          {provider: {median, p20, p80, rounds, contended}}
    ratios      {"a / b": {median, p20, p80}}                    medians of per-round ratios
    figures     whatever else the benchmark counts (bytes, losses, differences)
    goals       [{goal, measured, met}]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from results import rounded
from timing import DIRTY_SHARE, quantiles

import mdkernels

FORMAT = 1
HERE = Path(__file__).resolve().parent


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--smoke", action="store_true", help="tiny: checks only, times mean nothing")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rounds", type=int, help="interleaved samples of every provider")
    made.add_argument(
        "--out", type=Path, help="default: bench/results/<device>/end_to_end; build/bench for smoke"
    )
    return made


class Sampler:
    """Interleaved seconds of several callables, one sample each per round, in rotating order."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.load = machine.OtherLoad()
        self.seconds: dict[str, list[float]] = {}
        self.contended: dict[str, int] = {}

    def run(self, calls: dict[str, Callable[[], object]], rounds: int) -> None:
        """Append `rounds` samples of every call; freeing what it returned is part of a sample."""
        names = list(calls)
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    self.sample(name, calls[name])
        finally:
            gc.enable()

    def sample(self, name: str, call: Callable[[], object]) -> None:
        self._wait()
        mark = self.load.mark()
        start = time.perf_counter()
        call()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        share = self.load.share_since(mark)
        self.contended.setdefault(name, 0)
        self.contended[name] += share is not None and share >= DIRTY_SHARE

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self) -> dict[str, dict]:
        return {
            name: {key: 1e3 * value for key, value in quantiles(values).items()}
            | {"rounds": len(values), "contended": self.contended[name]}
            for name, values in self.seconds.items()
        }

    def ratio(self, over: str, under: str) -> dict[str, float]:
        """Of the rounds of both, which must be as many; a single sample counts in every round."""
        above, below = self.seconds[over], self.seconds[under]
        if len(above) == 1:
            above = above * len(below)
        pairs = zip(above, below, strict=True)
        return quantiles([a / b for a, b in pairs])


def goal(text: str, measured: float, met: bool) -> dict:
    return {"goal": text, "measured": measured, "met": bool(met)}


def environment() -> dict:
    found = machine.environment("as found", {})
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def device_name(device: str) -> str:
    if device == "cpu":
        return machine.device_name()
    words = torch.cuda.get_device_name().lower().split()
    return "-".join(words if words[0] == "nvidia" else ["nvidia", *words])


def write(args, name: str, **content) -> Path:
    """Write the results file of this run and print its path and medians."""
    device = device_name(args.device)
    default = HERE / "results" / device / "end_to_end"
    if args.smoke:
        default = HERE.parent / "build" / "bench" / "smoke"
    folder = args.out or default
    document = {
        "format": FORMAT,
        "benchmark": name,
        "device": device,
        "command": " ".join(["python", f"bench/{name}.py", *sys.argv[1:]]),
        "mdkernels": mdkernels.__version__,
        "environment": environment(),
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(rounded(document), indent=1) + "\n")
    partial.replace(path)
    for provider, ms in content.get("ms", {}).items():
        print(f"{provider:32} {ms['median']:10.4g} ms [{ms['p20']:.4g}-{ms['p80']:.4g}]")
    for pair, ratio in content.get("ratios", {}).items():
        print(f"{pair:32} {ratio['median']:10.4g} x  [{ratio['p20']:.4g}-{ratio['p80']:.4g}]")
    for item in content.get("goals", ()):
        print(f"{'met ' if item['met'] else 'MISSED'} {item['goal']}: {item['measured']:.4g}")
    print(path, file=sys.stderr)
    return path
