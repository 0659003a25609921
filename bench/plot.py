"""Plots from the results files alone: `python bench/plot.py DIR`.

speedup_<op>.png: how many times longer every baseline takes than the kernel, with p20-p80.
floor.png: how many times longer the kernels take than the memory floor measured beside them.
"""

import argparse
from pathlib import Path

import report

COLORS = {"stock": "#4269d0", "huge": "#efb118", "tuned": "#ff725c"}


def _name(row: dict) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    return f"{sizes} {row['dtype']}"


def _bars(axes, names: list[str], by_regime: dict[str, dict[str, dict]]) -> None:
    """Horizontal bars, one per name and regime, whiskers from p20 to p80, the value at the end."""
    height = 0.8 / len(by_regime)
    for slot, (regime, values) in enumerate(by_regime.items()):
        present = [i for i, name in enumerate(names) if name in values]
        ratios = [values[names[i]] for i in present]
        middle = [ratio["median"] for ratio in ratios]
        whiskers = [
            [max(0.0, r["median"] - r["p20"]) for r in ratios],
            [max(0.0, r["p80"] - r["median"]) for r in ratios],
        ]
        place = [i + (slot - (len(by_regime) - 1) / 2) * height for i in present]
        axes.barh(place, middle, height, color=COLORS.get(regime), label=regime)
        axes.errorbar(middle, place, xerr=whiskers, fmt="none", ecolor="#333333", elinewidth=0.8)
        for y, ratio in zip(place, ratios, strict=True):
            axes.annotate(
                f"{ratio['median']:.3g}x",
                (max(ratio["p80"], ratio["median"]), y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="#333333", linewidth=0.8)
    axes.margins(x=0.12, y=0.01)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(title="allocator", fontsize=7, title_fontsize=7)


def _save(names, by_regime, title: str, label: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    _bars(axes, names, by_regime)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _collect(rows: list[dict], name, ratio) -> tuple[list[str], dict]:
    by_regime: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_regime.setdefault(row["regime"], {})[name(row)] = ratio(row)
    return list(dict.fromkeys(name(row) for row in rows)), by_regime


def _speedup(document: dict, device: Path) -> Path:
    subject = next(iter(document["rows"][0]["times_subject"]))
    rows = [row for row in document["rows"] if row["role"] == "baseline"]
    names, by_regime = _collect(
        rows,
        lambda row: f"{_name(row)}\n{row['provider']}",
        lambda row: row["times_subject"][subject],
    )
    title = f"{document['op']}: time of each baseline over {subject} ({document['device']})"
    path = device / f"speedup_{document['op']}.png"
    return _save(names, by_regime, title, "times as long (log scale)", path)


def draw(device: Path) -> list[Path]:
    """All plots of a device; returns their paths."""
    found = report.documents(device)
    paths = [_speedup(document, device) for document in found]
    rows = [row for d in found for row in d["rows"] if row["role"] == "subject"]
    names, by_regime = _collect(
        rows,
        lambda row: f"{row['op']} {_name(row)} {row['provider'].removeprefix('mdkernels')}".strip(),
        lambda row: row["times_floor"],
    )
    title = f"Distance from the measured memory floor ({found[0]['device']})"
    label = "time over floor (log scale; 1 is the floor)"
    return [*paths, _save(names, by_regime, title, label, device / "floor.png")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("device", type=Path, metavar="DIR", help="bench/results/<device>")
    for drawn in draw(parser.parse_args().device):
        print(drawn)
