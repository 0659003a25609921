"""results/<device>/README.md of a GPU, and the table of goals with what is not measured yet.

`python bench/report.py --goals` prints the headlines of the goals.
"""

from pathlib import Path

import report
import results
from cases import FLOOR

from . import goals

ABSENT = "not measured yet"
BACKENDS = ("triton", "cuda")
HOW = """\
Written by `{command}`; do not edit. Every provider of a case was checked against float64 first; one
that failed is not timed and listed at the end. Times are medians over interleaved rounds with
[p20-p80], ratios medians of per-round ratios, by CUDA events. Before every sample, untimed, the
inputs of ops that overwrite them are rewritten and twice the size of the L2 cache is written.
Regime `stream`: calls of the public Python function, queued behind that write; at decoding sizes a
sample is one call on each of several input sets, so it includes what the host takes to launch them.
Regime `graph`: the same sample replayed from one CUDA graph, which leaves the device's own time.
"GB/s" divides the least bytes of the contract by the time; "of roof" is the time of the roof named
with the op, measured in the same rounds, over the provider's. "peak MB" is how far one call raises
allocated memory, its outputs included. "launches" counts kernels, copies and fills of one call."""


def _goal_rows(found: list[dict]) -> dict[tuple[str, str, str], dict]:
    """Measured goals by (identity, backend, regime)."""
    measured = {}
    for document in found:
        for goal in document["goals"]:
            backend = goal["subject"].partition("_")[0]
            key = (goal["goal"], backend, goal["regime"])
            # One goal may hold for several shapes: the worst of them counts.
            sign = 1 if goal["relation"] == goals.AT_LEAST else -1
            old = measured.get(key)
            if old is None or sign * goal["measured"]["median"] < sign * old["measured"]["median"]:
                measured[key] = goal
    return measured


def _value(goal: dict | None) -> str:
    if goal is None:
        return ABSENT
    value = goal["measured"]["median"]
    text = {"time": f"{value:.3g}x", "MB": f"{value:.3g} MB"}.get(goal["unit"], f"{value:.3g}")
    if goal["baseline"] == FLOOR:
        text = f"{100 * value:.3g} %"
    return f"{text}, {'met' if goal['met'] else '**not met**'}"


def _wanted(target: goals.Target) -> str:
    sign = ">=" if target.relation == goals.AT_LEAST else "<="
    if target.baseline == FLOOR:
        return f"{sign} {100 * target.factor:g} %"
    return f"{sign} {target.factor:g}{'x' if target.unit == 'time' else ''}"


# The part of the table that the project's README shows.
HEADLINES = (
    "sparse_kl roof 50257",
    "sparse_kl eager 50257",
    "sparse_kl compile 50257",
    "sparse_kl official 50257",
    "sparse_kl h2d 50257",
    "sparse_kl roof 151936",
    "sparse_kl k1024 151936",
    "token_logprobs roof",
    "mix_sample roof",
    "decode B=1",
    "decode B=64",
    "knn",
)


def goals_table(found: list[dict], only: tuple[str, ...] = ()) -> str:
    """Every target: for each GPU backend the value and whether it is met, or that it is missing."""
    measured = _goal_rows(found)
    lines = []
    for target in goals.TARGETS:
        if only and target.identity not in only:
            continue
        for regime in target.regimes:
            values = [_value(measured.get((target.identity, b, regime))) for b in BACKENDS]
            text = target.text + (f" ({regime})" if len(target.regimes) > 1 else "")
            lines.append([text, _wanted(target), *values])
    return report.table(["what", "goal", "Triton", "CUDA C++"], lines)


