"""Tables of run folders whose scores are known: means, spreads, marks, differences, summaries,
labels, formats."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path, PurePath
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from tests import made_runs
from tram_ds.comparison import collect, comparison, compute, course, paper, runs, tables, versus
from tram_ds.comparison.blocks import Block
from tram_ds.comparison.layouts import paper_layout
from tram_ds.comparison.render import render
from tram_ds.comparison.run import CompareError

HOME = {"home": 10.0, "near": 20.0, "far": 40.0}


def text(block: Block, row: str, column: str) -> str:
    return dict(block.rows)[row][block.columns.index(column)].text


def table(folder: Path, name: str = "auto") -> collect.Table:
    found, notes = runs.from_folders([f"{folder}/*"])
    assert not notes
    ((layout, members),) = collect.parts(found, name)
    return collect.gather(members, layout)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """base and tram_x with two seeds each: zero-shot averages 30 and 32, then 25 and 29."""
    for algorithm, shifts in (("base", (0.0, 2.0)), ("tram_x", (-5.0, -1.0))):
        for seed, shift in enumerate(shifts):
            scores = {domain: value + shift for domain, value in HOME.items()}
            made_runs.write(
                tmp_path, made_runs.recipe(algorithm, seed), scores, initial={**HOME, "home": 50.0}
            )
    return tmp_path


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """The same with three seeds that differ by 5 each: in logarithms by 0.22 or more, give or take
    0.07, but in `far` by 0.12."""
    for algorithm, shift in (("base", 0.0), ("tram_x", -5.0)):
        for seed in range(3):
            scores = {domain: value + shift + 2 * seed for domain, value in HOME.items()}
            made_runs.write(tmp_path, made_runs.recipe(algorithm, seed), scores)
    return tmp_path


def test_means_and_the_pretrained_row(known: Path) -> None:
    block = tables.scores(table(known))
    assert [label for label, _ in block.rows] == ["pretrained", "adam", "tram_x"]
    assert block.columns == ("home", "near", "far", "zs_avg")
    assert (
        text(block, "adam", "zs_avg") == "31.00 ± 1.41"
        and text(block, "tram_x", "zs_avg") == "27.00 ± 2.83"
    )
    assert text(block, "pretrained", "home") == "50.00"


def test_equal_scores_are_not_marked_and_ties_are_both_best(tmp_path: Path) -> None:
    for algorithm, far in (("base", 40.0), ("sam", 40.001), ("asam", 50.0)):
        for seed in (0, 1):
            made_runs.write(tmp_path, made_runs.recipe(algorithm, seed), {**HOME, "far": far})
    rows = dict(tables.scores(table(tmp_path)).rows)
    # equal as printed
    assert [rows[m][2].mark for m in ("adam", "sam", "asam")] == ["best", "best", "worst"]
    assert {rows[m][1].mark for m in rows} == {""}


def test_spreads_are_those_of_statistics(known: Path) -> None:
    std, interval = tables.spread(table(known))
    assert text(std, "adam", "zs_avg") == "1.41"
    logs = [math.log(30), math.log(32)]
    low, high = stats.t.interval(0.95, 1, loc=sum(logs) / 2, scale=stats.sem(logs))
    assert text(interval, "adam", "zs_avg") == f"[{math.exp(low):.2f}, {math.exp(high):.2f}]"


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), HOME)
    assert tables.spread(table(tmp_path)) == []
    assert text(tables.summary(table(tmp_path)), "sam", "95 % interval") == "-"


def test_the_summary_of_known_scores(known: Path) -> None:
    block = tables.summary(table(known))
    assert text(block, "adam", "seeds") == "2"
    assert text(block, "adam", "in-domain") == "11.00 ± 1.41"
    assert text(block, "adam", "worst domain") == "far" and text(block, "adam", "worst") == "41.00"
    assert text(block, "adam", "gap") == "20.00"  # 31 - 11
    # over near 20 and 22, far 40 and 42
    assert text(block, "adam", "geometric") == f"{(20 * 22 * 40 * 42) ** 0.25:.2f}"


@pytest.mark.parametrize("none", [None, math.inf, math.nan])
def test_n_is_what_was_counted(tmp_path: Path, none: float | None) -> None:
    """Four seeds, the third without a number in far: 40, 41, -, 43."""
    for seed in range(4):
        far = {} if seed == 2 else {"far": 40.0 + seed}
        folder = made_runs.write(tmp_path, made_runs.recipe("sam", seed), HOME | far)
        if seed == 2:
            results = json.loads((folder / "results.json").read_text())
            results["scores"]["test"]["far"]["perplexity"] = none
            (folder / "results.json").write_text(json.dumps(results))
    block = tables.scores(table(tmp_path))
    assert text(block, "sam", "far").startswith("41.33") and "(n = 3)" in text(block, "sam", "far")
    assert "(n" not in text(block, "sam", "near")
    assert block.notes[0].startswith("mean over 3 to 4 seeds")
    assert "no number: sam, seed 2, in far" in block.notes
    summary = tables.summary(table(tmp_path))
    assert text(summary, "sam", "seeds") == "3 of 4"
    logs = [math.log((20 + far) / 2) for far in (40, 41, 43)]
    low, high = stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    shown = f"[{math.exp(low):.2f}, {math.exp(high):.2f}]"
    assert text(summary, "sam", "95 % interval") == shown


def test_intervals_of_perplexities_stay_above_zero(tmp_path: Path) -> None:
    """10, 100 and 3000: on the plain scale the interval would begin far below zero."""
    for seed, far in enumerate((10.0, 100.0, 3000.0)):
        made_runs.write(tmp_path, made_runs.recipe("sam", seed), {"home": 5.0, "far": far})
    found = text(tables.summary(table(tmp_path)), "sam", "95 % interval")
    logs = [math.log(far) for far in (10, 100, 3000)]
    low, high = stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    assert found == f"[{math.exp(low):.2f}, {math.exp(high):.2f}]" and math.exp(low) > 0.1


def test_accuracies_are_percent_and_higher_is_better(tmp_path: Path) -> None:
    for algorithm, en, sw in (("base", 0.80, 0.60), ("tram_x", 0.85, 0.55)):
        made = made_runs.recipe(algorithm, 0, "entailment", data="facebook/xnli")
        made_runs.write(tmp_path, made, {"en": en, "sw": sw, "ur": 0.5}, "accuracy")
    found = table(tmp_path)
    assert found.layout.name == "xnli"
    block = tables.scores(found)
    assert text(block, "adam", "en") == "80.0" and text(block, "adam", "zs_avg") == "55.0"
    assert block.notes[1] == "no best or worst, not separable (n = 1): in any column"
    summary = tables.summary(found)
    assert (
        text(summary, "tram_x", "gap") == "32.5" and text(summary, "adam", "worst domain") == "ur"
    )


def s2orc(folder: Path, methods: tuple[str, ...], shift: float = 0.0, domains: int = 11) -> None:
    numbers = paper.table("m2d2_s2orc")
    names = dict(zip(paper_layout("m2d2_s2orc").domains, _configs(), strict=True))
    for method in methods:
        scores = {
            c: float(numbers.loc[method, d]) + shift for d, c in list(names.items())[:domains]
        }
        made_runs.write(folder, made_runs.recipe("base" if method == "adam" else method, 0), scores)


def _configs() -> list[str]:
    from tram_ds.data.m2d2_names import PAPER

    return [PAPER["s2orc"][d.upper()] for d in paper_layout("m2d2_s2orc").domains]


def test_the_papers_table_is_recognised_and_held_against_ours(tmp_path: Path) -> None:
    s2orc(tmp_path, ("adam", "sam", "tram_prev"), shift=0.5)
    found = table(tmp_path)
    assert found.layout.name == "m2d2_s2orc"
    block = tables.against_paper(found)
    assert block is not None and block.columns == (*found.layout.domains, "zs_avg")
    assert {cell.text for _, cells in block.rows for cell in cells[:-1]} == {"+0.5"}
    assert text(block, "sam", "zs_avg") == "+0.5"


def test_with_fewer_domains_both_averages_are_over_those(tmp_path: Path) -> None:
    s2orc(tmp_path, ("adam", "sam"), domains=4)
    block = tables.against_paper(table(tmp_path))
    assert block is not None and text(block, "sam", "zs_avg") == "+0.0"
    assert "over the 3 domains" in block.notes[1]


def test_gpt2xl_runs_are_not_those_of_gpt2(tmp_path: Path) -> None:
    s2orc(tmp_path, ("sam",))
    large = made_runs.recipe("sam", 0) | {"model": {"path": "openai-community/gpt2-xl"}}
    made_runs.write(tmp_path, large, dict.fromkeys(_configs(), 9.0))
    found, _ = runs.from_folders([f"{tmp_path}/*"])
    assert {layout.name: len(members) for layout, members in collect.parts(found, "auto")} == {
        "m2d2_s2orc": 1,
        "gpt2xl": 1,
    }


def test_significance_against_a_chosen_baseline(tmp_path: Path) -> None:
    for seed in range(9):
        base = {d: v + 0.1 * seed for d, v in HOME.items()}
        made_runs.write(tmp_path, made_runs.recipe("sam", seed), base)
        made_runs.write(
            tmp_path,
            made_runs.recipe("tram_x", seed),
            {d: v - 1 - 0.01 * seed for d, v in base.items()},
        )
    found = table(tmp_path)
    block = versus.significance(found, versus.baseline_of(found, "sam"), 0.01)
    row = dict(block.rows)["tram_x"]
    assert row[0].text == "-1.04"
    assert row[2].text == "p = 0.0039, n = 9 *"  # 2 ** -8: nine pairs cannot give less
    assert row[3].value == pytest.approx(stats.wilcoxon(range(1, 10)).pvalue)
    assert row[4].text == "not enough domains: 2"
    with pytest.raises(ValueError, match=r"--baseline mesa: .*sam, tram_x"):
        versus.baseline_of(found, "mesa")


def test_xnli_is_tested_by_wilcoxon_over_languages() -> None:
    """The paper's own means: TRAM-x against ASAM, 14 pairs."""
    numbers = paper.table("xnli")
    layout = paper_layout("xnli")
    values = pd.concat(
        {m: numbers.loc[[m]].reset_index(drop=True) for m in ("asam", "tram_x")},
        names=["method", "seed"],
    )
    found = collect.Table(layout, values, {"asam": [], "tram_x": []}, None)
    row = dict(versus.significance(found, "asam", 0.01).rows)["tram_x"]
    want = stats.wilcoxon(
        numbers.loc["tram_x", list(layout.zero_shot)], numbers.loc["asam", list(layout.zero_shot)]
    )
    assert row[4].value == pytest.approx(want.pvalue) and row[4].text.endswith("n = 14 *")
    assert row[2].text == "not enough seeds: 1 of 8"


