"""Checks, in a minute and before queueing, what would end a run: data, folders, disk, tracking,
ranks, memory, one step. On the login node, then on the nodes, started as train.py is:

    python launch/doctor.py --recipe m2d2_gpt2xl.yaml --slurm a100_one_node.yaml
    srun ... launch/doctor.py --recipe m2d2_gpt2xl.yaml

Exit codes: 0 all ok, 2 a problem.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.jobs import slurm_config
from tram_ds.recipe.recipe import load
from tram_ds.runtime import terminal


def main(arguments: list[str] | None = None) -> int:
    """Prints a line per check."""
    terminal.guard()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="a file, or a name in recipes/")
    parser.add_argument(
        "--slurm", help="a file, or a name in configs/slurm/: check the job SLURM would get, too"
    )
    parser.add_argument("--no-smoke", action="store_true", help="leave out the one-step run")
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    try:
        ours = [
            text.removeprefix("slurm.") for text in options.overrides if text.startswith("slurm.")
        ]
        theirs = [text for text in options.overrides if not text.startswith("slurm.")]
        recipe = load(options.recipe, theirs)
        config = slurm_config.load(options.slurm, ours) if options.slurm else None
        from tram_ds.jobs import doctor  # torch is imported only for a recipe that can be read
        from tram_ds.runtime import ranks as distributed

        context = doctor.Context(
            recipe,
            distributed.detect(options.local_rank),
            config,
            ["--recipe", options.recipe, *theirs],
        )
    except ValueError as error:
        if rank == "0":
            print("\n".join(f"problem  recipe         {line}" for line in str(error).splitlines()))
        return 2
    if rank == "0":
        print(f"ok       recipe         {options.recipe}: {recipe.name}", flush=True)
    return 0 if doctor.examine(context, ("smoke",) if options.no_smoke else ()) else 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the process group's threads may abort a slow exit
