"""Sharpness, CKA, loss landscape and Hessian of a run's exported weights, per domain:
analysis.json, figures and a table.

    tram analyze --recipe quickstart.yaml --what sharpness,cka
    torchrun --nproc_per_node 8 -m tram_ds analyze --recipe xnli_xlmr.yaml engine=fsdp2 \\
        sharpness.epsilon=1e-4 eval.batch=64
    tram analyze --recipe quickstart.yaml --what effect \\
        'effect.algorithms=[asam, {name: tram_x, sigma: 0.03}]'

`effect` is of a recipe, before its run: how far a step of each row is from the base optimizer's.

Exit codes: 0 done, 2 recipe, data or weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tram_ds.cli import shared


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    shared.recipe(parser)
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
    shared.local_rank(parser)
    shared.overrides(parser, "of the recipe, or sharpness, cka, ...")


def run(options: argparse.Namespace) -> int:
    """Analyses; rank 0 prints the table. The exit code."""
    from tram_ds.surface import analysis_report, analyze

    if options.what == "effect":
        analyze.before_a_run(options)
    else:
        analysis_report.show(*analyze.run(*analyze.request(options)))
    return 0