def test_compute_is_held_against_flop_and_hours(known: Path) -> None:
    block = compute.compute(table(known), "adam")
    assert text(block, "tram_x", "passes") == "3 / 2" and text(block, "tram_x", "FLOP") == "2.33"
    assert text(block, "adam", "rank hours") == "0.002"  # 8 steps of 0.5 s on 2 ranks
    assert text(block, "adam", "gain / hour") == "-"  # 4 seconds say nothing of an hour
    assert text(block, "adam", "epochs") == "2.00"  # 8 batches of 4 from 16 rows
    assert text(block, "adam", "tokens") == "512"  # 8 steps of 64
    assert text(block, "adam", "gain") == "-3.33"  # 30 -> 31 is 3.33 % worse
    assert (
        text(block, "tram_x", "gain") == "+10.00"
        and text(block, "tram_x", "gain / FLOP") == "+4.29"
    )
    budget = 8 * 4  # adam's examples: tram_x has taken 8 / (7 / 3) = 3.43 steps by then
    assert compute.examples(table(known).runs["adam"][0]) == budget
    assert text(block, "adam", "loss, equal FLOP") == "2.1250"
    assert (
        text(block, "tram_x", "loss, equal FLOP")
        == f"{2 + 1 / 3 + (1 / 4 - 1 / 3) * (24 / 7 - 3):.4f}"
    )


