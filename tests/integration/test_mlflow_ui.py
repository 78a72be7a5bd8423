"""MLflow's own pages, in a real browser, over runs of launch/train.py: what a team sees of a
sweep."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browsing, chromium
from tests.integration.test_mlflow_server import Server, client
from tests.integration.test_train import train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Clicks the plus sign of the first run, the parent; true once there is one.
EXPAND = """(() => {
  const plus = document.querySelector('.ag-row button[data-component-id*="runnamecellrenderer"]');
  if (plus) plus.click();
  return plus;
})()"""


@dataclass
class Site:
    """A server over two seeds of one recipe and algorithm."""

    address: str
    experiment: str
    runs: list[str]
    folder: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    chromium()
    folder = tmp_path_factory.mktemp("mlflow-ui")
    server = Server(folder)
    for seed in (0, 1):
        done = train(folder, f"train.seed={seed}", f"tracking.uri=sqlite:///{folder}/server.db")
        assert done.returncode == 0, done.stderr[-4000:]
    server.start()
    ids = [
        (folder / "runs" / f"tiny-tram_x-{seed}" / "run_id").read_text().strip() for seed in (0, 1)
    ]
    yield Site(server.uri, client(server.uri).get_run(ids[0]).info.experiment_id, ids, folder)
    server.stop()


def test_the_pages_show_the_sweep(site: Site, tmp_path: Path) -> None:
    """Parent and children in the list, both on the compare page with their final scores, the table
    and the curves."""
    asyncio.run(look(site, tmp_path))
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "compare.png",
        "curves.png",
        "overview.png",
        "runs.png",
        "system.png",
        "table.png",
    ]
    assert all((tmp_path / name).stat().st_size > 20_000 for name in pictures)


async def look(site: Site, folder: Path) -> None:
    """Opens every page, waits for what it must show, takes its picture."""
    experiment = f"{site.address}/#/experiments/{site.experiment}"
    run = f"{experiment}/runs/{site.runs[0]}"
    async with browsing(folder / "profile") as page:
        await page.open(f"{experiment}/runs")
        await page.shows("tiny-tram_x", "3 matching runs")
        await page.until(EXPAND)
        await page.shows("tiny-tram_x-0", "tiny-tram_x-1", "generated/animals")
        await page.screenshot(folder / "runs.png")
        await page.open(
            f"{site.address}/#/compare-runs?runs={json.dumps(site.runs)}&experiments={json.dumps([site.experiment])}"
        )
        await page.shows("Comparing 2 Runs", "tiny-tram_x-0", "tiny-tram_x-1")
        await page.shows(
            "final/test/zero_shot/perplexity",
            "final/test/colours/perplexity",
            "train.seed",
            "git_commit",
        )
        await page.until(
            "document.querySelector('.js-plotly-plot .parcoords, .js-plotly-plot svg')"
        )
        await page.screenshot(folder / "compare.png")
        await page.open(f"{run}/artifacts/results_table.json")
        await page.shows("View as table", "zero-shot", "colours", "average")
        await page.screenshot(folder / "table.png")
        await page.open(f"{run}/artifacts/curves.png")
        await page.until("[...document.images].some(image => image.naturalWidth > 600)")
        await page.screenshot(folder / "curves.png")
        await page.open(f"{run}/system-metrics")
        await page.shows("cpu_utilization_percentage", "system_memory_usage_percentage")
        await page.screenshot(folder / "system.png")
        await page.open(run)
        await page.shows("Finished", "generated/animals", "training", "tiny-tram_x")
        await page.screenshot(folder / "overview.png")
