"""What the demo found, as Markdown: the table, the verdict, the time, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ONLY_RUNS = "**The short recipe shows that every stage runs. Its figures mean nothing more.**"
FASTEST_FIRST = ("fused in place", "eager sparse", "official dense")


@dataclass(frozen=True)
class Row:
    """A line of the table: key in the results, name in the table, name in the plot."""

    name: str
    long: str
    short: str


ROWS = (
    Row("base", "base", "base"),
    Row("knn", "base + kNN-LM, searching at every token", "+ kNN-LM"),
    Row("memory-ce", "base + CE-only memory, at the end", "+ CE-only"),
    Row("memory-ce best", "base + CE-only memory, early-stopped", "+ CE-only,\nearly-stopped"),
    Row("memory", "**base + Memory Decoder memory**", "+ Memory Decoder"),
)


@dataclass(frozen=True)
class Check:
    """A threshold of the recipe and what was measured against it, in nats per test token."""

    name: str
    found: float
    least: float

    @property
    def passed(self) -> bool:
        return self.found > self.least

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        return f"{verdict}  {self.name}: {self.found:.3f} nats per token (more than {self.least:g})"


def checks(results: dict[str, Any]) -> list[Check]:
    """What the demo promises; all must pass."""
    recipe = results["config"]["recipe"]
    gain = results["rows"]["memory"]["mixture"]["gain_nats"]
    found = [Check("mixture better than the base", gain, recipe["min_gain"])]
    if recipe["min_gain_over_ce"] is not None:
        over = results["differences"]["memory-ce"]["nats"]
        name = "mixture better than with a CE-only memory of equal size and steps"
        found.append(Check(name, over, recipe["min_gain_over_ce"]))
    return found


def perplexity_table(results: dict[str, Any]) -> str:
    """The table that the demo prints."""
    lines = [
        "| | perplexity | nats/token | better than base by [95 %] | mix weight | memory alone |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ROWS:
        scores = results["rows"][row.name]
        alone = scores["alone"]["perplexity"]
        if "mixture" not in scores:
            lines.append(f"| {row.long} | {alone:.1f} | {scores['alone']['nats']:.3f} | | | |")
            continue
        mixture = scores["mixture"]
        low, high = mixture["gain_interval"]
        gain = f"{mixture['gain_nats']:.3f} [{low:.3f}, {high:.3f}]"
        cells = [f"{mixture['perplexity']:.1f}", f"{mixture['nats']:.3f}", gain]
        cells += [f"{mixture['mix_weight']:.2f}", "-" if alone is None else f"{alone:.1f}"]
        lines.append(f"| {row.long} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_lines(results: dict[str, Any]) -> str:
    names = {row.name: row.long for row in ROWS}
    lines = []
    for name, found in results["differences"].items():
        low, high = found["interval"]
        nats = f"{found['nats']:+.3f} nats per token [{low:+.3f}, {high:+.3f}]"
        lines.append(f"- against {names[name]}: {nats}")
    return "\n".join(lines)


_GROUPS = {
    "harvest, tokenizer, corpora": ("text", "tokenizer", "corpus-"),
    "train the base": ("base",),
    "datastore and index": ("datastore", "index"),
    "kNN targets": ("targets",),
    "train the CE-only memory": ("memory-ce",),
    "train the Memory Decoder memory": ("memory",),
    "score the base": ("scores-base",),
    "score kNN-LM": ("queries-", "scores-knn"),
    "score the mixture again in fp32": ("eval.json",),
    "compare losses, generate": ("losses", "generations"),
}


def stage_table(results: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """(name, seconds, reused) in order; memories include their scoring along the way."""
    table = []
    for name, parts in _GROUPS.items():
        found = [
            stage
            for key, stage in results["stages"].items()
            if any(key == part or (part.endswith("-") and key.startswith(part)) for part in parts)
        ]
        seconds = sum(stage["seconds"] for stage in found)
        table.append((name, seconds, all(stage["reused"] for stage in found)))
    return table


def markdown(results: dict[str, Any], plots: list[str], no_plots: str) -> str:
    """report.md. `plots` are file names beside it; `no_plots` is said where there are none."""
    parts = [
        "# Memory Decoder on the docstrings of this machine",
        _summary(results),
        "## Held-out domain text",
        perplexity_table(results),
        "The Memory Decoder mixture is better (+) or worse (-):",
        difference_lines(results),
        "\n".join(f"    {check}" for check in checks(results)),
        "\n".join(f"![{name}]({name})" for name in plots) if plots else no_plots,
        "## How to read it",
        _reading(results),
        "## Time",
        _time(results),
        "## The loss",
        _losses(results),
        "## Text",
        "[generations.md](generations.md): held-out docstrings continued by base and mixture.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(results: dict[str, Any]) -> str:
    config, rows = results["config"], results["corpora"]
    recipe, machine = config["recipe"], config["machine"]
    parts = [
        f"Recipe `{recipe['name']}` on {machine['name']}: {machine['threads']} threads, "
        f"{machine['device']}, {machine['dtype']}, torch {machine['torch']}.",
        f"- Base: a Llama of {recipe['layers']} layers, width {recipe['hidden_size']}, vocabulary "
        f"{recipe['vocab_size']}, trained for {recipe['base_steps']} steps on docstrings of the "
        f"standard library, numpy, sympy and networkx ({rows['general']:,} tokens).\n"
        f"- Memories: the same size, initialised from the base, {config['memory_steps']} steps "
        f"({recipe['epochs']} epochs) on {rows['domain']:,} tokens of torch docstrings; same seed, "
        "same batch order.\n"
        f"- Scored on {rows['test']:,} tokens of torch files that no model saw; mix weights fitted "
        f"on {rows['valid']:,} tokens of others.",
    ]
    if recipe["min_gain_over_ce"] is None:
        parts.append(ONLY_RUNS)
    return "\n\n".join(parts)


def _reading(results: dict[str, Any]) -> str:
    targets = results["targets"]
    best = min(results["curves"]["memory-ce"], key=lambda point: point["valid_mixture_nats"])
    ours = results["rows"]["memory"]["mixture"]["nats"]
    again = results["checked"]["mixture"]["nats_per_token"]
    return "\n".join(
        [
            "- The memory learns the distribution of a kNN search over the domain text, each "
            "position's own entry left out. When it is used, nothing is searched. kNN-LM is that "
            "search, done at every token of the same text.",
            "- Early-stopped: the evaluation with the lowest mixture loss on valid, step "
            f"{best['step']} of {results['config']['memory_steps']}, its learning rate not yet "
            "annealed.",
            "- Brackets: 95 % block bootstrap over the test text. They say nothing about other "
            "training seeds; there is one.",
            f"- Targets: {targets['nnz_mean']:.0f} tokens per row (1 % of rows have more than "
            f"{targets['nnz_p99']:.0f}), top probability {targets['top_prob']:.2f}, probability "
            f"of the right token {targets['own_token_prob']:.2f}, at temperature "
            f"{targets['knn_temperature']:.1f}: {targets['relative_temperature']:g} of the mean "
            "squared key distance.",
            f"- Scored again by `mdkernels evaluate` in fp32, the mixture has {again:.4f} nats per "
            f"token; the table says {ours:.4f}.",
            "- Not shown here: that a memory is cheap (it is as large as the base), that it helps "
            "a larger base, that it is better alone (it is trained to be mixed). Part of its gain "
            "over CE is the regularisation that any soft target brings.",
        ]
    )


def _time(results: dict[str, Any]) -> str:
    lines = ["| stage | seconds |", "| --- | ---: |"]
    for name, seconds, reused in stage_table(results):
        lines.append(f"| {name}{' (reused)' if reused else ''} | {seconds:.1f} |")
    run = results["run"]
    lines.append(f"| **this call, start to end** | **{run['seconds']:.1f}** |")
    note = (
        f"The call used {run['cpu_seconds']:.0f} s of CPU time; load average of the machine "
        f"{run['load'][0]:.1f} before and {run['load'][1]:.1f} after."
    )
    return "\n".join(lines) + "\n\n" + note


def _losses(results: dict[str, Any]) -> str:
    found = results["losses"]
    fused = found["milliseconds"]["fused in place"]
    lines = [
        "| loss, forward + backward | median ms | quartiles | |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in FASTEST_FIRST:
        median, (low, high) = found["milliseconds"][name], found["quartiles"][name]
        times = "" if name == "fused in place" else f"{median / fused:.1f}x"
        lines.append(f"| {name} | {median:.2f} | {low:.2f} - {high:.2f} | {times} |")
    note = (
        f"{found['rows']} rows of {found['vocab_size']} logits ({found['dtype']}), "
        f"{found['targets_per_row']:.0f} targets per row, {found['rounds']} interleaved rounds, "
        "huge pages for all three. Real vocabularies are 10 to 40 times larger: see `bench/`."
    )
    return "\n".join(lines) + "\n\n" + note


def generations_markdown(texts: list[dict[str, str]]) -> str:
    """generations.md. Fences are long because docstrings hold fences of their own."""
    fence = "`" * 6
    parts = ["# Held-out docstrings, continued", "Sampled at temperature 0.5, top-p 0.9."]
    for number, text in enumerate(texts, 1):
        parts.append(f"## {number}")
        for title, key in (
            ("Prompt", "prompt"),
            ("Base", "base"),
            ("Mixture", "mixture"),
            ("The real text", "truth"),
        ):
            parts.append(f"{title}:\n\n{fence}text\n{text[key]}\n{fence}")
    return "\n\n".join(parts) + "\n"
