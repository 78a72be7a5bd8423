"""What a run is called in a table: its algorithm, and whatever else tells runs of that algorithm
apart but the seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tram_ds.comparison.layouts import Layout
from tram_ds.recipe.numbers import SAME_NUMBERS

if TYPE_CHECKING:
    from tram_ds.comparison.collect import Run

SHORT_DISTANCES = {"kl_forward": "kl"}
LONGEST = 48  # characters of what tells variants apart that fit into a row's name


def labels(runs: Sequence[Run], layout: Layout) -> tuple[list[str], list[str]]:
    """(one name per run, notes). As in the paper where it has one; `sam (rho=0.1)` where recipes of
    a name differ in rho.

    Where they differ in much, they are `sam (a)`, `sam (b)`, and the notes say in what.
    """
    names, notes = [_name(run.recipe, layout) for run in runs], []
    flat = [_flat(run.recipe) for run in runs]
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        # images: recipes of other data sets differ in their data too, and are columns of one row
        alike[name, "" if layout.train else ",".join(run.train_domains)].append(i)
    for members in alike.values():
        keys = sorted({key for i in members for key in flat[i]})
        differing = [k for k in keys if len({flat[i].get(k) for i in members}) > 1]
        told = {
            i: ", ".join(
                f"{k.removeprefix('algorithm.')}={flat[i].get(k, 'unset')}" for k in differing
            )
            for i in members
        }
        kinds = sorted(set(told.values()))
        for i in members:
            if len(differing) > 0:
                long = max(map(len, kinds)) > LONGEST
                names[i] += f" ({_letter(kinds.index(told[i])) if long else told[i]})"
                notes += [f"{names[i]}: {told[i]}"] if long else []
    return names, sorted(set(notes))


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number + 1)


def _name(recipe: Mapping[str, Any], layout: Layout) -> str:
    section = recipe["algorithm"]
    if section["name"] == "base":
        return recipe["optimizer"]["name"]
    distance = section.get("distance", "kl_forward")
    named = SHORT_DISTANCES.get(distance, distance)
    other = distance != "kl_forward" or layout.name == "distance"
    return f"{section['name']}_{named}" if other else section["name"]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON text, of the keys that change numbers. The name already tells the
    algorithm."""
    found: dict[str, str] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        if name in SAME_NUMBERS or name in ("algorithm.name", "algorithm.distance"):
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value, default=str).strip('"')
    return found
