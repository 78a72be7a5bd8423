"""The commit of the code that runs, for the record of a run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VARIABLE = "TRAM_DS_GIT_COMMIT"  # set by the job script: the snapshot a job runs from has no .git
DIRTY = "-dirty"


def git_commit(root: Path | None = None) -> str | None:
    """The commit of the checkout, with `-dirty` after it where tracked files differ from it; else
    what $VARIABLE says."""
    root = root or Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip() or None
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout it does not trust
    return os.environ.get(VARIABLE) or None
