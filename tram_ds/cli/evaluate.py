"""Scores exports, hub models and the pre-trained model on a recipe's domains: a table, and JSON
with --out.

    tram evaluate --recipe m2d2_s2orc_gpt2.yaml --model runs/m2d2_s2orc_gpt2-tram_prev-0 \\
        --out scores.json
    torchrun --nproc_per_node 8 -m tram_ds evaluate --recipe xnli_xlmr.yaml --model EXPORT \\
        --domains en,sw,ur
    torchrun --nproc_per_node 8 -m tram_ds evaluate --recipe llama7b_fsdp2.yaml --model EXPORT \\
        --sharded

Exit codes: 0 done, 2 recipe, data or model, 4 checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    shared.recipe(parser, ": the task and the pre-trained model")
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
        "--sharded",
        action="store_true",
        help="spread every model over the ranks (FSDP2): for one that does not fit a GPU",
    )
    parser.add_argument(
        "--domains", help="domains or languages to score, with commas; default: the recipe's"
    )
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny model, data that is on every machine"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file for all metrics; beside it, .rows.npz, those of rows"
    )
    shared.local_rank(parser)
    shared.overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the table on rank 0; returns the exit code."""
    from tram_ds.recipe import loading
    from tram_ds.runtime.files import keep_text, refuse_unwritable
    from tram_ds.runtime.jsonl import strict
    from tram_ds.runtime.paths import refuse_missing

    chosen = loading.load(options.recipe, options.overrides, smoke=options.smoke)
    for path in options.model:
        refuse_missing(path, "--model")
    # torch is imported only for a recipe that holds
    from tram_ds.evaluation import candidates
    from tram_ds.evaluation import models as evaluation
    from tram_ds.evaluation.row_scores import packed
    from tram_ds.evaluation.scores_table import table
    from tram_ds.runtime import ranks

    if options.out:
        refuse_unwritable(options.out, "--out")
        _refuse_foreign_rows(options.out)
    job = ranks.detect(options.local_rank)
    models = candidates.candidates(options.model, not options.no_pretrained)
    if options.interpolate is not None:
        models = candidates.interpolated(models, options.interpolate)
    domains = options.domains.split(",") if options.domains else None
    report, rows = evaluation.score_all(
        chosen, models, domains, options.split, job, options.sharded
    )
    if job.rank == 0:
        print(table(report))
        if not options.out:
            return terminal.reported()
        text = json.dumps(strict(report, []), indent=2) + "\n"
        return keep_text(options.out, text, "--out") or _keep_rows(options.out, packed(rows))
    return 0


def _refuse_foreign_rows(out: Path) -> None:
    """ValueError where the name that nobody wrote, the report's with .rows.npz, is a file that an
    earlier report did not leave."""
    from tram_ds.evaluation import row_scores
    from tram_ds.runtime.run_layout import rows_beside

    place = rows_beside(out)
    try:
        foreign = place.exists() and not row_scores.read(place)
    except ValueError:
        foreign = True
    if foreign:
        raise ValueError(
            f"--out {out}: {place} is no file of row scores, which would take its place: give "
            "another --out, or move that file"
        )


def _keep_rows(out: Path, content: bytes) -> int:
    """The scores of every row, beside the report; returns the exit code, 2 where they cannot be
    written."""
    from tram_ds.runtime.files import write_whole
    from tram_ds.runtime.run_layout import rows_beside

    place = rows_beside(out)
    try:
        write_whole(place, content)
        return 0
    except OSError as error:
        why = f"the scores of single rows cannot be written ({error}): the report is there"
        print(f"error: --out {out}: {place}: {why}", file=sys.stderr)
        return 2
