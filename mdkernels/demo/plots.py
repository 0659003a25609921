"""The demo's figures: quality.png and time.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import FASTEST_FIRST, ROWS, Row, stage_table

HOW_TO_INSTALL = "no plots: matplotlib is not installed; `pip install matplotlib` and run again"

COLORS = {"base": "#8c8c8c", "knn": "#d9822b", "memory-ce": "#4878a8", "memory": "#2a8c55"}
LABELS = {"knn": "kNN-LM", "memory-ce": "CE-only memory", "memory": "Memory Decoder"}
_LIGHT = "#a9c3da"


def write_plots(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the figures into `out`; [] where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "figure.dpi": 150,
    }
    paths = []
    with plt.rc_context(style):
        for name, draw, size in (
            ("quality.png", _quality, (13, 4.2)),
            ("time.png", _time, (13, 4.6)),
        ):
            figure = plt.figure(figsize=size, layout="constrained")
            draw(figure, results)
            figure.savefig(out / name)
            plt.close(figure)
            paths.append(out / name)
    return paths


def _quality(figure, results: dict[str, Any]) -> None:
    bars, epochs, weights = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    _perplexities(bars, results)
    _curves(epochs, results)
    _weights(weights, results)


def _perplexities(axes, results: dict[str, Any]) -> None:
    rows = list(reversed(ROWS))
    values = [_mixture(results, row)["perplexity"] for row in rows]
    drawn = axes.barh([row.short for row in rows], values, color=[_color(row) for row in rows])
    axes.bar_label(drawn, [f"{value:.0f}" for value in values], padding=3)
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_xlabel("perplexity on held-out torch docstrings (lower is better)")
    axes.set_title("Test perplexity")
    axes.tick_params(axis="y", length=0)


def _curves(axes, results: dict[str, Any]) -> None:
    per_epoch = results["config"]["recipe"]["epochs"] / results["config"]["memory_steps"]
    for name in ("memory-ce", "memory"):
        curve = results["curves"][name]
        x = [point["step"] * per_epoch for point in curve]
        y = [point["valid_mixture_nats"] for point in curve]
        axes.plot(x, y, "o-", color=COLORS[name], label=LABELS[name])
        best = min(range(len(y)), key=y.__getitem__)
        axes.plot(x[best], y[best], "o", ms=11, mfc="none", mec=COLORS[name])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epochs of the memory (circle: best)")
    axes.set_ylabel("mixture loss on valid (nats per token)")
    axes.set_title("While the memory trains")
    axes.legend(frameon=False)


def _weights(axes, results: dict[str, Any]) -> None:
    for name in ("knn", "memory-ce", "memory"):
        mixture = results["rows"][name]["mixture"]
        # kNN alone gives some tokens no probability, so its curve ends before w = 1.
        points = [(w, nats) for w, nats in mixture["curve"] if nats is not None]
        axes.plot(*zip(*points, strict=True), color=COLORS[name], label=LABELS[name])
        axes.plot(mixture["mix_weight"], mixture["nats"], "o", color=COLORS[name])
    base = results["rows"]["base"]["alone"]["nats"]
    best = results["rows"]["memory"]["mixture"]["nats"]
    axes.set_ylim(best - 0.1 * (base - best), base + 0.6 * (base - best))  # room for the legend
    axes.axhline(base, color=COLORS["base"], lw=1, ls="--")
    axes.annotate("base alone", (0.3, base), (0, 3), textcoords="offset points", color="#555555")
    axes.set_xlabel("mix weight w (dot: fitted on valid)")
    axes.set_ylabel("loss on test (nats per token)")
    axes.set_title("Mixing it with the base")
    axes.legend(frameon=False, loc="upper left")


def _time(figure, results: dict[str, Any]) -> None:
    stages, losses = figure.subplots(1, 2, width_ratios=[1.25, 1])
    table = list(reversed(stage_table(results)))
    drawn = stages.barh([name for name, _, _ in table], [s for _, s, _ in table], color=_LIGHT)
    stages.bar_label(drawn, [f"{seconds:.1f}" for _, seconds, _ in table], padding=3)
    total = sum(seconds for _, seconds, _ in table)
    stages.set_xlim(0, max(seconds for _, seconds, _ in table) * 1.12)
    stages.set_xlabel("seconds")
    stages.set_title(f"Time per stage ({total:.0f} s in all)")
    stages.tick_params(axis="y", length=0)

    found = results["losses"]
    names = list(reversed(FASTEST_FIRST))
    medians = [found["milliseconds"][name] for name in names]
    spread = [
        [m - found["quartiles"][n][0] for n, m in zip(names, medians, strict=True)],
        [found["quartiles"][n][1] - m for n, m in zip(names, medians, strict=True)],
    ]
    colors = [COLORS["memory"] if name == "fused in place" else COLORS["base"] for name in names]
    drawn = losses.barh(names, medians, xerr=spread, color=colors, ecolor="#444444")
    fused = found["milliseconds"]["fused in place"]
    labels = [f"{m:.2g} ms" + (f" ({m / fused:.0f}x)" if m != fused else "") for m in medians]
    losses.bar_label(drawn, labels, padding=5)
    losses.set_xlim(0, max(found["quartiles"][name][1] for name in names) * 1.4)
    losses.set_xlabel("milliseconds, forward + backward (median, quartiles)")
    losses.set_title(
        f"The loss: {found['rows']} rows, {found['vocab_size']} tokens, {found['dtype']}"
    )
    losses.tick_params(axis="y", length=0)


def _mixture(results: dict[str, Any], row: Row) -> dict[str, Any]:
    scores = results["rows"][row.name]
    return scores["alone"] if row.name == "base" else scores["mixture"]


def _color(row: Row) -> str:
    return COLORS.get(row.name, _LIGHT)
