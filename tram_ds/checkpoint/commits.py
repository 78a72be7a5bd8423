"""The commits of a run folder by their names: which step each is of, the newest first."""

from __future__ import annotations

import re
from pathlib import Path

from tram_ds.runtime.run_layout import RunFolder

# matched whole: neither step-X.tmp-ID nor step-X.superseded is a commit
_COMMIT = re.compile(r"step-(\d{8,})(\.old)?")


def folder(run_dir: Path | str) -> Path:
    """Where a run keeps its checkpoints."""
    return RunFolder(run_dir).checkpoints


def name(step: int) -> str:
    """The commit's folder name."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a commit's folder name says, None for any other name."""
    match = _COMMIT.fullmatch(path.name)
    return int(match[1]) if match else None


def candidates(run_dir: Path | str) -> list[Path]:
    """Committed checkpoints, the newest first; manifest.verify says whether one is whole."""
    where = folder(run_dir)
    found = (
        [p for p in where.iterdir() if step_of(p) is not None and p.is_dir()]
        if where.is_dir()
        else []
    )
    return sorted(found, key=lambda p: (step_of(p), not p.name.endswith(".old")), reverse=True)


def latest(run_dir: Path | str) -> Path | None:
    """The newest committed checkpoint, or None."""
    return next(iter(candidates(run_dir)), None)