def _machine(found: list[dict]) -> str:
    runs = {run: e for document in found for run, e in document["environments"].items()}
    parts = []
    for run, e in runs.items():
        roofs = e["bandwidth"]
        gpu = e["gpu"]
        if "multiprocessors" in e:
            gpu += (
                f", compute capability {e['capability']}, {e['multiprocessors']} multiprocessors, "
                f"{e['memory_gb']} GB, {e['l2_mb']} MB L2"
            )
        settings = ", ".join(f"{k} {v}" for k, v in e.get("nvidia_smi", {}).items())
        parts.append(
            f"Run `{run}` of {e['date']}, commit {e['commit']}: {gpu}; {settings or 'no driver'}; "
            f"torch {e['torch']}, triton {e['triton']}, CUDA {e['cuda']}, Python {e['python']}, "
            f"{e['cpu']}, {e['cores']} cores. Over {roofs['bytes'] >> 20} MB buffers: copy "
            f"{roofs['copy_gb_per_s']:g} GB/s (read plus written), read "
            f"{roofs['read_gb_per_s']:g} GB/s.\n"
        )
    return "\n".join(parts)


def _kinds(document: dict, marks: dict[str, str]) -> str:
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["kind"] == kind]
        subjects = list(dict.fromkeys(name for row in rows for name in row["times_subject"]))
        head = ["shape", "dtype", "regime", "provider", "ms"]
        head += [f"x {name}" for name in subjects]
        head += ["GB/s", "of roof", "peak MB", "launches", "error", "run"]
        lines = []
        for row in rows:
            peak, launches = row["peak_increment_bytes"], row["launches"]
            ratios = [row["times_subject"].get(name) for name in subjects]
            lines.append(
                [
                    report.shape(row),
                    row["dtype"],
                    row["regime"],
                    row["provider"],
                    report.spread(row["ms"], 4),
                    *("" if ratio is None else f"{ratio['median']:.3g}" for ratio in ratios),
                    f"{row['gb_per_s']:.4g}",
                    f"{100 / row['times_floor']['median']:.3g} %",
                    "" if peak is None else f"{peak / 1e6:.4g}",
                    "" if launches is None else f"{launches:g}",
                    report.error(row),
                    marks[row["run"]],
                ]
            )
        table = report.table(head, lines)
        parts.append(f"### {document['op']}: {kind}\n\nRoof: {rows[0]['floor']}.\n\n{table}\n")
    return "\n".join(parts)


def _unmeasured(found: list[dict]) -> str:
    lines = [
        [case["key"], u["provider"] or "the case", u["phase"], u["regime"], u["reason"]]
        for document in found
        for case in document["cases"]
        for u in case["unmeasured"]
    ]
    if not lines:
        return ""
    lines = [[cell.replace("|", "/") for cell in line] for line in lines]
    table = report.table(["case", "provider", "step", "regime", "why"], lines)
    return f"## Not measured\n\n{table}\n"


def render(found: list[dict]) -> str:
    """The whole README.md of a device."""
    runs = dict.fromkeys(run for document in found for run in document["environments"])
    marks = {run: str(number) for number, run in enumerate(runs, 1)}
    parts = [
        f"# Benchmark on {found[0]['device']}, suite {found[0]['suite']}\n",
        HOW.format(command=found[0]["command"]) + "\n",
        _machine(found),
        f"## Goals\n\n{goals_table(found)}\n",
    ]
    by_op = {document["op"]: document for document in found}
    for op in results.OPS:
        text = _kinds(by_op[op], marks) if op in by_op else ""
        parts.append(f"## {op}\n\n{text or ABSENT + '.'}\n")
    return "\n".join(part for part in [*parts, _unmeasured(found)] if part)


def write(device: Path) -> tuple[Path, list[dict]]:
    """README.md of a device; returns it and what failed of ours."""
    found = report.documents(device)
    path = device / "README.md"
    path.write_text(render(found))
    cases = [case for document in found for case in document["cases"]]
    return path, [u for case in cases for u in case["unmeasured"] if u["ours"]]


def measured(root: Path) -> list[dict]:
    """The documents of the GPU whose results are there; the last in the order of names."""
    chosen: list[dict] = []
    for folder in sorted(root.glob("nvidia-*")):
        chosen = report.documents(folder) or chosen
    return chosen
