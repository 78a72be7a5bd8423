"""Trains one recipe, under deepspeed, torchrun, srun or plain python.

deepspeed --num_accelerators 2 launch/train.py --recipe quickstart.yaml algorithm=asam train.seed=3
torchrun --nproc_per_node 8 launch/train.py --recipe m2d2_gpt2xl.yaml engine=fsdp2
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.recipe.recipe import dump, load
from tram_ds.runtime import terminal
from tram_ds.runtime.exits import USAGE, code_of


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="a file, or a name in recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="recipe keys to change"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="the same code path with a tiny model, 3 steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start afresh in a folder that holds a run"
    )
    parser.add_argument(
        "--allow-change", action="store_true", help="resume although the recipe has changed"
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="resume from an older checkpoint if the newest is damaged",
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def main() -> int:
    """The exit code."""
    options = arguments()
    recipe = load(options.recipe, options.overrides, smoke=options.smoke)
    if options.dry_run:
        print(dump(recipe), end="")
        return terminal.reported()
    # torch is imported only when something is to be trained
    from tram_ds.training.run import Request, run

    keys = ("resume", "overwrite", "allow_change", "fallback", "local_rank")
    return run(recipe, Request(**{key: getattr(options, key) for key in keys}))


if __name__ == "__main__":
    terminal.guard()
    try:
        code = main()
    except Exception as error:
        expected = USAGE if isinstance(error, ValueError) else code_of(error)
        if expected is None:
            traceback.print_exc()
        elif os.environ.get("RANK", "0") == "0" or expected != USAGE:
            # every rank finds the same mistake: say it once
            print(f"error: {error}", file=sys.stderr)
        code = 1 if expected is None else expected
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written and closed; threads of DeepSpeed's and gloo's can abort the interpreter's own
    # way out
    os._exit(code)
