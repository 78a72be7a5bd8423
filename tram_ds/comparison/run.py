"""A finished run, as comparisons see it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tram_ds.comparison.course import Course
from tram_ds.comparison.interpolation import Scores
from tram_ds.comparison.row_files import Rows
from tram_ds.runtime.run_layout import RunFolder

ANALYSES = ("sharpness", "cka")  # files <run>/analysis/<name>.json: {domain: value}


class CompareError(ValueError):
    """There is nothing to compare, or not as asked; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One finished run. where: its folder or its MLflow name. folder, link: None for the other
    kind. order: later is higher. interpolation: scores at points from the pre-trained model, 0, to
    the trained one, 1. said: its warnings, and why it ended before its last step. settings: of each
    of analyses. resolved: keys of the recipe that data or model decided, as they were. contents:
    "DOMAIN (SPLIT)" -> digest of what was read there. rows: point, as of interpolation, 1 the run
    itself -> the scores of single rows, where they are kept.
    samples: `prompt`, and the `text` that followed it."""

    where: str
    recipe: dict[str, Any]
    scores: Scores
    initial: Scores
    train_domains: tuple[str, ...]
    course: Course = field(default_factory=Course)
    tags: dict[str, str] = field(default_factory=dict)
    order: float = 0.0
    run_id: str | None = None
    folder: str | None = None
    link: str | None = None
    analyses: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    resolved: dict[str, str] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    interpolation: dict[float, Scores] = field(default_factory=dict)
    rows: dict[float, Rows] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    samples: tuple[dict[str, str], ...] = ()

    @property
    def seed(self) -> int:
        return int(self.recipe["train"]["seed"])

    @property
    def ranks(self) -> int:
        return int(self.tags.get("world_size", 1))

    @property
    def on_gpu(self) -> bool:
        return self.tags.get("device") == "cuda"

    @property
    def train_rows(self) -> int | None:
        """Rows of an epoch; None of a run that did not say."""
        return int(self.tags["train_rows"]) if "train_rows" in self.tags else None

    @property
    def command(self) -> str:
        """What trains it again, from its resolved recipe."""
        ways = {
            "torchrun": f"torchrun --nproc_per_node {self.ranks}",
            "deepspeed": f"deepspeed --num_accelerators {self.ranks}",
            "srun": f"srun --ntasks {self.ranks} python",
        }
        # from MLflow: the artifact of that name
        recipe = shlex.quote(str(RunFolder(self.folder or "").recipe))
        return (
            f"{ways.get(self.tags.get('launcher', ''), 'python')} launch/train.py --recipe {recipe}"
        )

    @property
    def metric(self) -> str:
        return "accuracy" if "accuracy" in next(iter(self.scores.values())) else "perplexity"

    def domains(self, metric: str) -> list[str]:
        """What the run was scored, or analysed, on."""
        return list(self.analyses.get(metric, {}) if metric in ANALYSES else self.scores)

    def values(
        self, metric: str, column: Callable[[str], str] = str, scores: Scores | None = None
    ) -> dict[str, float]:
        """column of the domain -> the score, accuracies in percent; a missing or infinite number
        is NaN. CompareError where two domains would be one column."""
        if metric in ANALYSES:
            found = {d: float(v) for d, v in self.analyses.get(metric, {}).items()}
        else:
            factor = 100.0 if metric == "accuracy" else 1.0
            found = {
                d: math.nan if m.get(metric) is None else factor * float(m[metric])
                for d, m in (self.scores if scores is None else scores).items()
            }
        named = {
            column(domain): value if math.isfinite(value) else math.nan
            for domain, value in found.items()
        }
        if len(named) < len(found):
            raise CompareError(
                f"{self.where}: two of its domains would be one column of this table: "
                f"{', '.join(found)}; compare it without --table"
            )
        return named