def test_gains_per_hour_of_gpus(tmp_path: Path) -> None:
    """8 steps of 9 s on 2 GPUs are 0.04 hours; the average falls from 30 to 24, by 20 %."""
    for algorithm, scores in (("base", HOME), ("sam", {**HOME, "near": 8.0})):
        made = made_runs.recipe(algorithm, 0)
        made_runs.write(tmp_path, made, scores, seconds=9.0, device="cuda")
    block = compute.compute(table(tmp_path), "adam")
    assert text(block, "sam", "GPU hours") == "0.040"
    assert text(block, "sam", "gain / hour") == "+500.00"


@pytest.mark.parametrize(
    ("count", "shown"), [(512, "512"), (1500, "1.5 k"), (1.6e6, "1.6 M"), (2e9, "2.0 B")]
)
def test_tokens_as_papers_print_them(count: float, shown: str) -> None:
    assert compute.token_count(count).text == shown


def test_variants_are_rows_of_their_own_and_seeds_are_not(tmp_path: Path) -> None:
    for seed in (0, 1):
        for rho in (0.05, 0.1):
            made_runs.write(tmp_path, made_runs.recipe({"name": "sam", "rho": rho}, seed), HOME)
    made_runs.write(tmp_path, made_runs.recipe({"name": "tram_x", "distance": "mmd"}, 0), HOME)
    changed = made_runs.recipe("asam", 1) | {"engine": {"name": "zero"}, "run_dir": "elsewhere"}
    made_runs.write(tmp_path, made_runs.recipe("asam", 0), HOME)
    made_runs.write(tmp_path, changed, HOME)
    found = table(tmp_path)
    assert found.methods == ["sam (rho=0.05)", "sam (rho=0.1)", "asam", "tram_x_mmd"]
    assert [len(found.runs[m]) for m in found.methods] == [2, 2, 2, 1]


