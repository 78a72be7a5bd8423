"""The results of docs/evidence.md, made from result files that are committed beside it as runs end.

python -m tests.real.evidence keep     # in the folder of runs/: the files of finished runs
python -m tests.real.evidence          # the page and its picture, from the files that are kept
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.ranks import ROOT
from tram_ds.checkpoint import changes
from tram_ds.comparison import comparison, runs
from tram_ds.comparison.comparison import Section
from tram_ds.comparison.course import course
from tram_ds.comparison.plots import png
from tram_ds.comparison.render import render
from tram_ds.comparison.run import Run
from tram_ds.jobs import sweep
from tram_ds.jobs.sweep import Cell
from tram_ds.recipe.recipe import to_dict
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking.metrics_log import read as records_of

SWEEP = "frontier_e5"
PAGE = ROOT / "docs" / "evidence.md"
KEPT = ROOT / "docs" / "evidence" / SWEEP
INTERPOLATION = Path("analysis") / "interpolation.json"
TAGS = ("engine", "world_size", "launcher", "device", "train_rows", "git_commit", "data_digest")
# the run that decides whether the study is void, and its least English accuracy in percent
DECIDES, LEAST = "xnli_e5-base-0-lr=0.0001-steps=626", 50.0


def keep(cell: Cell, kept: Path) -> Path:
    """What a comparison reads of a finished run, in a folder of its name: no weights, no address,
    no path of this machine."""
    made, name = RunFolder(cell.run_dir), cell.run_dir.name
    to = RunFolder(kept / name)
    to.path.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(made.recipe.read_text(encoding="utf-8"))
    to.recipe.write_text(yaml.safe_dump(changes.kept(recipe), sort_keys=False), encoding="utf-8")
    results = json.loads(made.results.read_text(encoding="utf-8"))
    _write(to.results, results | {"samples": []})
    to.metrics.write_text(_thinned(list(records_of(made.path))), encoding="utf-8")
    if made.tracking.exists():
        tags = json.loads(made.tracking.read_text(encoding="utf-8")).get("tags", {})
        _write(to.tracking, {"tags": {key: tags[key] for key in TAGS if key in tags}})
    if (made.path / INTERPOLATION).exists():
        report = json.loads((made.path / INTERPOLATION).read_text(encoding="utf-8"))
        for model in report["models"]:
            model["path"] = f"runs/{name}" if name in Path(model["path"] or "").parts else None
        (to.path / INTERPOLATION).parent.mkdir(exist_ok=True)
        _write(to.path / INTERPOLATION, report)
    return to.path


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _thinned(records: Sequence[dict[str, Any]]) -> str:
    """Records of which course() makes what it makes of all of them."""
    whole = course(records)
    key = "validation_loss" if whole.kind == "validation" else "loss"
    count = len(whole.curve)
    each = {"seconds": whole.seconds / count, "tokens": whole.tokens / max(whole.steps, 1)}
    lines = [{"step": step, key: loss, **each} for step, loss in whole.curve]
    assert whole.curve[-1][0] == whole.steps, "the last step is no point of the curve"
    return "".join(json.dumps(line) + "\n" for line in lines)


def page(text: str, kept: Path, cells: Sequence[Cell]) -> tuple[str, Section | None]:
    """(the page's text with its two made parts as the kept files have them; what the picture is
    of). ValueError for a kept run that is not one of the study."""
    there = _registered(kept, cells)
    found, notes = runs.from_folders([str(kept / name) for name in there]) if there else ([], [])
    if len(found) < len(there):
        raise ValueError("; ".join(notes))
    sections = comparison.compare(found, frontier=True) if found else []
    text = _part(text, "state", _state(cells, there))
    text = _part(text, "results", "\n\n".join(_results(cells, found, sections)))
    return text, sections[0] if sections else None


def _registered(kept: Path, cells: Sequence[Cell]) -> list[str]:
    by_name = {cell.run_dir.name: cell for cell in cells}
    there = sorted(path.name for path in kept.glob("*") if path.is_dir())
    for name in there:
        if name not in by_name:
            raise ValueError(f"{kept / name}: is no run of {SWEEP}: take it away")
        if other := changes.differences(kept / name, to_dict(by_name[name].recipe)):
            raise ValueError(f"{kept / name}: is not the registered run: {'; '.join(other)}")
    return there


def _state(cells: Sequence[Cell], there: Sequence[str]) -> str:
    if not there:
        return (
            f"**No run yet.** E-XNLI is registered below; of its {len(cells)} runs none has its "
            "result here."
        )
    if len(there) < len(cells):
        return f"**Partial**: {len(there)} of the {len(cells)} runs of E-XNLI are there."
    return f"All {len(cells)} runs of E-XNLI are there."


def _results(cells: Sequence[Cell], found: Sequence[Run], sections: Sequence[Section]) -> list[str]:
    """Paragraphs of the second part."""
    if not found:
        return [f"No run yet: 0 of {len(cells)}."]
    parts = [_missing(cells, found), _void(found)]
    parts += [f"Said by {Path(run.where).name}: {text}." for run in found for text in run.said]
    parts.append(_table(found))
    parts += [f"![The frontier](evidence/{SWEEP}.png)"] if sections else []
    for section in sections:
        blocks = [
            replace(block, title=block.title.removeprefix(f"{section.layout.title}: "))
            for block in section.blocks
            if block.name.startswith(("frontier", "line"))
        ]
        parts.append(render(blocks, "markdown").replace("### ", "#### ").rstrip())
    return [part for part in parts if part]


def _missing(cells: Sequence[Cell], found: Sequence[Run]) -> str:
    there = {Path(run.where).name for run in found}
    seeds: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.run_dir.name not in there:
            seed = cell.recipe.train.seed
            seeds[re.sub(rf"-{seed}(?=-|$)", "", cell.run_dir.name, count=1)].append(str(seed))
    if not seeds:
        return "Nothing is missing."
    listed = [f"`{arm}` (seed {', '.join(of)})" for arm, of in seeds.items()]
    return f"Missing, {len(cells) - len(there)} of {len(cells)}: {', '.join(listed)}."


def _void(found: Sequence[Run]) -> str:
    """The registered condition."""
    run = next((run for run in found if Path(run.where).name == DECIDES), None)
    if run is None:
        return f"Whether the study is void is not known: `{DECIDES}` is missing."
    reached = run.values("accuracy")["en"]
    said = "not void" if reached >= LEAST else "**void**"
    return f"The study is {said}: `{DECIDES}` has {reached:.1f} % in English (least: {LEAST:g})."


def _table(found: Sequence[Run]) -> str:
    """Every run, with its time."""
    domains = list(found[0].scores)
    columns = ["run", *domains, "zero-shot average", "steps", "hours of training"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for run in found:
        name, scores = Path(run.where).name, run.values("accuracy")
        others = [scores[d] for d in domains if d not in run.train_domains]
        hours = run.course.seconds / 3600
        cells = [f"{scores[d]:.2f}" for d in domains] + [f"{sum(others) / len(others):.2f}"]
        cells += [str(run.course.steps), f"{hours:.2f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _part(text: str, name: str, made: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end)[1]


def digest(kept: Path) -> str:
    """Of all kept files."""
    found = hashlib.sha256()
    for path in sorted(p for p in kept.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(kept)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def draw(section: Section, kept: Path) -> None:
    """The picture, which says of which files it is."""
    (drawing,) = [d for d in section.drawings if d.name == "frontier"]
    picture = kept.with_suffix(".png")
    picture.write_bytes(png(drawing.figure))
    about = PngInfo()
    about.add_text("Description", digest(kept))
    Image.open(picture).save(picture, pnginfo=about)


def main(words: Sequence[str]) -> None:
    cells = sweep.cells(sweep.read(SWEEP))
    if list(words) == ["keep"]:
        for cell in cells:
            if cell.finished:
                print(f"kept: {keep(cell, KEPT)}")
        return
    if words:
        raise SystemExit(f"error: {' '.join(words)}: expected keep, or nothing")
    text, section = page(PAGE.read_text(encoding="utf-8"), KEPT, cells)
    PAGE.write_text(text, encoding="utf-8")
    if section is not None:
        draw(section, KEPT)


if __name__ == "__main__":
    main(sys.argv[1:])
