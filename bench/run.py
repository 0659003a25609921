"""Benchmark of the operators: `python bench/run.py [--suite smoke|full] [--ops OP ...]`.

Every provider of a case is checked against float64 before anything is timed. Writes one JSON per op
to OUT/<device>/ as soon as the op is done (so a run can be cut off and continued with --ops), then
the table OUT/<device>/README.md and the plots, which come from the JSON alone.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import regimes
import results

HERE = Path(__file__).resolve().parent
OUT = {"full": HERE / "results", "smoke": HERE.parent / "build" / "bench" / "smoke"}
BANDWIDTH_BYTES = {"full": 256 << 20, "smoke": 1 << 20}


def work(args) -> None:
    """In the process of one regime: measure `args.ops` and leave a document each in `args.out`."""
    import floors
    import machine
    import timing

    environment = machine.environment(args.regime, regimes.REGIMES[args.regime])
    environment["bandwidth"] = floors.bandwidth(BANDWIDTH_BYTES[args.suite])
    for op in args.ops:
        rows, goals = [], []
        for case in importlib.import_module(op).cases(args.suite):
            started = time.monotonic()
            case_rows, case_goals = timing.measure(case, args.suite, args.regime)
            rows += case_rows
            goals += case_goals
            report_progress(case, args.regime, case_rows, time.monotonic() - started)
        document = {
            "format": results.FORMAT,
            "op": op,
            "device": machine.device_name(),
            "suite": args.suite,
            "command": f"python bench/run.py --suite {args.suite}",
            "environments": {args.regime: environment},
            "rows": rows,
            "goals": goals,
        }
        results.write(Path(args.out) / f"{op}.{args.regime}.json", document)


def report_progress(case, regime: str, rows: list[dict], seconds: float) -> None:
    times = ", ".join(f"{row['provider']} {row['ms']['median']:.3g}" for row in rows)
    dirty = sum(row["samples_discarded"] for row in rows)
    note = f", {dirty} samples taken again" if dirty else ""
    print(f"{case.label} {regime}: {times} ms ({seconds:.0f} s{note})", file=sys.stderr, flush=True)


def run(suite: str, ops: list[str], chosen: list[str], out: Path) -> list[Path]:
    """Measure in one process per regime (and per op in the full suite); returns the files."""
    groups = [[op] for op in ops] if suite == "full" else [ops]
    written = []
    for group in groups:
        for regime in chosen:
            with tempfile.TemporaryDirectory() as scratch:
                command = [sys.executable, str(HERE / "run.py"), "--worker", "--suite", suite]
                command += ["--regime", regime, "--out", scratch, "--ops", *group]
                subprocess.run(command, env=regimes.process_environment(regime), check=True)
                for op in group:
                    new = results.read(Path(scratch) / f"{op}.{regime}.json")
                    path = out / new["device"] / f"{op}.json"
                    old = results.read(path) if path.exists() else None
                    results.write(path, results.merge(old, new))
                    written.append(path)
    return list(dict.fromkeys(written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", choices=("smoke", "full"), default="full")
    every = list(results.OPS)
    parser.add_argument("--ops", nargs="+", choices=every, default=every, metavar="OP")
    parser.add_argument("--regime", choices=regimes.CHOICES, default="both")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench for smoke")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    started = time.monotonic()
    try:
        written = run(
            args.suite, args.ops, regimes.CHOICES[args.regime], args.out or OUT[args.suite]
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"a benchmark process failed with status {error.returncode}; see above")
    import plot
    import report

    device = written[0].parent
    readme = report.write(device)
    plots = plot.draw(device)
    print(readme.read_text())
    files = ", ".join(path.name for path in (*written, readme, *plots))
    print(f"{device}: {files} ({time.monotonic() - started:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
