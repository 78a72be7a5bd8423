"""Scores exports, hub models and the pre-trained model on a recipe's domains: a table, and JSON
with --out.

    python launch/evaluate.py --recipe m2d2_s2orc_gpt2.yaml \\
        --model runs/m2d2_s2orc_gpt2-tram_prev-0 --out scores.json
    torchrun --nproc_per_node 8 launch/evaluate.py --recipe xnli_xlmr.yaml --model EXPORT \\
        --domains en,sw,ur

Exit codes: 0 done, 2 recipe, data or model, 4 checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.recipe import recipe
from tram_ds.runtime import exits, terminal
from tram_ds.runtime.files import keep_text, refuse_unwritable
from tram_ds.runtime.jsonl import strict


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        required=True,
        help="a file, or a name in recipes/: the task and the pre-trained model",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="an export, run folder, checkpoint or hub id; repeatable",
    )
    parser.add_argument(
        "--no-pretrained", action="store_true", help="leave out the row of the recipe's own model"
    )
    parser.add_argument(
        "--interpolate",
        metavar="0,0.25,0.5,0.75,1",
        help="score each --model at these points of the line from the recipe's own model to it",
    )
    parser.add_argument(
        "--domains", help="domains or languages to score, with commas; default: the recipe's"
    )
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny model, data that is on every machine"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all metrics")
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="recipe keys to change"
    )
    return parser.parse_intermixed_args(given)


def main(given: list[str] | None = None) -> int:
    """Prints the table on rank 0; returns the exit code."""
    terminal.guard()
    options = arguments(given)
    try:
        chosen = recipe.load(options.recipe, options.overrides, smoke=options.smoke)
        # torch is imported only for a recipe that holds
        from tram_ds.evaluation import models as evaluation
        from tram_ds.runtime import ranks as distributed

        if options.out:
            refuse_unwritable(options.out, "--out")
        job = distributed.detect(options.local_rank)
        models = evaluation.candidates(options.model, not options.no_pretrained)
        if options.interpolate is not None:
            models = evaluation.interpolated(models, options.interpolate)
        domains = options.domains.split(",") if options.domains else None
        report = evaluation.score_all(chosen, models, domains, options.split, job)
    except (ValueError, exits.CheckpointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return exits.USAGE if isinstance(error, ValueError) else exits.CHECKPOINT
    if job.rank == 0:
        print(evaluation.table(report))
        if not options.out:
            return terminal.reported()
        return keep_text(options.out, json.dumps(strict(report, []), indent=2) + "\n", "--out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
