"""What only a GPU can show, in half an hour: parity, precision, memory, speed, overlap, resume, a
lost rank; ten lines of verdict, and a page.

    tram verify_gpu --out verified
    torchrun --nproc_per_node 8 -m tram_ds verify_gpu --out verified_8
    tram verify_gpu --out tried --small

Steps of at most eight minutes; the same command goes on where the last one ended, and measures
again only what failed. --small takes minutes on a CPU.

Exit codes: 0 every law that could be measured holds, 1 one is broken, 2 a wrong argument, 75 a
step's time was over: start it again.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

STEPS = "parity, gpt2, xl, resume, killed"


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument("--out", type=Path, required=True, help="folder for results and the page")
    parser.add_argument("--steps", default="", help=f"with commas, of {STEPS}; default: all")
    parser.add_argument(
        "--small", action="store_true", help="everything tiny, to try the kit itself"
    )


def run(options: argparse.Namespace) -> int:
    """The exit code. Of a launcher's ranks the first measures, in jobs of as many ranks; the others
    have nothing to do."""
    from tram_ds.runtime.launchers import place
    from tram_ds.verification.run import verify
    from tram_ds.verification.steps import Setting

    here = place(os.environ)
    if int(os.environ.get("LOCAL_WORLD_SIZE") or here.world_size) != here.world_size:
        raise ValueError(
            f"WORLD_SIZE={here.world_size} is of several machines: the kit measures one"
        )
    if here.rank:
        return 0
    chosen = [name for name in options.steps.split(",") if name]
    setting = Setting(here.world_size, options.small)
    return verify(options.out.absolute(), chosen, setting, shlex.join(options.command))
