"""Early stopping: a run whose validation no longer gets better ends before its last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tram_ds.evaluation.measured import better
from tram_ds.recipe.sections import EarlyStoppingSection


@dataclass
class EarlyStopping:
    """Counts the measurements of `key` since the best one. Every rank holds the same counts, made
    of the same numbers, and a checkpoint keeps them; without a section no run ends early."""

    section: EarlyStoppingSection | None
    key: str
    best: float | None = None
    best_step: int = 0
    since: int = 0  # measurements after the best one

    def note(self, step: int, value: float) -> None:
        """Takes the measurement after `step` steps. NaN and infinity are no improvement."""
        if self.section is None:
            return
        if better(self.key, value, self.best, self.section.min_delta):
            self.best, self.best_step, self.since = value, step, 0
        else:
            # NaN counts too: a run that diverges should end, not wait for a number
            self.since += 1

    @property
    def over(self) -> bool:
        """Whether the run ends here."""
        return self.section is not None and self.since >= self.section.patience

    @property
    def running_out(self) -> bool:
        """Whether the next measurement may be the last."""
        return self.section is not None and self.since + 1 >= self.section.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing where nothing is counted."""
        if self.section is None:
            return {}
        kept = {"key": self.key, "best": self.best, "best_step": self.best_step}
        return {"early_stopping": kept | {"since": self.since}}

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Goes on from state() as a checkpoint kept it; counts of another key, and none, leave
        this as it is."""
        found = manifest.get("early_stopping") or {}
        # counts of another key say nothing of this one
        if self.section is not None and found.get("key") == self.key:
            self.best, self.best_step = found["best"], found["best_step"]
            self.since = found["since"]

    def told(self, step: int, total: int) -> dict[str, Any] | None:
        """Of a run that ended after `step` of `total` steps, why; None of one that came to its last
        step."""
        if step >= total:
            return None
        best = f"the {self.best:g} of step {self.best_step}" if self.best is not None else "NaN"
        times = f"{self.since} measurement{'s' * (self.since != 1)}"
        why = f"{self.key} did not improve on {best} in {times}"
        return {"step": step, "of": total, "why": why}
