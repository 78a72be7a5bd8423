"""The main job in one command: pre-train a tiny GPT-2 on all domains but one, fine-tune it there
with TRAM on 2 ranks.

    python launch/quickstart.py [section.key=value ...]      # overrides of the fine-tuning recipe

Everything is in runs/, in two run folders. Started again it goes on where it was; `--overwrite`
starts afresh.
Exit codes: those of the run that fails, or 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.runtime import terminal

ROOT = Path(__file__).resolve().parents[1]


def launch(recipe: str, flag: str, *overrides: str) -> None:
    """One training run on 2 ranks under the deepspeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    script = ROOT / "launch" / "train.py"
    command = [
        str(launcher),
        "--num_accelerators",
        "2",
        str(script),
        "--recipe",
        recipe,
        flag,
        *overrides,
    ]
    print("$", " ".join(command), flush=True)
    if code := terminal.Relay(command, {**os.environ, "OMP_NUM_THREADS": "1"}).wait():
        raise subprocess.CalledProcessError(code, command)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what earlier quickstarts made in runs/ and start afresh",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="recipe keys to change in the fine-tuning",
    )
    options = parser.parse_intermixed_args()
    if odd := [text for text in options.overrides if "=" not in text]:
        parser.error(f"{odd[0]!r} is no override: section.key=value, such as algorithm=asam")
    return options


def main() -> int:
    """The exit code of the first run that fails, or 0."""
    terminal.guard()
    options = arguments()
    flag = "--overwrite" if options.overwrite else "--resume"
    source = [text for text in options.overrides if text.startswith("task.data=")]
    held_out = [
        text.partition("=")[2] for text in options.overrides if text.startswith("task.train=")
    ]
    try:
        launch(
            "quickstart_pretrain.yaml",
            flag,
            *source,
            *(f"task.exclude=[{domain}]" for domain in held_out),
        )
        launch("quickstart.yaml", flag, *options.overrides)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
