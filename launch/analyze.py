"""Sharpness, CKA, loss landscape and Hessian of a run's exported weights, per domain:
analysis.json, figures and a table.

    python launch/analyze.py --recipe quickstart.yaml --what sharpness,cka
    torchrun --nproc_per_node 8 launch/analyze.py --recipe xnli_xlmr.yaml engine=fsdp2 \\
        sharpness.epsilon=1e-4 eval.batch=64
    python launch/analyze.py --recipe quickstart.yaml --what effect \\
        'effect.algorithms=[asam, {name: tram_x, sigma: 0.03}]'

`effect` is of a recipe, before its run: how far a step of each row is from the base optimizer's.

Exit codes: 0 done, 2 recipe, data or weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.runtime import exits, terminal


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="a file, or a name in recipes/")
    parser.add_argument(
        "--export", type=Path, help="a run folder or its export; default: the recipe's run folder"
    )
    parser.add_argument(
        "--what",
        default="sharpness,cka,landscape,hessian",
        help="with commas (default: all four), or effect",
    )
    parser.add_argument(
        "--sharpness", choices=["paper", "juneja"], help="short for sharpness.variant=..."
    )
    parser.add_argument(
        "--domains", help="domains or languages, with commas; default: the recipe's"
    )
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--rows", type=int, help="most rows of a domain; default: all")
    parser.add_argument(
        "--smoke", action="store_true", help="the recipe as its --smoke run was trained"
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="of the recipe, or sharpness, cka, ...",
    )
    return parser.parse_intermixed_args(given)


def main(given: list[str] | None = None) -> int:
    """Analyses; rank 0 prints the table. The exit code."""
    terminal.guard()
    options = arguments(given)
    try:
        from tram_ds.surface import analyze

        if options.what == "effect":
            analyze.before_a_run(options)
        else:
            analyze.show(*analyze.run(*analyze.request(options)))
    except (ValueError, exits.PeerLost) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, exits.PeerLost):
            print(f"error: {error}", file=sys.stderr)
        return exits.USAGE if isinstance(error, ValueError) else exits.PEER
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of DeepSpeed's and gloo's can abort the interpreter's own way out
