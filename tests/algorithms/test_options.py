"""An option is written once: recipe, documents, schema and wrap() have it from there, and refuse
alike."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tram_ds import wrap
from tram_ds.algorithms.bound import algorithm, bind
from tram_ds.algorithms.options import Noised, Region
from tram_ds.algorithms.table import ALGORITHMS, OPTIONS, AlgorithmSection, reads
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import RecipeError

ROOT = Path(__file__).resolve().parents[2]


def wrapped(name: Any, **options: Any) -> Any:
    model = nn.Linear(2, 2)
    return wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), name, **options)


def noise_of(row: Any) -> Any:
    return row.regions[0].reference.noise


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "typo": ("sam", {"accumulation": "mirco"}),
    "type": ("sam", {"rho": "big"}),
    "truth": ("trpo", {"lookahead": "perhaps"}),
    "bounds": ("tram_x", {"sigma": -1.0}),
    "zero": ("asam", {"rho": 0.0}),
    "upper bound": ("mesa", {"decay": 1.0}),
    "whole number": ("sam", {"perturb_every": 1.5}),
    "infinite": ("tram_x", {"radius_max": float("inf")}),
    "not read by the row": ("sam", {"radius_scale": 3.0}),
    "not read by a TRAM row": ("tram_prev", {"rho": 0.3}),
    "not read by base": ("base", {"rho": 0.3}),
    "not read by the distance": ("tram_x", {"mmd_kernel": "rbf"}),
    "not read by the filter": ("asam", {"samsung_eta": 0.1}),
    "unknown value": ("tram_x", {"distance": "nope"}),
    "unknown option": ("sam", {"rhoo": 0.1}),
    "unknown row": ("tram_pref", {}),
    "order": ("tram_x", {"distance": "renyi", "renyi_order": 1.0}),
    "swapped": ("tram_x", {"radius_min": 2.0, "radius_max": 1.0}),
    "disagreeing": ("tram_x", {"student_mode": "eval", "reference_mode": "paired"}),
    "two at once": ("sam", {"rho": "big", "accumulation": "mirco"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrap_refuses_with_the_line_of_a_recipe(case: str) -> None:
    name, options = WRONG[case]
    shown = {k: ".inf" if v == float("inf") else v for k, v in options.items()}
    words = ", ".join(f"{key}: {value}" for key, value in {"name": name, **shown}.items())
    with pytest.raises(RecipeError) as recipe:
        load("quickstart", [f"algorithm={{{words}}}"])
    lines = [line.removeprefix("command line: ") for line in str(recipe.value).splitlines()]
    for given in (lambda: wrapped(name, **options), lambda: wrapped({"name": name, **options})):
        with pytest.raises(ValueError) as refused:
            given()
        assert str(refused.value).splitlines() == lines
    assert all(line.startswith("algorithm.") for line in lines)
    assert len(lines) == (2 if case == "two at once" else 1)


def test_a_near_word_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'micro'"):
        wrapped("sam", accumulation="mirco")
    with pytest.raises(ValueError, match="did you mean 'rho'"):
        wrapped("sam", rhoo=0.1)
    with pytest.raises(ValueError, match="did you mean 'tram_prev'"):
        wrapped("tram_pref")
    with pytest.raises(ValueError, match=r"^algorithm.zzz = 0.1: unknown key 'zzz'.*it has name, "):
        wrapped("sam", zzz=0.1)


def test_an_algorithm_may_be_a_mapping() -> None:
    by_mapping = wrapped({"name": "tram_x", "sigma": 0.2}, noise="uniform").algorithm
    by_words = wrapped("tram_x", sigma=0.2, noise="uniform").algorithm
    assert by_mapping.of(Noised) == by_words.of(Noised) == Noised(sigma=0.2, noise="uniform")
    assert noise_of(by_mapping) == noise_of(by_words) != noise_of(algorithm("tram_x"))
    for wrong in (3, None, ["sam"], nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"^algorithm = .*expected a name"):
            wrapped(wrong)
    with pytest.raises(ValueError, match=r"^algorithm.name: is missing"):
        wrapped({"sigma": 0.2})
    with pytest.raises(ValueError, match=r"^algorithm.sigma = 0.3: is given twice"):
        wrapped({"name": "tram_x", "sigma": 0.2}, sigma=0.3)


def test_a_noise_site_may_be_a_module_where_it_is_read() -> None:
    site = nn.Sequential()  # empty, and so not true
    rows = algorithm("tram_x", noise_site=site), algorithm({"name": "r3f", "noise_site": site})
    for row in rows:
        assert row.of(Noised).noise_site is site
        assert noise_of(row).site is site
    with pytest.raises(ValueError, match=r"sam does not read algorithm.noise_site"):
        algorithm("sam", noise_site=site)
    section = AlgorithmSection(name="tram_x")
    assert noise_of(bind(section)).site == "embedding"
    assert noise_of(bind(section, "pixel_values")).site == "pixel_values"
    own = AlgorithmSection(name="tram_x", noise_site="embedding")
    assert noise_of(bind(own, "pixel_values")).site == "embedding"


def test_every_option_has_one_home_and_a_meaning() -> None:
    parts = {part for row in ALGORITHMS.values() for part in row}
    homes = {key: [p for p in parts if key in p.model_fields] for key in OPTIONS}
    assert {key: len(found) for key, found in homes.items()} == dict.fromkeys(OPTIONS, 1)
    assert all(field.description for field in OPTIONS.values())
    assert reads("trpo") == {*Region.model_fields, "weight", "penalty_start", "lookahead"}


def test_no_torch_is_needed_to_check_a_row() -> None:
    script = (
        "import sys, tram_ds.algorithms.table as table\n"
        "table.checked({'name': 'sam'})\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


FOUND = """
import sys
from pathlib import Path
import torch
import tram_ds
from tram_ds.recipe import docs
from tram_ds.recipe.loading import load

