"""Finished runs, read from run folders or from MLflow."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tram_ds.comparison import interpolation, measured_with, row_files
from tram_ds.comparison.course import RECORDED, Course, course
from tram_ds.comparison.folders import run_folders
from tram_ds.comparison.run import ANALYSES, CompareError, Run
from tram_ds.runtime.jsonl import decode
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.runtime.wording import short
from tram_ds.tracking.points import GROUPED
from tram_ds.tracking.results import stopped_early


def from_folders(patterns: Sequence[str], split: str = "test") -> tuple[list[Run], list[str]]:
    """(runs, notes: what was left out and why, what a run said of itself) of folders or glob
    patterns. A folder that goes by two names, through a link, is one run. CompareError if there is
    no finished run."""
    runs, notes = [], []
    for folder in run_folders(patterns):
        if not folder.is_dir() or not RunFolder(folder).recipe.is_file():
            continue
        if not RunFolder(folder).results.is_file():
            notes.append(f"{folder}: not finished (no {RunFolder.results})")
            continue
        try:
            runs.append(_read_folder(folder, split))
            notes += [f"{folder}: {text}" for text in runs[-1].said]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            notes.append(f"{folder}: cannot be read ({type(error).__name__}: {error})")
    if not runs:
        raise CompareError(_nothing(f"no finished run matches {' '.join(patterns)}", notes))
    return runs, notes


def from_mlflow(experiment: str, uri: str, split: str = "test") -> tuple[list[Run], list[str]]:
    """(runs, notes: what was left out and why, what a run said of itself) of an experiment.
    CompareError if it has no finished run or does not exist."""
    from tram_ds.tracking.address import sqlite_path
    from tram_ds.tracking.server import new_client, prepare_environment
    from tram_ds.tracking.state import LEFT_TAG

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # nobody trains meanwhile
    prepare_environment()
    database = sqlite_path(uri)
    # MLflow's client would make an empty one, and then find no experiment in it
    if database is not None and not database.exists():
        raise CompareError(f"--uri {uri}: there is no such database")
    client = new_client(uri)
    runs, notes = [], []
    for run in _children(client, _experiment_id(client, experiment, uri)):
        if other := run.data.tags.get(LEFT_TAG):
            notes.append(
                f"{run.info.run_name} ({run.info.run_id}): its way was left for run {other}"
            )
            continue
        try:
            runs.append(_read_mlflow(client, run, uri, split))
            notes += [f"{run.info.run_name}: {text}" for text in runs[-1].said]
        except Exception as error:
            # whatever a server or an artifact store says: one run less, and it is reported
            notes.append(
                f"{run.info.run_name}: left out, {run.info.status} ({type(error).__name__}: "
                f"{error})"[:300]
            )
    if not runs:
        raise CompareError(_nothing(f"the experiment {experiment} has no finished run", notes))
    return runs, notes


def _experiment_id(client: Any, experiment: str, uri: str) -> str:
    """CompareError where MLflow does not answer, or has none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(experiment)
        names = [] if found else sorted(e.name for e in client.search_experiments())
    except MlflowException as error:
        why = redact(" ".join(str(error).split()))
        raise CompareError(
            f"--uri {redact(uri)}: MLflow does not answer: start it, correct the address, or name "
            f"run folders; it said: {short(why, 300)}"
        ) from None
    if found is None:
        raise CompareError(
            f"--experiment {experiment}: MLflow has none of that name; it has {', '.join(names)}"
        )
    return found.experiment_id


def _children(client: Any, experiment_id: str) -> Iterator[Any]:
    """Runs of ours that trained: no parent, and no other program's, which have no key."""
    from tram_ds.tracking.attach import KEY_TAG

    token = None
    while True:
        page = client.search_runs([experiment_id], page_token=token)
        yield from (run for run in page if KEY_TAG in run.data.tags)
        token = page.token
        if not token:
            return


def _nothing(what: str, notes: Sequence[str]) -> str:
    return "; ".join([what, *notes[:3], "train some with launch/train.py or launch/sweep.py"])


def _read_folder(folder: Path, split: str) -> Run:
    files = RunFolder(folder)
    results = json.loads(files.results.read_text(encoding="utf-8"))
    recipe = yaml.safe_load(files.recipe.read_text(encoding="utf-8"))
    how = Course()
    if files.metrics.exists():
        # a crash may leave half a line, and half a character: decode() has no record of such
        with files.metrics.open(encoding="utf-8", errors="replace") as lines:
            how = course(record for record in map(decode, lines) if record is not None)
    tags = (
        json.loads(files.tracking.read_text(encoding="utf-8")).get("tags", {})
        if files.tracking.exists()
        else {}
    )
    analyses = {name: files.analysis / f"{name}.json" for name in ANALYSES}
    between, between_rows, left_out = interpolation.read(files, split, recipe)
    rows, unread = row_files.read(files.rows, results["scores"])
    return _run(
        str(folder),
        recipe,
        results,
        split,
        course=how,
        tags=tags,
        order=files.results.stat().st_mtime,
        interpolation=between,
        # 1 is the run itself: its own file counts, not what a later evaluation has there
        rows=between_rows | {1.0: rows.get(split, {})},
        also_said=[*left_out, *unread],
        folder=str(folder),
        run_id=files.run_id.read_text(encoding="utf-8").strip() if files.run_id.exists() else None,
        analyses={
            n: json.loads(f.read_text(encoding="utf-8")) for n, f in analyses.items() if f.exists()
        },
        settings=measured_with.analyses(files),
    )


def _read_mlflow(client: Any, run: Any, uri: str, split: str) -> Run:
    run_id = run.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        there = [
            Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
            for name in (RunFolder.recipe, RunFolder.results)
        ]
    recipe, results = yaml.safe_load(there[0]), json.loads(there[1])
    records: list[dict[str, Any]] = []
    for key in RECORDED:
        if (name := GROUPED[key]) in run.data.metrics:
            history = client.get_metric_history(run_id, name)
            records += [{"step": point.step, key: point.value} for point in history]
    link = (
        f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
        if uri.startswith("http")
        else None
    )
    return _run(
        run.info.run_name,
        recipe,
        results,
        split,
        course=course(records),
        tags=run.data.tags,
        order=float(run.info.start_time),
        run_id=run_id,
        link=link,
    )


def _run(
    where: str,
    recipe: Any,
    results: Mapping[str, Any],
    split: str,
    also_said: Sequence[str] = (),
    **also: Any,
) -> Run:
    if split not in results["scores"]:
        raise CompareError(
            f"has no scores of --split {split}, only of {', '.join(results['scores'])}"
        )
    initial = (results.get("initial") or {}).get(split, {})
    return Run(
        where,
        recipe,
        results["scores"][split],
        initial,
        tuple(results["train_domains"]),
        samples=tuple(results.get("samples") or ()),
        said=tuple(
            filter(None, [*(results.get("warnings") or ()), stopped_early(results), *also_said])
        ),
        resolved=measured_with.resolved(results),
        contents=measured_with.contents(results),
        **also,
    )


def find(
    patterns: Sequence[str], experiment: str | None, uri: str, split: str
) -> tuple[list[Run], list[str]]:
    """Runs of the folders named; else of the experiment; else of runs/*."""
    if patterns or experiment is None:
        return from_folders(patterns or ["runs/*"], split)
    return from_mlflow(experiment, uri, split)
