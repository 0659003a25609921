"""The compile gate: every launch in launches.py for every architecture, against baseline.json.

    python tests/triton_compile/gate.py [--op sparse_kl] [--arch 90] [--update] [--sass DIR]

Must run without TRITON_INTERPRET. Fails on a kernel that does not compile, needs more shared memory
than the GPU has, spills more than the baseline says, or, under the Triton version of the baseline,
needs more registers or shared memory or has fewer 16-byte accesses.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path

import offline
import triton
from launches import LAUNCHES

BASELINE = Path(__file__).with_name("baseline.json")
MEASURED = ("warps", "registers", "stack", "local", "shared", "wide")


def measure(op: str, arch: int, sass: Path | None) -> dict:
    """{"op kernel label sm_90": {warps, registers, stack, local, shared, wide}}"""
    found = {}
    for label, call in LAUNCHES[op](arch):
        with offline.compiling(arch) as compiled:
            call()
        if not compiled:
            raise RuntimeError(f"{op} {label}: nothing was launched")
        for name, kernel in compiled:
            key = f"{op} {name} {label} sm_{arch}"
            result = offline.inspect(name, kernel, arch)
            entry = {field: getattr(result, field) for field in MEASURED}
            if key in found:  # several specialisations in one call
                entry = {field: max(entry[field], found[key][field]) for field in MEASURED}
            found[key] = entry
            if sass:
                (sass / f"{key.replace(' ', '_')}.sass").write_text(result.sass)
    return found


def measure_all(ops, architectures, sass=None) -> dict:
    jobs = [(op, arch, sass) for arch in architectures for op in ops]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")  # torch has threads
    found = {}
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        for part in pool.map(measure, *zip(*jobs, strict=True)):
            found |= part
    return found


def violations(found: dict, baseline: dict, same_version: bool) -> list[str]:
    out = []
    for key, entry in found.items():
        limit = offline.SHARED_LIMIT[int(key.rpartition("sm_")[2])]
        if entry["shared"] > limit:
            out.append(f"{key}: {entry['shared']} bytes of shared memory, the GPU has {limit}")
        if entry["registers"] * entry["warps"] * 32 > offline.REGISTER_FILE:
            out.append(f"{key}: {entry['warps']} warps of {entry['registers']} registers: too many")
        known = baseline.get(key)
        if known is None:
            out.append(f"{key}: not in the baseline; run this with --update")
            known = {"stack": 0, "local": 0}
        checked = ["stack", "local"] + (["registers", "shared"] if same_version else [])
        out += [
            f"{key}: {field} {entry[field]}, baseline {known[field]}"
            for field in checked
            if field in known and entry[field] > known[field]
        ]
        if same_version and entry["wide"] < known.get("wide", 0):
            out.append(f"{key}: {entry['wide']} 16-byte accesses, baseline {known['wide']}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=LAUNCHES)
    parser.add_argument("--arch", action="append", type=int, choices=offline.ARCHITECTURES)
    parser.add_argument("--update", action="store_true", help="write what was measured")
    parser.add_argument("--sass", type=Path, help="also write the machine code there")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if arguments.sass:
        arguments.sass.mkdir(parents=True, exist_ok=True)

    ops = arguments.op or list(LAUNCHES)
    found = measure_all(ops, arguments.arch or offline.ARCHITECTURES, arguments.sass)
    stored = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"kernels": {}}
    if arguments.update:
        gone = {k for k in stored["kernels"] if k.split()[0] in ops and not arguments.arch}
        kept = {k: v for k, v in stored["kernels"].items() if k not in gone}
        lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted((kept | found).items())]
        version = json.dumps(triton.__version__)
        text = ",\n".join(lines)
        BASELINE.write_text(f'{{\n  "triton": {version},\n  "kernels": {{\n{text}\n  }}\n}}\n')
        stored = json.loads(BASELINE.read_text())
    wrong = violations(found, stored["kernels"], stored.get("triton") == triton.__version__)
    print("\n".join(wrong) or f"{len(found)} kernels within the baseline")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
