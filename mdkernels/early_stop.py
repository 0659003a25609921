"""Which evaluated step was the best, and when to stop looking for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class BestStep:
    """Follows one number of the evaluations, smaller being better; NaN is never better."""

    monitor: str
    """Its key in the dict that an evaluation returns."""
    patience: int | None = None
    """Evaluations without improvement after which to stop. None: never."""
    step: int | None = None
    score: float = math.inf
    stale: int = 0
    """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def update(self, step: int, result: dict[str, Any] | None) -> bool:
        """Take in the evaluation of `step`; True if it is the best so far."""
        score = (result or {}).get(self.monitor)
        if not isinstance(score, (int, float)):
            known = ", ".join(result or {}) or "nothing"
            raise ValueError(
                f"monitor: the evaluation of step {step} gave {self.monitor} = {score!r}, expected "
                f"a number; it returned {known}"
            )
        if score < self.score:
            self.step, self.score, self.stale = step, float(score), 0
            return True
        self.stale += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, for `restore`."""
        score = None if self.step is None else self.score
        return {"step": self.step, "score": score, "stale": self.stale}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.stale = state["step"], state["stale"]
        self.score = math.inf if state["score"] is None else state["score"]
