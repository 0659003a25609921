"""The report of `evaluate` for people: a table, and a plot of the mix-weight curve."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from .artifact_writer import sync_path


def format_table(report: dict[str, Any]) -> str:
    """The report as text, one model a line."""
    interval = report["interval"]
    percent = f"{100 * interval['level']:g} %"
    lines = [f"{report['rows']:,} tokens of {report['corpus']}"]
    rows = [("base", report["base"])]
    rows += [(f"memory {i}", part) for i, part in enumerate(report["memories"], 1)]
    if len(rows) == 2:
        rows[1] = ("memory", rows[1][1])
    if "mixture" in report:
        rows.append(("mixture", report["mixture"]))
    ranges = ["[{:.2f}, {:.2f}]".format(*part["perplexity_interval"]) for _, part in rows]
    width = max(len(percent), *map(len, ranges)) + 2
    lines.append(f"{'':10}{'perplexity':>12}{percent:>{width}}{'nats/token':>12}{'bits/byte':>11}")
    lines += [
        f"{name:10}{part['perplexity']:12.2f}{found:>{width}}{part['nats_per_token']:12.4f}"
        f"{part['bits_per_byte']:11.4f}"
        for (name, part), found in zip(rows, ranges, strict=True)
    ]
    lines += [
        f"{name}: probability 0 for {part['zero_probability_tokens']:,} of these tokens, so its "
        "perplexity is infinite"
        for name, part in rows
        if part["zero_probability_tokens"]
    ]
    if "mixture" in report:
        mixture = report["mixture"]
        low, high = mixture["gain_interval"]
        weights = ", ".join(f"{weight:.3f}" for weight in mixture["mix_weight"])
        how = "given" if mixture["fitted_on"] is None else f"fitted on {mixture['fitted_on']}"
        lines.append(f"mix weight {weights} ({how})")
        gain = f"{mixture['gain_nats']:.4f} nats/token, {percent} [{low:.4f}, {high:.4f}]"
        lines.append(f"gain over the base {gain}")
    units, size = f"{interval['units']:,} {interval['unit']}s", interval["tokens_per_unit"]
    lines.append(f"intervals: bootstrap of {units}, {size:,.0f} tokens each on average")
    return "\n".join(lines)


def plot_path(out: Path, report_has_mixture: bool) -> Path | None:
    """Where the plot beside `out` goes; None without a mixture or without matplotlib."""
    if not report_has_mixture or importlib.util.find_spec("matplotlib") is None:
        return None
    return out.with_name(out.stem + "-curve.png")


def write_plot(report: dict[str, Any], path: Path) -> None:
    """NLL against the total mix weight, on test and, where it was fitted, on valid."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    mixture = report["mixture"]
    base, color = report["base"]["nats_per_token"], "#2a8c55"
    figure = plt.figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*mixture["curve"], strict=True), color=color, label="test")
    if "valid_curve" in mixture:
        axes.plot(*zip(*mixture["valid_curve"], strict=True), color=color, ls=":", label="valid")
    axes.axhline(base, color="#8c8c8c", lw=1, ls="--", label="base alone, test")
    nats = mixture["nats_per_token"]
    low, high = (math.log(end) for end in mixture["perplexity_interval"])
    if math.isfinite(nats):
        axes.errorbar(
            [sum(mixture["mix_weight"])],
            [nats],
            [[max(0.0, nats - low)], [max(0.0, high - nats)]],
            fmt="o",
            color=color,
            capsize=3,
            label="given weight" if mixture["fitted_on"] is None else "weight fitted on valid",
        )
    several = len(mixture["mix_weight"]) > 1
    axes.set_xlabel("weight of the memories together" if several else "mix weight of the memory")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    plt.close(figure)
    sync_path(partial)
    partial.replace(path)