assert Path(tram_ds.__file__).is_relative_to(sys.argv[1])
recipe = load("quickstart", ["algorithm={name: asam_init, rho: 0.1, perturb_from: 3}"])
assert (recipe.algorithm.rho, recipe.algorithm.perturb_from) == (0.1, 3)
section = docs.schema()["$defs"]["AlgorithmSection"]["properties"]
assert "asam_init" in section["name"]["enum"]
assert (section["perturb_from"]["minimum"], section["perturb_from"]["default"]) == (0, 0)
(line,) = [x for x in docs.reference_markdown().splitlines() if x.startswith("| `perturb_from` |")]
assert "First step that climbs" in line and "asam_init" in line
assert "perturb_from" in docs.help_of("asam_init") and "perturb_from" not in docs.help_of("trpo")

def forward(model, x):
    logits = model(x)
    return logits.square().sum(), len(x), logits

def radii(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    stepper = tram_ds.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    return [float(stepper.step([torch.ones(2, 3)], forward).radius) for _ in range(3)]

assert radii(algorithm={"name": "asam_init", "rho": 0.25}) == [0.25, 0.25, 0.25]
assert radii(algorithm="asam_init", rho=0.25, perturb_from=1) == [0.0, 0.25, 0.25]
wrong = [("sam", "perturb_from", -1, "expected 0 or more")]
wrong += [("sam", "perturb_fron", 1, "did you mean 'perturb_from'")]
wrong += [("trpo", "perturb_from", 1, "does not read algorithm.perturb_from")]
for row, key, value, said in wrong:
    try:
        radii(algorithm=row, **{key: value})
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(key)
print("found")
"""


def test_the_example_of_contributing_does_what_it_says(tmp_path: Path) -> None:
    """Carried out on a copy: one line is an algorithm; a field and the line that uses it, an
    option."""
    for folder in ("tram_ds", "recipes", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    changes = re.findall(r"```diff\n(\S+)\n(.*?)```", page, re.DOTALL)
    added = 0
    for name, hunk in changes:
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} == {" ", "+"}
        before = "".join(line[1:] for line in lines if line[0] == " ")
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, f"{name} no longer has {before}"
        (tmp_path / name).write_text(text.replace(before, "".join(line[1:] for line in lines)))
        added += sum(line[0] == "+" for line in lines)
    assert (len(changes), added) == (3, 4)
    command = [sys.executable, "-c", FOUND, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "found\n", done.stderr
