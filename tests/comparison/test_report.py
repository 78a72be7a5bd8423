"""The report: one self-contained page, looked at by a real browser, and the same in MLflow."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import made_runs
from tests.browser import at_three_widths, chromium
from tram_ds.cli import main as tram
from tram_ds.comparison import comparison, plots, report, runs
from tram_ds.comparison.collect import gather, parts
from tram_ds.comparison.layouts import paper_layout

CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
CHROMIUM += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
COMMAND = "python launch/compare.py runs/* --report out"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[comparison.Section], Path]:
    """3 algorithms x 2 seeds, over three domains, and their report."""
    folder = tmp_path_factory.mktemp("report")
    for i, algorithm in enumerate(("base", "asam", "tram_x")):
        for seed in (0, 1):
            scores = {
                "home": 10.0 - i + 0.2 * seed,
                "near": 20.0 - 2 * i + 0.1 * seed,
                "far": 40.0 + i - 0.3 * seed,
            }
            initial = {"home": 15.0, "near": 22.0, "far": 39.0}
            run = made_runs.write(
                folder / "runs",
                made_runs.recipe(algorithm, seed),
                scores,
                initial=initial,
                loss=2 - 0.1 * i,
            )
    sample = {"prompt": "Once <b>", "text": " more", "ended": "length"}
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"samples": [sample]}))
    found, _ = runs.from_folders([f"{folder}/runs/*"])
    sections = comparison.compare(found)
    report.write(sections, folder / "out", COMMAND, ["runs/other: not finished <results.json>"])
    return sections, folder / "out"


def test_the_page_holds_tables_figures_links_recipes_and_versions(
    made: tuple[list[comparison.Section], Path],
) -> None:
    sections, out = made
    page = (out / "report.html").read_text()
    assert page.count("<table") == len(sections[0].blocks) + 2  # and the runs and the versions
    assert page.count("<svg ") == len(sections[0].drawings) == 3
    assert COMMAND in page and "&lt;results.json&gt;" in page
    assert 'href="../runs/made-tram_x-1"' in page and (out / "../runs/made-tram_x-1").is_dir()
    assert re.search(
        r"torchrun --nproc_per_node 2 launch/train.py --recipe \S*made-tram_x-1/recipe.yaml", page
    )
    for name in ("tram_ds", "Python", "torch", "mlflow"):
        assert report.versions()[name] in page
    assert "algorithm:\n  name: asam" in page
    assert page.count("<summary>Samples: ") == 1 and "Once &lt;b&gt;</b> more ..." in page
    names = {"report.html", "tables.csv", "tables.md", "tables.tex", "figures"}
    assert {p.name for p in out.iterdir()} == names
    assert len(list((out / "figures").glob("*.png"))) == 3


def test_every_column_of_every_table_is_explained(
    made: tuple[list[comparison.Section], Path],
) -> None:
    for section in (*made[0], *comparison.paper_alone()):
        for block in section.blocks:
            assert [bool(block.meanings[name]) for name in block.columns].count(False) == 0
    page = (made[1] / "report.html").read_text()
    assert '<th scope="col" title="forward / backward passes of one step">passes</th>' in page
    assert "<dt>passes</dt><dd>forward / backward passes of one step</dd>" in page


def test_curves_show_the_spread_of_the_seeds(tmp_path: Path) -> None:
    """Losses 2 + 1/s and 3 + 1/s: their mean in the middle of the band."""
    for seed, loss in ((0, 2.0), (1, 3.0)):
        made_runs.write(tmp_path, made_runs.recipe("base", seed), {"home": 1.0}, loss=loss)
    ((layout, members),) = parts(runs.from_folders([f"{tmp_path}/*"])[0], "auto")
    drawn = plots.curves(gather(members, layout))
    assert drawn is not None
    (line,), (band,) = drawn.axes[0].lines, drawn.axes[0].collections
    assert line.get_label() == "adam (n = 2)"
    assert np.allclose(line.get_xydata(), [(4 * s, 2.5 + 1 / s) for s in range(1, 9)])
    corners = band.get_paths()[0].vertices
    assert {(4.0, 3.0), (4.0, 4.0)} <= {tuple(corner) for corner in np.asarray(corners).tolist()}


def test_the_page_is_well_formed_and_loads_nothing(
    made: tuple[list[comparison.Section], Path],
) -> None:
    class Checker(HTMLParser):
        stack: list[str]
        loads: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.loads += [
                f"{tag} {name}"
                for name, value in attrs
                if name in ("src", "srcset", "action") or tag in ("script", "link")
            ]
            if tag == "use":  # SVG's own: it may point into the page only
                assert all(
                    value.startswith("#")
                    for name, value in attrs
                    if name.endswith("href") and value
                )
            if tag not in ("meta", "br", "hr", "img", "wbr"):
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)
            self.stack.pop()

    checker = Checker()
    checker.stack, checker.loads = [], []
    checker.feed((made[1] / "report.html").read_text())
    assert checker.stack == [] and checker.loads == []


@pytest.mark.integration
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it_in_light_and_dark(
    made: tuple[list[comparison.Section], Path],
    tmp_path_factory: pytest.TempPathFactory,
    theme: str,
) -> None:
    browser, folder = chromium(), tmp_path_factory.mktemp(f"screenshot-{theme}")
    shot = folder / f"report-{theme}.png"
    scheme = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
    page = (made[1] / "report.html").resolve().as_uri()
    command = [
        browser,
        *CHROMIUM,
        f"--user-data-dir={folder / 'profile'}",
        scheme,
        "--window-size=1280,2600",
        f"--screenshot={shot}",
    ]
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr[-2000:]
    print(f"screenshot: {shot}", file=sys.stderr)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper = pixels[2, 2]
    assert (paper > 240).all() if theme == "light" else (paper < 40).all()
    differs = np.abs(pixels - paper).max(axis=2)
    ink = (differs > 120).mean(axis=1)  # share of strongly contrasting pixels, by line
    assert (ink > 0).mean() > 0.4, "most of the page's lines are blank"
    green = (pixels[..., 1] - pixels[..., [0, 2]].max(axis=2) > 25).sum()
    assert green > 500, "neither best cells nor TRAM's points are to be seen"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the paper's widest tables: S2ORC's 11 domains and XNLI's 15 languages."""
    folder = tmp_path_factory.mktemp("large")
    languages = paper_layout("xnli").domains
    for i, algorithm in enumerate(("base", "sam", "asam_trpo", "tram_prev", "tram_fisher")):
        for seed in (0, 1):
            scores = {domain: 20.0 + k - i + seed for k, domain in enumerate(made_runs.S2ORC)}
            made_runs.write(folder / "runs", made_runs.recipe(algorithm, seed), scores)
            pairs = made_runs.recipe(algorithm, seed, "entailment", data="facebook/xnli")
            accuracies = {d: 0.5 + 0.01 * (k + i + seed) for k, d in enumerate(languages)}
            made_runs.write(folder / "runs", pairs | {"name": "xnli"}, accuracies, "accuracy")
    found, _ = runs.from_folders([f"{folder}/runs/*"])
    return report.write(comparison.compare(found), folder / "out", COMMAND)


