"""Like with like, and no column for two things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import made_runs
from tests.made_runs import S2ORC
from tram_ds.comparison import alike, collect, comparison, runs
from tram_ds.comparison.run import CompareError
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
    trains = {"max_train_tokens": 5, "packing": True, "streaming": {"buffer": 7}}
    other = made_runs.recipe("sam", 0, **trains, seq_len=1024)  # 1024 is the default
    other["model"] |= {"dropout": 0.5, "lora": {"r": 8}}
    made_runs.write(tmp_path, other | {"engine": {"name": "zero"}}, HOME)
    assert [count for _, count in parts(tmp_path)] == [2]


def test_other_content_of_the_same_data_is_another_table(tmp_path: Path) -> None:
    for algorithm, digest in (("base", "a" * 64), ("sam", "b" * 64), ("asam", "a" * 64)):
        folder = made_runs.write(tmp_path, made_runs.recipe(algorithm, 0), HOME)
        tags = {"tags": {"data_digest": digest}}
        (folder / "tracking.json").write_text(json.dumps(tags))
    found = [(title[-12:], count) for title, count in parts(tmp_path)]
    assert found == [("a" * 12, 2), ("b" * 12, 1)]


def read(folder: Path, **contents: dict[str, str]) -> Path:
    """What a run read, by split and domain, and the digest of all of it."""
    results = json.loads((folder / "results.json").read_text())
    results["trained"] = {"contents": contents}
    (folder / "results.json").write_text(json.dumps(results))
    tags = {"tags": {"data_digest": json.dumps(contents, sort_keys=True)}}
    (folder / "tracking.json").write_text(json.dumps(tags))
    return folder


def of(home: str, **far: str) -> dict[str, dict[str, str]]:
    return {"train": {"home": "t"}, "test": {"home": home, **far}}


@pytest.mark.parametrize(
    "contents, said",
    [
        # other choices of domains, the same content of what both have: one table
        ((of("h"), of("h", far="f")), [("", 2)]),
        # the same file name, another version of it, in a run of another choice
        (
            (of("h"), of("other", far="f"), of("h", near="n")),
            [("data digest = h of home (test)", 2), ("data digest = other of home (test)", 1)],
        ),
        # trained on another version, scored on the same
        (
            (of("h", far="f"), of("h") | {"train": {"home": "another"}}),
            [("data digest = t of home (train)", 1), ("data digest = another of home (train)", 1)],
        ),
        # the first did not read what differs between the others
        (
            (of("h"), of("h", far="f"), of("h", far="g")),
            [
                ("data digest = unset", 1),
                ("data digest = f of far (test)", 1),
                ("data digest = g of far (test)", 1),
            ],
        ),
    ],
)
def test_domains_are_compared_by_content_whatever_else_was_scored(
    tmp_path: Path, contents, said
) -> None:
    for algorithm, held in zip(("base", "sam", "asam"), contents, strict=False):
        scored = dict.fromkeys(held["test"], 10.0)
        made = made_runs.recipe(algorithm, 0, eval=sorted(held["test"]))
        read(made_runs.write(tmp_path, made, scored), **held)
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    groups = alike.alike(found, False, "perplexity")
    assert {name: len(members) for name, members in groups} == dict(said)


def test_many_other_contents_are_one_digest_of_their_own(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(5)]
    for algorithm, last in (("base", "x"), ("sam", "y"), ("asam", "z")):
        held = {"test": {name: f"{name}{last if name != 'd0' else ''}" for name in names}}
        made = made_runs.recipe(algorithm, 0)
        read(made_runs.write(tmp_path, made, dict.fromkeys(names, 1.0)), **held)
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    groups = alike.alike(found, False, "perplexity")
    assert [len(members) for _, members in groups] == [1, 1, 1]
    assert all(name.endswith(" of d1 (test) d2 (test) d3 (test) and 1 more") for name, _ in groups)


def test_a_run_of_before_reads_what_a_later_one_of_the_same_digest_did(tmp_path: Path) -> None:
    """Its one digest says nothing between choices of domains; the run beside it does."""
    kept = read(made_runs.write(tmp_path, made_runs.recipe("base", 0), HOME), test={"home": "h"})
    older = read(made_runs.write(tmp_path, made_runs.recipe("sam", 0), HOME), test={"home": "h"})
    results = json.loads((older / "results.json").read_text())
    del results["trained"]
    (older / "results.json").write_text(json.dumps(results))
    other = made_runs.write(tmp_path, made_runs.recipe("asam", 0, eval=["home"]), {"home": 1.0})
    read(other, test={"home": "another"})
    found, _ = runs.from_folders([f"{kept}", f"{older}", f"{other}"])
    groups = alike.alike(found, False, "perplexity")
    assert {name: len(members) for name, members in groups} == {
        "data digest = h of home (test)": 2,
        "data digest = another of home (test)": 1,
    }


def test_a_moving_average_is_a_row_beside_the_others(tmp_path: Path) -> None:
    """Its weights are other weights, scored in the same way: one table, a row of its own name."""
    for weights in ("last", "ema"):
        recipe = made_runs.recipe({"name": "mesa"}, 0) | {"eval": {"weights": weights}}
        made_runs.write(tmp_path, recipe, HOME)
    assert [count for _, count in parts(tmp_path)] == [2]
    (section,) = comparison.compare(runs.from_folders([f"{tmp_path}/*"])[0])
    rows = [row for row, _ in section.blocks[0].rows]
    assert rows == ["mesa (eval.weights=ema)", "mesa (eval.weights=last)"]


@pytest.mark.parametrize(
    "written, resolved, told",
    [
        ((None, "auto"), (None, None), ("none", "auto")),  # a version without the key had none
        (("auto", "auto"), ("none", "block"), ("none", "block")),  # by each one's tokenizer
        (("auto", "block"), ("block", "block"), None),
    ],
)
def test_where_texts_begin_is_what_was_done(tmp_path: Path, written, resolved, told) -> None:
    for algorithm, key, done in zip(("base", "sam"), written, resolved, strict=True):
        made = made_runs.recipe(algorithm, 0, **({} if key is None else {"bos": key}))
        results = made_runs.write(tmp_path, made, HOME) / "results.json"
        said = {} if done is None else {"task": {"bos": done}}
        results.write_text(json.dumps(json.loads(results.read_text()) | said))
    ends = [title.rpartition("; ")[2] for title, _ in parts(tmp_path)]
    if told is None:
        assert len(ends) == 1
    else:
        assert ends == [f"task.bos = {where}" for where in told]


def test_a_domain_that_one_run_trained_on_is_not_in_the_others_average(tmp_path: Path) -> None:
    """Run on all eleven domains and run on the first: two tables, by themselves or asked for."""
    scores = dict(zip(S2ORC, range(10, 21), strict=True))
    made_runs.write(tmp_path, made_runs.recipe("base", 0), scores)
    every = made_runs.write(tmp_path, made_runs.recipe("sam", 0, train="all"), scores)
    results = json.loads((every / "results.json").read_text()) | {"train_domains": S2ORC}
    (every / "results.json").write_text(json.dumps(results))
    assert [count for _, count in parts(tmp_path)] == [1, 1]
    ((_, members),) = collect.parts(runs.from_folders([f"{tmp_path}/*"])[0], "m2d2_s2orc")
    assert [run.recipe["algorithm"]["name"] for run in members] == ["base"]


def test_analyses_of_other_settings_are_tables_of_their_own(tmp_path: Path) -> None:
    """sharpness.json has numbers alone; what they were measured with stands in analysis.json."""
    for algorithm, epsilon in (("base", 1e-5), ("sam", 1e-3), ("asam", 1e-5)):
        folder = made_runs.write(tmp_path, made_runs.recipe(algorithm, 0), HOME)
        (folder / "analysis").mkdir()
        (folder / "analysis" / "sharpness.json").write_text(json.dumps(HOME))
        measured = {d: {"sharpness": {"value": v, "epsilon": epsilon}} for d, v in HOME.items()}
        report = {"split": "test", "domains": measured}
        (folder / "analysis.json").write_text(json.dumps(report))
    told = {title.rpartition("; ")[2]: count for title, count in parts(tmp_path, "sharpness")}
    assert told == {"sharpness.epsilon = 1e-05": 2, "sharpness.epsilon = 0.001": 1}


def test_an_interpolation_scored_otherwise_is_left_out(tmp_path: Path) -> None:
    made = made_runs.recipe("base", 0, seq_len=1024)
    folder = made_runs.write(tmp_path, made, HOME)
    (folder / "analysis").mkdir()
    scores = {domain: {"perplexity": value} for domain, value in HOME.items()}
    entry = {"path": str(folder / "export"), "interpolation": 0.5, "scores": scores}
    for asked, kept in (({"seq_len": 128}, 0), ({"eval": ["far"]}, 1)):  # columns may be fewer
        report = {
            "split": "test",
            "models": [entry],
            "asked": {**made, "task": made["task"] | asked},
        }
        (folder / "analysis" / "interpolation.json").write_text(json.dumps(report))
        (run,), notes = runs.from_folders([str(folder)])
        assert len(run.interpolation) == kept
        said = "analysis/interpolation.json: scored with task.seq_len = 128 instead of 1024"
        assert (said in " ".join(notes)) == (not kept)
