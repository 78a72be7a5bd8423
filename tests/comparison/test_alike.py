"""Like with like, and no column for two things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import made_runs
from tests.made_runs import S2ORC
from tram_ds.comparison import collect, comparison, runs
from tram_ds.comparison.runs import CompareError
from tram_ds.data.m2d2_names import ABBREVIATIONS, PAPER, short_names

HOME = {"home": 10.0, "far": 30.0}


def parts(folder: Path, name: str = "auto") -> list[tuple[str, int]]:
    found, _ = runs.from_folders([f"{folder}/*"])
    return [(layout.title, len(members)) for layout, members in collect.parts(found, name)]


def pair(
    folder: Path, scores: dict[str, float], metric: str = "perplexity", **task: object
) -> None:
    for algorithm in ("base", "sam", "asam", "tram_x"):
        made = made_runs.recipe(algorithm, 0, **task)
        made_runs.write(folder, made, scores, metric, initial=scores)


def test_names_are_injective_for_any_domains() -> None:
    assert short_names(ABBREVIATIONS)["math_l1"] == "math_l1"  # beside Mathematics_and_logic
    assert short_names(ABBREVIATIONS)["Art"] == "art"
    assert short_names(["math_l1", "Art"]) == {"math_l1": "math", "Art": "art"}
    assert short_names(["math_l1", "math"]) == {"math_l1": "math_l1", "math": "math"}
    for domains in (ABBREVIATIONS, [*ABBREVIATIONS, "math", "soc"], PAPER["wiki"].values()):
        assert len(set(short_names(domains).values())) == len(set(domains))


def test_all_22_domains_are_22_columns(tmp_path: Path) -> None:
    """Each domain's score is its place: the zero-shot average is of places 1 to 21."""
    domains = ["math_l1", *sorted(ABBREVIATIONS.keys() - {"math_l1"})]
    pair(tmp_path, {domain: float(place) for place, domain in enumerate(domains)})
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    ((layout, members),) = collect.parts(found, "auto")
    row = collect.gather(members, layout).values.iloc[0]
    assert len(layout.domains) == 22 and layout.train == "math_l1"
    assert row["zs_avg"] == sum(range(1, 22)) / 21 and row["math_l1"] == 0.0
    assert comparison.compare(found)  # and every block of it
    (only,) = comparison.compare(found, "m2d2_s2orc")  # asked for: the paper's eleven alone
    places = [domains.index(domain) for domain in S2ORC[1:]]
    average = dict(only.blocks[0].rows)["sam"][-1].value
    assert average == pytest.approx(sum(places) / 10) and only.blocks[0].columns[-1] == "zs_avg"


@pytest.mark.parametrize(
    "scores, metric, data",
    [
        ({"math_l1": 10.0, "Art": 20.0}, "perplexity", "machelreid/m2d2"),
        ({"math_l1": 10.0}, "perplexity", "machelreid/m2d2"),
        (dict.fromkeys(list(PAPER["wiki"].values())[:3], 9.0), "perplexity", "machelreid/m2d2"),
        (dict(zip(S2ORC[:7], range(7, 14), strict=True)), "perplexity", "machelreid/m2d2"),
        ({"en": 0.8, "sw": 0.6, "ur": 0.5}, "accuracy", "facebook/xnli"),
    ],
)
def test_some_of_the_papers_domains_are_compared(tmp_path: Path, scores, metric, data) -> None:
    pair(tmp_path, scores, metric, data=data)
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    for section in comparison.compare(found):
        assert {"scores", "summary"} <= {block.name for block in section.blocks}


def test_two_domains_that_would_be_one_column_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, {"math_l1": 1.0, "Art": 2.0, "art": 3.0})
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    with pytest.raises(CompareError, match="two of its domains would be one column"):
        comparison.compare(found, "m2d2_s2orc")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"task": {"seq_len": 128}}, "task.seq_len = 128"),
        ({"task": {"m2d2_ref": True}}, "task.m2d2_ref = true"),
        ({"model": {"path": "other"}}, "model.path = other"),
        ({"eval": {"select": "best"}}, "eval.select = best"),
    ],
)
def test_runs_scored_differently_are_tables_of_their_own(tmp_path: Path, change, said) -> None:
    made_runs.write(tmp_path, made_runs.recipe("base", 0), HOME)
    other = made_runs.recipe("sam", 0)
    for section, keys in change.items():
        other[section] = other.get(section, {}) | keys
    made_runs.write(tmp_path, other, HOME)
    titles = [title for title, _ in parts(tmp_path)]
    assert len(titles) == 2 and titles[1].endswith(f"; {said}")


def test_what_only_trains_differently_is_one_table(tmp_path: Path) -> None:
    made_runs.write(tmp_path, made_runs.recipe("base", 0), HOME)
    other = made_runs.recipe("sam", 0, max_train_tokens=5, seq_len=1024)  # 1024 is the default
    other["model"] |= {"dropout": 0.5}
    made_runs.write(tmp_path, other | {"engine": {"name": "zero"}}, HOME)
    assert [count for _, count in parts(tmp_path)] == [2]


def test_other_content_of_the_same_data_is_another_table(tmp_path: Path) -> None:
    for algorithm, digest in (("base", "a" * 64), ("sam", "b" * 64), ("asam", "a" * 64)):
        folder = made_runs.write(tmp_path, made_runs.recipe(algorithm, 0), HOME)
        tags = {"tags": {"data_digest": digest}}
        (folder / "tracking.json").write_text(json.dumps(tags))
    found = [(title[-12:], count) for title, count in parts(tmp_path)]
    assert found == [("a" * 12, 2), ("b" * 12, 1)]


def test_a_moving_average_is_a_row_beside_the_others(tmp_path: Path) -> None:
    """Its weights are other weights, scored in the same way: one table, a row of its own name."""
    for weights in ("last", "ema"):
        recipe = made_runs.recipe({"name": "mesa"}, 0) | {"eval": {"weights": weights}}
        made_runs.write(tmp_path, recipe, HOME)
    assert [count for _, count in parts(tmp_path)] == [2]
    (section,) = comparison.compare(runs.from_folders([f"{tmp_path}/*"])[0])
    rows = [row for row, _ in section.blocks[0].rows]
    assert rows == ["mesa (eval.weights=ema)", "mesa (eval.weights=last)"]