@pytest.mark.integration
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_and_nothing_is_loaded(
    large: Path, tmp_path_factory: pytest.TempPathFactory, theme: str
) -> None:
    """At three widths the page is as wide as the window, at 1280 so is every table; no errors, no
    request but for the file."""
    folder = tmp_path_factory.mktemp(f"widths-{theme}")
    asyncio.run(at_three_widths(large, folder, theme, "Tables 4 and 11", "To reproduce this page"))


@pytest.mark.integration
def test_mlflow_gets_tables_figures_and_the_page(
    made: tuple[list[comparison.Section], Path], tmp_path: Path
) -> None:
    sections, out = made
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run_id = report.log(sections, out, "made", uri, COMMAND)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags[report.KIND_TAG] == "comparison"
    assert run.data.tags["command"] == COMMAND
    slug = "made-perplexity-trained-on-home"
    logged = {file.path.removeprefix(f"{slug}/") for file in client.list_artifacts(run_id, slug)}
    assert logged == {f"{b.name}.json" for b in sections[0].blocks} | {
        f"{d.name}.png" for d in sections[0].drawings
    }
    assert {file.path for file in client.list_artifacts(run_id)} == {
        slug,
        "report.html",
        "tables.md",
    }
    scores = json.loads(
        Path(client.download_artifacts(run_id, f"{slug}/scores.json", str(tmp_path))).read_text()
    )
    assert [row[scores["columns"].index("method")] for row in scores["data"]] == [
        "pretrained",
        "adam",
        "asam",
        "tram_x",
    ]


def test_launch_compare_in_this_process(
    made: tuple[list[comparison.Section], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(made[1].parent / "runs" / "*")
    assert tram.main(["compare", folder, "--format", "markdown", "--only", "scores"]) == 0
    assert capsys.readouterr().out.startswith("### made, perplexity, trained on home")
    assert tram.main(["compare", folder, "--table", "xnli"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --table xnli: no run fits") and said.count("\n") == 1
    assert tram.main(["compare", folder, "--alpha", "5"]) == 2
    assert tram.main(["compare", "--paper", "--table", "m2d2_wiki", "--format", "csv"]) == 0
    assert "averages,tram_prev,recomputed,22.55" in capsys.readouterr().out.replace(
        "0000000000003", ""
    )


def test_tables_of_odd_names_have_files_of_their_own(tmp_path: Path) -> None:
    """Names that differ in what a file's name does not keep, or beyond its length."""
    names = ["c#", "c+", "é", "x" * 300, "x" * 299 + "y"]
    for name in names:
        recipe = made_runs.recipe("sam", 0) | {"name": name}
        run = made_runs.write(tmp_path, recipe | {"name": "made"}, {"home": 10.0, "far": 40.0})
        (run / "recipe.yaml").write_text(json.dumps(recipe))
    found, _ = runs.from_folders([str(tmp_path / "*")])
    report.write(comparison.compare(found), tmp_path / "out", COMMAND)
    pictures = list((tmp_path / "out" / "figures").glob("*-averages.png"))
    assert len(pictures) == len(names)
    shown = (tmp_path / "out" / "report.html").read_text()
    assert len(set(re.findall(r'<section id="([^"]+)"', shown))) == len(names)


def test_compare_asks_the_mlflow_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere/a.db")
    assert tram.main(["compare", "--experiment", "x"]) == 2
    assert f"sqlite:///{tmp_path}/elsewhere/a.db: there is no such database" in (
        capsys.readouterr().err
    )
    assert tram.main(["compare", "--experiment", "x", "--uri", f"sqlite:///{tmp_path}/b.db"]) == 2
    assert f"{tmp_path}/b.db: there is no such" in capsys.readouterr().err