def test_many_differences_are_told_in_a_note(tmp_path: Path) -> None:
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), HOME)
    other = made_runs.recipe(
        {"name": "sam", "adaptive_filter": "matrices", "pass2_dropout": "replay"}, 0
    )
    made_runs.write(tmp_path, other | {"schedule": {"name": "cosine"}}, HOME)
    found = table(tmp_path)
    assert found.methods == ["sam (a)", "sam (b)"]
    assert any("pass2_dropout=replay" in note for note in found.notes)


def test_of_a_run_made_twice_the_newer_counts(tmp_path: Path) -> None:
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), HOME, order=100)
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), {**HOME, "home": 11.0}, order=200)
    found = table(tmp_path)
    assert float(found.values["home"].iloc[0]) == 11.0 and "older" in found.notes[0]


def test_runs_from_different_models_have_no_common_pretrained_row(tmp_path: Path) -> None:
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), HOME, initial=HOME)
    made_runs.write(tmp_path, made_runs.recipe("asam", 0), HOME, initial={**HOME, "far": 60.0})
    found = table(tmp_path)
    assert found.pretrained is None and "different scores" in found.notes[0]


def test_images_are_columns_of_one_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        for data, accuracy in (("cifar100", 0.88), ("cars", 0.93)):
            made = made_runs.recipe("base", seed, "image_classification") | {
                "optimizer": {"name": "sgd"},
                "name": f"{data}_vit",
            }
            made_runs.write(tmp_path, made, {data: accuracy + 0.01 * seed}, "accuracy")
    found = table(tmp_path)
    assert found.layout.name == "vision" and found.methods == ["sgd"]
    assert text(tables.scores(found), "sgd", "cars") == "93.50 ± 0.71"
    block = tables.against_paper(found)
    assert block is not None and text(block, "sgd", "cifar100") == "+0.53"
    assert "in-domain" not in tables.summary(found).columns


