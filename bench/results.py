"""The results files: one JSON per op and device, in long format, rewritten whole."""

import json
import os
from pathlib import Path

FORMAT = 1
OPS = (
    "sparse_kl",
    "token_logprobs",
    "linear_sparse_kl",
    "logit_mix",
    "mix_argmax",
    "mix_sample",
    "mix_verify",
    "knn_targets",
)
QUANTILES = {"median": float, "p20": float, "p80": float}
# A name that ends in "?" may be missing. `run` is a key of `environments`.
GPU = {"kind?": str, "run?": str}
ROW = {
    "op": str,
    "shape": dict,
    "dtype": str,
    "regime": str,
    "provider": str,
    "role": str,
    "ms": QUANTILES,
    "rounds": int,
    "calls_per_sample": int,
    "samples_discarded": int,
    "samples_contended": int,
    "times_subject": dict,
    "times_floor": QUANTILES,
    "floor": str,
    "bytes_moved": int,
    "gb_per_s": float,
    "peak_increment_bytes": (int, type(None)),
    "errors": dict,
    "notes": dict,
    **GPU,
    "output_bytes?": int,
    "launches?": (int, float, type(None)),
}
GOAL = {
    "op": str,
    "shape": dict,
    "dtype": str,
    "regime": str,
    "subject": str,
    "baseline": str,
    "relation": str,
    "factor": (int, float),
    "measured": QUANTILES,
    "met": bool,
    **GPU,
    "unit?": str,
    "goal?": str,
}
# What a finished case on a GPU could not measure, and why.
UNMEASURED = {"provider": str, "phase": str, "regime": str, "reason": str, "ours": bool}
CASE = {"key": str, "run": str, "unmeasured": [UNMEASURED]}
DOCUMENT = {
    "format": int,
    "op": str,
    "device": str,
    "suite": str,
    "command": str,
    "environments": dict,
    "rows": [ROW],
    "goals": [GOAL],
    "cases?": [CASE],
}


def check(value, schema=DOCUMENT, where: str = "results") -> None:
    """Raise ValueError at the first place where `value` is not of the schema."""
    if isinstance(schema, dict):
        needed = {key for key in schema if not key.endswith("?")}
        known = {key.rstrip("?"): inner for key, inner in schema.items()}
        if not isinstance(value, dict) or not needed <= value.keys() <= known.keys():
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: expected the keys {sorted(schema)}, got {found}")
        for key, inner in value.items():
            check(inner, known[key], f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {type(value).__name__}")
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    elif not isinstance(value, schema):
        raise ValueError(f"{where}: expected {schema}, got {value!r}")


def read(path: Path) -> dict:
    document = json.loads(path.read_text())
    check(document, where=path.name)
    if document["format"] != FORMAT:
        raise ValueError(f"{path.name}: format {document['format']}, expected {FORMAT}")
    return document


def write(path: Path, document: dict) -> None:
    """Check, then replace the file at once."""
    check(document, where=path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(rounded(document), indent=1) + "\n")
    partial.replace(path)


def rounded(value):
    """Five significant digits: more is noise in the diff of a results file."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def merge(old: dict | None, new: dict) -> dict:
    """`new`, plus what `old` has for regimes that were not run this time. Their rows keep their own
    environment; results of another suite are dropped."""
    if old is None or old["suite"] != new["suite"]:
        return new
    kept = [regime for regime in old["environments"] if regime not in new["environments"]]
    merged = dict(new)
    merged["environments"] = {r: old["environments"][r] for r in kept} | new["environments"]
    for part in ("rows", "goals"):
        merged[part] = [row for row in old[part] if row["regime"] in kept] + new[part]
    return merged
