"""What is to be scored: names from the command line, made into models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tram_ds.runtime.paths import expanded, refuse_missing
from tram_ds.runtime.run_layout import MANIFEST, RunFolder


@dataclass(frozen=True)
class Candidate:
    """A model to score. path: an export; None is the recipe's own model. checkpoint: a folder of
    weights for that. interpolation: how far on the straight line from the recipe's own model to
    this one; None is this one."""

    name: str
    path: str | None = None
    checkpoint: Path | None = None
    interpolation: float | None = None

    @property
    def pretrained(self) -> bool:
        """Whether it is the recipe's own model, before any fine-tuning."""
        return self.path is None and self.checkpoint is None


def candidates(paths: Sequence[str], pretrained: bool) -> list[Candidate]:
    """The pre-trained model first, then each path: an export, a run folder (its export), a
    checkpoint or a hub id."""
    found = [Candidate("pre-trained")] if pretrained else []
    unique = len({Path(path).name for path in paths}) == len(paths)
    for given in paths:
        path = expanded(given, "--model")
        refuse_missing(given, "--model")
        folder = Path(path)
        name = folder.name if folder.is_dir() and unique else path
        if (folder / MANIFEST).is_file():
            found.append(Candidate(name, checkpoint=folder))
        else:
            export = RunFolder(folder).export
            found.append(Candidate(name, str(export) if export.is_dir() else path))
    return found


def interpolated(chosen: Sequence[Candidate], text: str) -> list[Candidate]:
    """Each candidate but the recipe's own at each of the points in `text`, numbers from 0 to 1 with
    commas: weights (1 - a) theta_0 + a theta (WiSE-FT, Wortsman et al. 2022). ValueError."""
    try:
        points = [float(word) for word in text.split(",")]
    except ValueError:
        points = [math.nan]
    if not all(0.0 <= a <= 1.0 for a in points):
        raise ValueError(
            f"--interpolate {text}: expected numbers from 0 (the pre-trained model) to 1 (the "
            "trained one), with commas"
        )
    if all(c.pretrained for c in chosen):
        raise ValueError("--interpolate: name the trained model with --model")
    return [
        one
        for c in chosen
        for one in (
            [c]
            if c.pretrained
            else [replace(c, name=f"{c.name} at {a:g}", interpolation=a) for a in points]
        )
    ]