def test_distances_are_rows_of_table_14(tmp_path: Path) -> None:
    numbers = paper.table("distance")
    for distance, row in (("kl_forward", "tram_x_kl"), ("mmd", "tram_x_mmd")):
        made = made_runs.recipe(
            {"name": "tram_x", "distance": distance}, 0, "entailment", data="facebook/xnli"
        )
        made_runs.write(
            tmp_path, made, (numbers.loc[row].drop("zs_avg") / 100).to_dict(), "accuracy"
        )
    found = table(tmp_path, "distance")
    assert found.methods == ["tram_x_kl", "tram_x_mmd"]
    assert {cell.text for _, cells in tables.against_paper(found).rows for cell in cells} <= {
        "+0.0",
        "-0.1",
        "+0.1",
    }


def test_sharpness_is_read_from_the_analyses(tmp_path: Path) -> None:
    for seed, (en, sw, ur) in enumerate([(1.0, 2.0, 4.0), (2.0, 4.0, 3.0), (3.0, 6.0, 2.0)]):
        made = made_runs.recipe("tram_x", seed, "entailment")
        run = made_runs.write(tmp_path, made, {"en": 0.8, "sw": 0.6, "ur": 0.5}, "accuracy")
        (run / "analysis").mkdir()
        (run / "analysis" / "sharpness.json").write_text(f'{{"en": {en}, "sw": {sw}, "ur": {ur}}}')
    (section,) = comparison.compare(runs.from_folders([f"{tmp_path}/*"])[0], "sharpness")
    block = section.blocks[0]
    shown = {c: text(block, "tram_x", c) for c in block.columns}
    want = {
        "seeds": "3",
        "en": "2.00",
        "zs_avg": "3.50",
        "zs_std": "0.71",
        "pearson": "1.00",
        "pearson_std": "1.41",
    }
    assert shown == want
    assert any(b.name == "difference" for b in section.blocks)
    with pytest.raises(CompareError, match=r"analysis/cka.json.*analyze"):
        comparison.compare(runs.from_folders([f"{tmp_path}/*"])[0], "cka")


def test_formats_hold_the_same_numbers(apart: Path) -> None:
    block = tables.scores(table(apart))
    markdown, latex = render([block], "markdown"), render([block], "latex")
    assert (
        "| tram_x | **5" not in markdown
        and "**7.00 ± 2.00**" in markdown
        and "_12.00 ± 2.00_" in markdown
    )
    assert (
        r"tram\_x & \textbf{7.00 $\pm$ 2.00}" in latex
        and latex.count(r"\begin{tabular}{lrrrr}") == 1
    )
    rows = list(csv.DictReader(io.StringIO(render([block], "csv"))))
    assert {(r["row"], r["column"]): float(r["value"]) for r in rows}["tram_x", "zs_avg"] == 27.0
    plain = render([block], "terminal")
    assert "7.00 ± 2.00 *" in plain and "\x1b" not in plain
    assert "\x1b[" in render([block], "terminal", colour=True)
    assert max(map(len, plain.splitlines())) < 100


def test_a_name_is_never_taken_for_markup(tmp_path: Path) -> None:
    """`d` and `[red]d` are two domains, and a `|` ends no cell."""
    scores = {"home": 10.0, "d": 20.0, "[red]d": 30.0, "a|b": 40.0}
    made_runs.write(tmp_path, made_runs.recipe("sam", 0), scores)
    block = tables.scores(table(tmp_path))
    (head,) = [line for line in render([block], "terminal").splitlines() if "method" in line]
    assert [part.strip() for part in head.strip("┃").split("┃")] == ["method", *block.columns]
    head, ruler = render([block], "markdown").splitlines()[2:4]
    assert r"| a\|b |" in head and ruler.count("|") == head.count("|") - 1


