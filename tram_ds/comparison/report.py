"""A comparison as files: one self-contained HTML page, the tables for other programs, the figures;
and in MLflow."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from tram_ds.comparison import plots
from tram_ds.comparison.blocks import Block
from tram_ds.comparison.comparison import Section, blocks_of
from tram_ds.comparison.render import Format, render
from tram_ds.comparison.run import Run
from tram_ds.runtime.files import private_dir, write_whole
from tram_ds.runtime.redact import redact, redact_yaml
from tram_ds.tracking.address import sqlite_path
from tram_ds.tracking.server import find_experiment, new_client, prepare_environment

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "mlflow",
    "matplotlib",
)
LONGEST_SLUG = 100  # of the 255 bytes a file system gives to a name
FRONTIER = "frontier"  # what the names of its figure and tables begin with
KIND_TAG = "tram_ds.kind"  # tells a comparison's MLflow run from those of trainings


def write(sections: Sequence[Section], out: Path, command: str, notes: Sequence[str] = ()) -> Path:
    """report.html, tables.{csv,md,tex} and figures/*.png in `out`, which is created; the page's
    path is returned.

    command: what was typed. notes: what was left out of the comparison.
    """
    private_dir(out / "figures")
    blocks = blocks_of(sections)
    endings: dict[str, Format] = {"csv": "csv", "md": "markdown", "tex": "latex"}
    for ending, form in endings.items():
        write_whole(out / f"tables.{ending}", render(blocks, form))
    for slug, section in zip(_slugs(sections), sections, strict=True):
        for drawing in section.drawings:
            (out / "figures" / f"{slug}-{drawing.name}.png").write_bytes(plots.png(drawing.figure))
    write_whole(out / "report.html", page(sections, out, command, notes))
    return out / "report.html"


def page(sections: Sequence[Section], out: Path, command: str, notes: Sequence[str] = ()) -> str:
    """The HTML text; links to run folders are relative to `out`. It loads nothing and runs no
    script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tram_ds", "comparison"), autoescape=True, trim_blocks=True
    )
    environment.filters["breakable"] = _breakable
    shown = [
        {
            "id": slug,
            "title": section.layout.title,
            "terms": _terms(section),
            "parts": _parts(section, slug),
            "runs": [_run(run, out) for run in section.runs],
            "recipes": _recipes(section.runs),
            "samples": [(run.where, _hidden(run.samples)) for run in section.runs if run.samples],
        }
        for slug, section in zip(_slugs(sections), sections, strict=True)
    ]
    return environment.get_template("report.html.j2").render(
        sections=shown,
        notes=[redact(note) for note in notes],
        command=redact(command),
        versions=versions(),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _parts(section: Section, slug: str) -> list[tuple[list[dict[str, Any]], list[Block]]]:
    """Figures, then tables, of each part of a section: its scores; the frontier, where it was asked
    for; what is left."""
    figures: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for drawing in section.drawings:
        svg = Markup(plots.svg(drawing.figure, f"{slug} {drawing.alt}"))
        figures[drawing.name == FRONTIER].append({"alt": drawing.alt, "svg": svg})
    blocks: dict[bool, list[Block]] = {True: [], False: []}
    for block in section.blocks[1:]:
        blocks[block.name.startswith(FRONTIER)].append(block)
    asked, others = ((figures[which], blocks[which]) for which in (True, False))
    return [([], section.blocks[:1]), asked, others]


def _breakable(label: str) -> Markup:
    """The name of a row, for a narrow column: `adam (optimizer.lr=5e-05)` may be broken before `lr`
    and before the value, and not inside a word."""
    return Markup(re.sub(r"(?<=[=_])|(?<=\.)(?=[a-z])", "<wbr>", str(escape(label))))


def versions() -> dict[str, str]:
    """What made the report: the program, its commit where it is a checkout, Python and the packages
    that compute."""
    found = {"tram_ds": version("tram_ds"), "Python": platform.python_version()}
    root = Path(__file__).resolve().parents[2]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if (root / ".git").exists() and (
        said := subprocess.run(asked, capture_output=True, text=True)
    ).returncode == 0:
        found["commit"] = said.stdout.strip()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def log(
    sections: Sequence[Section], out: Path | None, experiment: str, uri: str, command: str
) -> str:
    """Logs tables, figures and, where `out` holds one, the report as a run of its own in MLflow;
    returns its id.

    Unlike training this waits for the server and raises what it says.
    """
    prepare_environment()
    if (database := sqlite_path(uri)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    client = new_client(uri)
    tags = {KIND_TAG: "comparison", "command": redact(command)}
    name = "compare " + ", ".join(section.layout.name for section in sections)
    run_id = client.create_run(
        find_experiment(client, experiment, database), tags=tags, run_name=name
    ).info.run_id
    # until all is there: whatever is raised on the way, the run does not stay RUNNING
    status = "FAILED"
    try:
        for slug, section in zip(_slugs(sections), sections, strict=True):
            for block in section.blocks:
                client.log_table(run_id, _columns(block), f"{slug}/{block.name}.json")
            for drawing in section.drawings:
                client.log_figure(run_id, drawing.figure, f"{slug}/{drawing.name}.png")
        client.log_text(run_id, render(blocks_of(sections), "markdown"), "tables.md")
        if out is not None:
            client.log_artifact(run_id, str(out / "report.html"))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id


def _columns(block: Block) -> dict[str, Any]:
    """The block as columns of text, as MLflow's table view takes it."""
    texts = {
        name: [cells[i].text for _, cells in block.rows] for i, name in enumerate(block.columns)
    }
    return {block.corner: [label for label, _ in block.rows], **texts}


def _terms(section: Section) -> dict[str, str]:
    """Column -> meaning of every column that is not a domain of the data."""
    return {
        name: meaning
        for block in section.blocks
        for name, meaning in block.meanings.items()
        if name not in section.layout.domains
    }


def _slugs(sections: Sequence[Section]) -> list[str]:
    """Of their files and places on the page. Where one is too long, empty or another's too, a
    checksum of the title follows."""
    plain = [
        section.layout.name
        if section.layout.name != "auto"
        else re.sub(r"[^a-z0-9_]+", "-", section.layout.title.lower()).strip("-")
        for section in sections
    ]
    return [
        slug
        if slug and len(slug) <= LONGEST_SLUG and plain.count(slug) == 1
        else f"{slug[:LONGEST_SLUG]}-{zlib.crc32(section.layout.title.encode()):08x}".lstrip("-")
        for slug, section in zip(plain, sections, strict=True)
    ]


def _run(run: Run, out: Path) -> dict[str, Any]:
    link = Path(os.path.relpath(run.folder, out)).as_posix() if run.folder else run.link
    facts = [run.tags[key] for key in ("engine", "git_commit") if key in run.tags]
    return {
        "name": run.where if run.folder else f"{run.where} ({run.run_id})",
        "link": redact(link or ""),
        "seed": run.seed,
        "facts": ", ".join(
            [*facts, f"{run.ranks} rank{'s' * (run.ranks > 1)}", f"{run.course.steps} steps"]
        ),
        "data": run.tags.get("data_digest", "")[:12],
        "command": run.command,
    }


def _hidden(samples: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The samples without secrets."""
    return [{key: redact(text) for key, text in sample.items()} for sample in samples]


def _recipes(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, YAML) of the first seed's recipe of every algorithm."""
    found: dict[str, str] = {}
    for run in runs:
        title = f"{run.recipe.get('name', '')}, {run.recipe['algorithm']['name']}"
        found.setdefault(title, redact_yaml(yaml.safe_dump(run.recipe, sort_keys=False)))
    return list(found.items())
