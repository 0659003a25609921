"""One results file per op, written again after every case: a run that is cut off goes on where it
stopped. A case is finished when it was measured with the same sources and the same torch; results
of an earlier state stay, with its description, until their case is measured again."""

from pathlib import Path

import results
import torch

from .device import Device


class Store:
    """The results of one op on one device."""

    def __init__(self, folder: Path, op: str, device: Device, suite: str, command: str):
        self.path = folder / device.name / f"{op}.json"
        self.environment = device.environment()
        self.run = f"{self.environment['sources']} torch {torch.__version__}"
        old = results.read(self.path) if self.path.exists() else None
        if old is not None and (old["suite"], old.get("cases")) == (suite, None):
            raise ValueError(f"{self.path}: not a results file of this kind of device")
        if old is None or old["suite"] != suite:
            old = {"environments": {}, "rows": [], "goals": [], "cases": []}
        self.document = old | {
            "format": results.FORMAT,
            "op": op,
            "device": device.name,
            "suite": suite,
            "command": command,
        }

    def finished(self, key: str) -> bool:
        return any(c["key"] == key and c["run"] == self.run for c in self.document["cases"])

    def add(self, case, measured: dict) -> None:
        """Replace what there is of `case` and write the file."""
        document = self.document
        identity = (case.kind, case.shape, case.dtype)
        for part in ("rows", "goals"):
            kept = [
                row
                for row in document[part]
                if (row["kind"], row["shape"], row["dtype"]) != identity
            ]
            new = [row | {"run": self.run} for row in measured[part]]
            document[part] = kept + new
        unmeasured = [{k: u[k] for k in results.UNMEASURED} for u in measured["unmeasured"]]
        entry = {"key": case.key, "run": self.run, "unmeasured": unmeasured}
        document["cases"] = [c for c in document["cases"] if c["key"] != case.key] + [entry]
        document["environments"][self.run] = self.environment
        used = {c["run"] for c in document["cases"]}
        document["environments"] = {r: e for r, e in document["environments"].items() if r in used}
        results.write(self.path, document)
