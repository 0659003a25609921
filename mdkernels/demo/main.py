"""Runs the recipe, then writes and prints what came out."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from . import plots, report
from .pipeline import Demo
from .recipe import FULL, SHORT, Machine, Recipe, cpu_name, this_machine
from .reuse import Stages


def run_demo(out: Path, short: bool) -> dict[str, Any]:
    # Fresh multi-megabyte tensors at every step are page faults first; with huge pages a training
    # step is a fifth faster. torch reads this once, at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.disable_progress_bar()  # one bar per checkpoint that is loaded, and the demo loads many
    began, cpu_before, load_before = time.perf_counter(), _cpu_seconds(), os.getloadavg()[0]
    recipe = SHORT if short else FULL
    machine = this_machine(recipe)
    stages = Stages(out / "work")
    results = {"config": _config(recipe, machine), **Demo(recipe, machine, stages).run()}
    results["stages"] = {
        name: {"seconds": stages.seconds[name], "reused": stages.reused[name], "note": note}
        for name, note in stages.notes.items()
    }
    results["run"] = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": _cpu_seconds() - cpu_before,
        "load": [load_before, os.getloadavg()[0]],
    }
    results["passed"] = all(check.passed for check in report.checks(results))
    _write(results, out)
    return results


def _write(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    generations = report.generations_markdown(results["generations"])
    (out / "generations.md").write_text(generations, encoding="utf-8")
    shutil.copyfile(out / "work" / "eval.json", out / "eval.json")
    drawn = plots.write_plots(results, out)
    text = report.markdown(results, [path.name for path in drawn], plots.HOW_TO_INSTALL)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{report.perplexity_table(results)}\n")
    print("Memory Decoder mixture, better (+) or worse (-):")
    print(f"{report.difference_lines(results)}\n")
    print("\n".join(map(str, report.checks(results))))
    if results["config"]["recipe"]["min_gain_over_ce"] is None:
        print(report.ONLY_RUNS.replace("*", ""))
    if not drawn:
        print(plots.HOW_TO_INSTALL)
    print(f"{results['run']['seconds']:.0f} s; the report is {out / 'report.md'}")


def _config(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    here = {
        "name": _device_name(machine),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **dataclasses.asdict(machine),
    }
    return {
        "recipe": dataclasses.asdict(recipe),
        "memory_steps": recipe.memory_steps,
        "machine": here,
    }


def _device_name(machine: Machine) -> str:
    if machine.device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(machine.device))
    return cpu_name()


def _cpu_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