def test_what_cannot_be_read_is_left_out_and_said(known: Path) -> None:
    (known / "made-base-0" / "results.json").unlink()
    (known / "made-base-1" / "results.json").write_text("{")
    (known / "export").mkdir()
    found, notes = runs.from_folders([f"{known}/*"])
    assert [run.where for run in found] == [
        str(known / "made-tram_x-0"),
        str(known / "made-tram_x-1"),
    ]
    assert (
        len(notes) == 2
        and "no results.json" in notes[0]
        and "made-base-1: cannot be read" in notes[1]
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda folder: runs.from_folders([f"{folder}/nothing*"]),
            "no finished run matches .*nothing.*train",
        ),
        (
            lambda folder: runs.from_folders([f"{folder}/*"], "validation"),
            "no finished run .*--split validation, only of test",
        ),
        (
            lambda folder: table(folder, "xnli"),
            "--table xnli: no run fits .*perplexity trained on home",
        ),
        (
            lambda folder: runs.from_mlflow("x", f"sqlite:///{folder}/no.db"),
            "no.db: there is no such database",
        ),
        (
            lambda _: comparison.blocks_of(comparison.paper_alone("xnli"), ["tabel"]),
            "--only tabel: .*paper, averages",
        ),
    ],
)
def test_a_mistake_is_told_with_its_way_out(known: Path, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(known)


def test_course_of_a_run() -> None:
    records = [{"step": s, "loss": float(s), "seconds": 2.0} for s in range(1, 301)]
    found = course.course([*records, {"step": 301, "loss": None, "seconds": 1.0}])
    assert (found.steps, found.seconds, found.kind, len(found.curve)) == (
        301,
        601.0,
        "training",
        100,
    )
    assert found.curve[0] == (3, 2.0)
    validated = course.course(
        [*records, {"step": 100, "validation_loss": 5.0}, {"step": 200, "validation_loss": 4.0}]
    )
    assert (validated.kind, validated.curve) == ("validation", ((100, 5.0), (200, 4.0)))
    assert math.isnan(course.course([]).seconds)


def test_a_run_that_stopped_early_counts_its_own_steps_and_is_noted(tmp_path: Path) -> None:
    """Of the 20 steps of the recipe it took 8, of 4 examples each."""
    made = made_runs.recipe("base", 0)
    folder = made_runs.write(tmp_path, made, HOME)
    results = json.loads((folder / "results.json").read_text())
    results["stopped_early"] = {"step": 8, "of": 20, "why": "it got worse"}
    (folder / "results.json").write_text(json.dumps(results))
    (run,), notes = runs.from_folders([str(folder)])
    assert compute.samples(run) == 8 * 4
    assert notes == [f"{folder}: stopped early at step 8 of 20: it got worse"]


@pytest.mark.parametrize(("seeds", "shown"), [(4, False), (5, True)])
def test_an_interval_over_few_seeds_is_not_shown(tmp_path: Path, seeds: int, shown: bool) -> None:
    """And what is resampled is said, whether one is shown or not."""
    for algorithm, shift in (("base", 0.0), ("tram_x", -5.0)):
        for seed in range(seeds):
            scores = {d: v + shift + 0.1 * seed**2 for d, v in HOME.items()}
            made_runs.write(tmp_path, made_runs.recipe(algorithm, seed), scores)
    block = versus.significance(table(tmp_path), "adam", 0.01)
    assert text(block, "tram_x", "95 % bootstrap, seeds").startswith("[") == shown
    assert any("resamples the seeds" in note and "below 5" in note for note in block.notes)


def test_another_model_than_the_papers_is_said(tmp_path: Path) -> None:
    """Runs on the paper's languages are held against its table, whatever model they are of."""
    for algorithm, model in (("base", "study/e5-xnli"), ("tram_x", "FacebookAI/xlm-roberta-base")):
        made = made_runs.recipe(algorithm, 0, "entailment", data="facebook/xnli", train="en")
        made["model"] = {"path": model, "init": None}
        folder = tmp_path / PurePath(model).name
        made_runs.write(folder, made, {"en": 0.8, "sw": 0.6, "ur": 0.5}, "accuracy")
    other, same = (
        comparison.compare(runs.from_folders([f"{tmp_path}/{name}/*"])[0])[0]
        for name in ("e5-xnli", "xlm-roberta-base")
    )
    (said,) = [b.notes for b in other.blocks if b.name == "difference"]
    assert said[-1] == "the paper's model is xlm-roberta-base; runs here are of study/e5-xnli"
    (said,) = [b.notes for b in same.blocks if b.name == "difference"]
    assert not any("model" in note for note in said)
