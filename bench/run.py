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


def measure_gpu(args, started: float) -> None:
    """--device: the cases of bench/gpu, and the table. Ends with status 1 if one of ours failed."""
    from gpu import report, runner

    args.deadline = args.deadline or time.time() + args.seconds
    device, left = runner.run(args)
    path, failed = report.write(device)
    print(path.read_text())
    print(f"{path} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    if left:
        names = "\n  ".join(left)
        print(f"out of time; the same command goes on with:\n  {names}", file=sys.stderr)
    if failed:
        sys.exit(f'{len(failed)} failures of ours, listed above under "Not measured"')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", choices=("smoke", "full"), default="full")
    every = list(results.OPS)
    parser.add_argument("--ops", nargs="+", choices=every, default=every, metavar="OP")
    parser.add_argument("--regime", choices=regimes.CHOICES, default="both", help="CPU only")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench for smoke")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="the GPU cases; cpu stands in for the smoke suite"
    )
    parser.add_argument("--cases", default="", metavar="TEXT", help="GPU: cases with this text")
    parser.add_argument("--seconds", type=float, default=450.0, help="GPU: start no case later")
    parser.add_argument("--force", action="store_true", help="GPU: measure finished cases again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and args.suite == "full":
        parser.error(
            "--device cpu is a stand-in for --suite smoke; without --device, the CPU suite"
        )
    if args.worker and args.device:
        from gpu import runner

        runner.work(args)
        return
    if args.worker:
        work(args)
        return
    started = time.monotonic()
    args.out = args.out or OUT[args.suite]
    if args.device:
        measure_gpu(args, started)
        return
    measure_cpu(args, started)


def measure_cpu(args, started: float) -> None:
    try:
        written = run(args.suite, args.ops, regimes.CHOICES[args.regime], args.out)
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
