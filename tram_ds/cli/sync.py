"""Uploads a run folder to MLflow, for runs whose server was away while they trained.

    tram sync RUN_DIR
    tram sync RUN_DIR --uri http://HOST:PORT        # or sqlite:///ABSOLUTE/mlflow.db

Running it again is harmless. Exit codes: 0 complete, 2 not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    parser.add_argument(
        "run_dir", type=Path, help="the run folder (it holds metrics.jsonl and tracking.json)"
    )
    parser.add_argument(
        "--uri", default=None, help="MLflow address; default: the one the run was started with"
    )


def run(options: argparse.Namespace) -> int:
    """Uploads and says what happened in one line."""
    from tram_ds.runtime.paths import expanded_uri
    from tram_ds.tracking.tracker import sync

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # nobody trains meanwhile
    try:
        report = sync(options.run_dir, options.uri and expanded_uri(options.uri, "--uri"))
    except (ValueError, OSError) as error:
        print(f"sync: {error}", file=sys.stderr)
        return 2
    if not report.complete:
        what = report.error or "run it again"
        print(f"sync: {options.run_dir} is not complete: {what}", file=sys.stderr)
        return 2
    refused = f", refused: {', '.join(report.rejected)}" if report.rejected else ""
    print(f"{options.run_dir}: run {report.run_id} complete, {report.sent} points sent{refused}")
    return 0
