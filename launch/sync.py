"""Upload a run folder to MLflow.

    python launch/sync.py RUN_DIR [--uri sqlite:///ABSOLUTE/mlflow.db | http://HOST:PORT]

For runs whose server was away while they trained. Running it again is harmless. Exit codes: 0
complete, 2 not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tram_ds.runtime import terminal
from tram_ds.tracking.tracker import sync


def main(arguments: list[str] | None = None) -> int:
    """Uploads and says what happened in one line."""
    terminal.guard()
    parser = argparse.ArgumentParser(description="Upload a run folder to MLflow.")
    parser.add_argument(
        "run_dir", type=Path, help="the run folder (it holds metrics.jsonl and tracking.json)"
    )
    parser.add_argument(
        "--uri", default=None, help="MLflow address; default: the one the run was started with"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # nobody trains meanwhile
    try:
        report = sync(options.run_dir, options.uri)
    except (ValueError, OSError) as error:
        print(f"sync: {error}", file=sys.stderr)
        return 2
    if not report.complete:
        print(
            f"sync: {options.run_dir} is not complete: {report.error or 'run it again'}",
            file=sys.stderr,
        )
        return 2
    refused = f", refused: {', '.join(report.rejected)}" if report.rejected else ""
    print(f"{options.run_dir}: run {report.run_id} complete, {report.sent} points sent{refused}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
