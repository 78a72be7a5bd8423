"""Compares finished runs: the paper's tables with ours, statistics, cost, figures and a report.

    tram compare runs/xnli_xlmr-* --table xnli --baseline adam
    tram compare --experiment xnli --uri http://127.0.0.1:5000 --report out --log
    tram compare runs/* --frontier --report out  # off, on, or how many seeds would tell
    tram compare --table m2d2_s2orc --paper      # the paper's numbers, recomputed

Exit codes: 0 done, 2 nothing to compare or not as asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument(
        "runs", nargs="*", help="run folders or patterns; default: runs/*, or those of --experiment"
    )
    parser.add_argument(
        "--experiment",
        help="MLflow experiment: where runs come from if no folder is named, and --log goes",
    )
    parser.add_argument(
        "--sweep", help="a file of launch/sweep.py: its finished runs, and what is missing"
    )
    parser.add_argument(
        "--uri", help="MLflow; default: MLFLOW_TRACKING_URI, else mlflow.db in this folder"
    )
    parser.add_argument(
        "--table",
        default="auto",
        help="xnli, m2d2_s2orc, ...; auto: whatever domains the runs have",
    )
    parser.add_argument("--paper", action="store_true", help="the paper's tables alone")
    parser.add_argument(
        "--baseline", help="the row others are tested against; default: plain training"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.01, help="level of the tests; default: the paper's, 0.01"
    )
    parser.add_argument(
        "--frontier",
        action="store_true",
        help="residuals off the frontier of plain training, at equal steps and equal FLOPs",
    )
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument(
        "--only", help="blocks to print, with commas: scores, summary, significance, compute, ..."
    )
    parser.add_argument(
        "--format", default="terminal", choices=["terminal", "markdown", "latex", "csv"]
    )
    parser.add_argument(
        "--report", type=Path, help="folder for report.html, the tables and the figures"
    )
    parser.add_argument(
        "--log", action="store_true", help="log tables, figures and the report to MLflow"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the tables; returns the exit code."""
    # pandas and matplotlib are imported only when something is to be compared
    from tram_ds.comparison import main as compare

    print(compare.main(options, options.command), end="")
    return terminal.reported()
