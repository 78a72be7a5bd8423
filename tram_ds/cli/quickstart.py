"""The main job in one command: pre-train a tiny GPT-2 on all domains but one, fine-tune it there
with TRAM on 2 ranks.

    tram quickstart
    tram quickstart algorithm=asam      # overrides of the fine-tuning recipe

Everything is in runs/, in two run folders. Started again it goes on where it was; `--overwrite`
starts afresh.
Exit codes: those of the run that fails, or 0.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what earlier quickstarts made in runs/ and start afresh",
    )
    shared.overrides(parser, "recipe keys to change in the fine-tuning")


def run(options: argparse.Namespace) -> int:
    """The exit code of the first run that fails, or 0."""
    if odd := [text for text in options.overrides if "=" not in text]:
        raise ValueError(f"{odd[0]!r} is no override: section.key=value, such as algorithm=asam")
    source = [text for text in options.overrides if text.startswith("task.data=")]
    trained = [text for text in options.overrides if text.startswith("task.train=")]
    held_out = [f"task.exclude=[{text.partition('=')[2]}]" for text in trained]
    runs = (("quickstart_pretrain.yaml", source + held_out), ("quickstart.yaml", options.overrides))
    for recipe, overrides in runs:  # both, before the first one trains for minutes
        _check(recipe, overrides, options.overwrite)
    flag = "--overwrite" if options.overwrite else "--resume"
    return next((code for run in runs if (code := _launch(run[0], flag, *run[1]))), 0)


def _check(recipe: str, overrides: list[str], overwrite: bool) -> None:
    """ValueError where a run of the recipe would be refused before it trains."""
    from tram_ds.recipe.loading import load
    from tram_ds.runtime.run_folder import refuse

    folder = load(recipe, overrides).resolved_run_dir()
    refuse(folder, resume=not overwrite, overwrite=overwrite)


def _launch(recipe: str, *words: str) -> int:
    """One training run on 2 ranks under the deepspeed launcher; its exit code."""
    from tram_ds.recipe.file import LAUNCH

    # of this environment, which need not be activated, and so not be on the PATH
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    script = str(LAUNCH / "train.py")
    command = [launcher, "--num_accelerators", "2", script, "--recipe", recipe, *words]
    print("$", shlex.join(command), flush=True)
    return terminal.Relay(command, {**os.environ, "OMP_NUM_THREADS": "1"}).wait()
