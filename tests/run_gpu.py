"""Runs every GPU test and says how many ran: `python tests/run_gpu.py [--jobs N] [FILE ...]`.

Each test file has a process of its own with a time limit that ends it whatever it does: a kernel
that never returns would otherwise hold up everything after it, since no signal interrupts a wait
for the device. Ends with status 1 when a test failed, a process died, or no GPU test ran.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).resolve().parent
COUNTED = ("tests", "failures", "errors", "skipped")


def files() -> list[Path]:
    """The test files that can hold GPU tests: of an operator, or marked."""
    sign = re.compile(
        r"^OP = |^pytestmark = pytest.mark.gpu|mix_fixtures|import .*knn_targets", re.M
    )
    return [path for path in sorted(TESTS.glob("test_*.py")) if sign.search(path.read_text())]


def run_file(path: Path, marker: str, deadline: float, out: Path) -> dict:
    report, log = out / f"{path.stem}.xml", out / f"{path.stem}.log"
    command = [sys.executable, "-m", "pytest", "-m", marker, str(path), "-p", "no:cacheprovider"]
    command += ["--junit-xml", str(report), "-ra", "--tb=short", "--maxfail=20"]
    environment = dict(os.environ, PYTHONFAULTHANDLER="1")
    environment.setdefault("OMP_NUM_THREADS", "2")
    result = dict.fromkeys(COUNTED, 0) | {"file": path.name, "problem": "", "log": log}
    started = time.monotonic()
    seconds = max(1.0, deadline - started)
    with log.open("w") as sink:
        try:
            status = subprocess.run(
                command,
                cwd=TESTS.parent,
                env=environment,
                stdout=sink,
                stderr=sink,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            result["problem"] = f"no end after {seconds:.0f} s"
            status = None
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        result |= {name: int(suite.get(name)) for name in COUNTED}
    elif status is not None and status != 5:  # 5: nothing selected
        result["problem"] = f"the process ended with status {status}"
    result["seconds"] = time.monotonic() - started
    return result


def tell(result: dict) -> None:
    ran = result["tests"] - result["skipped"]
    bad = result["failures"] + result["errors"]
    state = result["problem"] or (f"{bad} FAILED" if bad else "ok")
    what = f"{ran} ran, {result['skipped']} skipped, {state} ({result['seconds']:.0f} s)"
    print(f"{result['file']:<32}{what}", flush=True)
    if bad or result["problem"]:
        lines = result["log"].read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-60:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all that can hold GPU tests")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of all files together")
    parser.add_argument("--out", type=Path, help="where the logs and JUnit files go")
    parser.add_argument("--marker", default="gpu", help="pytest -m")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="gpu-tests-"))
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pending = [
            pool.submit(run_file, path.resolve(), args.marker, deadline, out)
            for path in args.files or files()
        ]
        results = []
        for future in concurrent.futures.as_completed(pending):
            results.append(future.result())
            tell(results[-1])
    total = {name: sum(result[name] for result in results) for name in COUNTED}
    ran = total["tests"] - total["skipped"]
    bad = total["failures"] + total["errors"]
    dead = [result["file"] for result in results if result["problem"]]
    print(f"{ran} GPU tests ran: {ran - bad} passed, {bad} failed; {total['skipped']} skipped")
    if dead:
        print(f"without a result: {', '.join(dead)}")
    print(f"logs: {out}")
    sys.exit(1 if bad or dead or not ran else 0)


if __name__ == "__main__":
    main()
