"""results/<device>/README.md from the JSON files beside it: `python bench/report.py DIR`.

With --goals instead: the table of the project's README, from the GPU results that are there."""

import argparse
from pathlib import Path

import regimes
import results

HOW = """\
Written by `{command}`; do not edit. Every provider of a case was checked against float64 first.
Times are medians over interleaved rounds with [p20-p80]; ratios are medians of per-round ratios.
"GB/s" divides the bytes of the floor by the time. "of floor" is the measured floor's time, taken in
the same rounds on the same buffers, over the provider's; 100 % cannot be beaten by a kernel with
the same contract. "peak" is how far one call raises resident memory (stock regime). Samples during
which other processes used more than 4 % of a CPU were discarded and taken again; a `*` marks a
provider some of whose samples stayed disturbed."""


def documents(device: Path) -> list[dict]:
    """Every results file of a device, in the order of `results.OPS`."""
    found = {path.stem: results.read(path) for path in device.glob("*.json")}
    if not found.keys() & set(results.OPS):
        raise SystemExit(f"{device}: no results of an operator (*.json); measure with bench/run.py")
    return [found[op] for op in results.OPS if op in found]


def spread(value: dict, digits: int = 3) -> str:
    return f"{value['median']:.{digits}g} [{value['p20']:.{digits}g}-{value['p80']:.{digits}g}]"


def shape(row: dict) -> str:
    return " ".join(f"{name}={size}" for name, size in row["shape"].items())


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _goals(found: list[dict]) -> str:
    lines = []
    for document in found:
        for goal in document["goals"]:
            versus = f"{goal['subject']} / {goal['baseline']}"
            if goal["relation"] == "at least":
                versus = f"{goal['baseline']} / {goal['subject']}"
            lines.append(
                [
                    goal["op"],
                    shape(goal),
                    goal["dtype"],
                    goal["regime"],
                    versus,
                    f"{goal['relation']} {goal['factor']:g}x",
                    spread(goal["measured"]),
                    "yes" if goal["met"] else "**no**",
                ]
            )
    if not lines:
        return ""
    head = ["op", "shape", "dtype", "regime", "time ratio", "goal", "measured", "met"]
    met = sum(line[-1] == "yes" for line in lines)
    return f"## Goals: {met} of {len(lines)} met\n\n{table(head, lines)}\n"


def error(row: dict) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())


def _op(document: dict) -> str:
    rows = document["rows"]
    subjects = list(rows[0]["times_subject"])
    head = ["shape", "dtype", "regime", "provider", "ms"]
    head += [f"x {name}" if len(subjects) > 1 else "x" for name in subjects]
    head += ["GB/s", "of floor", "peak MB", "error"]
    lines = []
    for row in sorted(rows, key=lambda row: list(regimes.REGIMES).index(row["regime"])):
        part = row["role"] == "part"
        peak = row["peak_increment_bytes"]
        mark = "*" if row["samples_contended"] else ""
        lines.append(
            [
                shape(row),
                row["dtype"],
                row["regime"],
                row["provider"] + mark,
                spread(row["ms"]),
                *(f"{row['times_subject'][name]['median']:.3g}" for name in subjects),
                "" if part else f"{row['gb_per_s']:.3g}",
                "" if part else f"{100 / row['times_floor']['median']:.3g} %",
                "" if peak is None else f"{peak / 1e6:.3g}",
                error(row),
            ]
        )
    notes = {name: value for row in rows for name, value in row["notes"].items()}
    text = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in notes.items())
    moved = f"Floor: {rows[0]['floor']}{text}."
    return f"## {document['op']}\n\n{moved}\n\n{table(head, lines)}\n"


def _machine(found: list[dict]) -> str:
    environments = [(d["op"], e) for d in found for e in d["environments"].values()]
    first = environments[0][1]
    text = (
        f"{first['cpu']} (family/model {first['cpu_family_model']}), {first['cores']} cores, "
        f"{first['memory_gb']} GB, {first['libc']}, kernel {first['kernel']}, transparent huge "
        f"pages `{first['transparent_hugepage']}`.\n"
    )
    for regime in dict.fromkeys(e["regime"] for _, e in environments):
        settings = next(e["regime_settings"] for _, e in environments if e["regime"] == regime)
        pairs = " ".join(f"`{name}={value}`" for name, value in settings.items())
        text += f"\n* regime **{regime}**: {pairs or 'nothing set (glibc malloc as it is)'}"
    kinds = [name for name in first["bandwidth"] if name != "bytes"]
    head = ["op", "regime", "date", "commit", "torch", "ISA", "threads"]
    head += [name.replace("_gb_per_s", "").replace("_", " ") for name in kinds]
    lines = []
    for op, e in environments:
        fixed = [op, e["regime"], e["date"], e["commit"], e["torch"], str(e["isa"])]
        bandwidth = [f"{e['bandwidth'].get(kind, 0):.3g}" for kind in kinds]
        lines.append([*fixed, str(e["threads"]), *bandwidth])
    size = first["bandwidth"]["bytes"] >> 20
    return (
        f"{text}\n\nMemory bandwidth over {size} MB buffers in GB/s (bytes read plus written):\n\n"
        f"{table(head, lines)}\n"
    )


def render(found: list[dict]) -> str:
    """The whole README.md."""
    if "cases" in found[0]:
        from gpu import report as gpu_report

        return gpu_report.render(found)
    title = f"# Benchmark on {found[0]['device']}, suite {found[0]['suite']}\n"
    parts = [title, HOW.format(command=found[0]["command"]) + "\n", _machine(found)]
    parts += [_goals(found), *(_op(document) for document in found)]
    return "\n".join(part for part in parts if part)


def write(device: Path) -> Path:
    path = device / "README.md"
    path.write_text(render(documents(device)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("device", nargs="?", type=Path, metavar="DIR", help="bench/results/<device>")
    what.add_argument("--goals", action="store_true", help="print the GPU goals, as in README.md")
    arguments = parser.parse_args()
    if arguments.goals:
        from gpu import report as gpu_report

        found = gpu_report.measured(Path(__file__).parent / "results")
        print(gpu_report.goals_table(found, gpu_report.HEADLINES))
    else:
        print(write(arguments.device))


if __name__ == "__main__":
    main()
