"""launch/evaluate.py: exports and the pre-trained model on a recipe's domains, on one rank or
two."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import script
from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.cli import main as tram
from tram_ds.evaluation import models, row_scores, weights
from tram_ds.evaluation.score import evaluate
from tram_ds.recipe.loading import load
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import choose as tasks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe over `pre`, and `runs/one/export`, a model with other weights."""
    place = tmp_path_factory.mktemp("place")
    words = [f"task.cache_dir={place / 'cache'}", "task.data=generated", "task.seq_len=40"]
    recipe = load("xnli_xlmr", words, smoke=True)
    task = tasks.build(recipe)
    for name, seed in (("pre", 0), ("runs/one/export", 1)):
        model = task.model()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            [p.add_(0.2 * torch.randn(p.shape, generator=generator)) for p in model.parameters()]
        (model.roberta if name == "pre" else model).save_pretrained(place / name)
        task.tokenizer.save_pretrained(place / name)
    (place / "mine.yaml").write_text(
        f"task: {{name: entailment, data: generated, seq_len: 40, cache_dir: {place / 'cache'}}}\n"
        f"model: {{path: {place / 'pre'}}}\nalgorithm: base\noptimizer: {{lr: 0.1}}\n"
        "train: {steps: 1, global_batch: 4, micro_batch: 4}\n"
    )
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    torch.set_num_threads(1)


def main(*words):
    return tram.main(["evaluate", *words])


def test_the_pretrained_model_and_an_export_are_rows_of_one_table(place, capsys):
    assert main("--recipe", "mine.yaml", "--model", "runs/one", "--out", "out.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accuracy on test of generated") and lines[1].split() == [
        "model",
        "en*",
        "sw",
        "ur",
        "zero-shot",
    ]
    assert lines[2].startswith("pre-trained (untrained head)") and lines[3].startswith("one ")
    report = json.loads(Path("out.json").read_text())
    assert [m["untrained_head"] for m in report["models"]] == [True, False] and report[
        "train_domains"
    ] == ["en"]
    scores = report["models"][1]["scores"]
    mean = (scores["sw"]["accuracy"] + scores["ur"]["accuracy"]) / 2
    assert report["models"][1]["zero_shot_average"] == pytest.approx(mean)
    assert set(scores["en"]) == {"loss", "accuracy"} and report["metric"] == "accuracy"


def test_a_place_that_cannot_be_written_is_found_first(place, capsys, monkeypatch):
    monkeypatch.setattr("tram_ds.evaluation.models.score_all", lambda *_: pytest.fail("scored"))
    for out in ("runs", "x" * 300, "mine.yaml/out.json"):
        assert main("--recipe", "mine.yaml", "--out", out) == 2
        assert f"--out {out}: cannot be written" in capsys.readouterr().err
    np.savez("mine.rows.npz", rows=np.arange(3))
    Path("text.rows.npz").write_text("mine")
    Path("folder.rows.npz").mkdir()
    for name in ("mine", "text", "folder"):
        assert main("--recipe", "mine.yaml", "--out", f"{name}.json") == 2
        assert f"{name}.rows.npz is no file of row scores" in capsys.readouterr().err
    assert np.load("mine.rows.npz")["rows"].tolist() == [0, 1, 2]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main("--recipe", "mine.yaml", "--domains", "en", "--out", "new/folder/out.json") == 0
    assert json.loads(Path("new/folder/out.json").read_text())["metric"] == "accuracy"
    assert {p.name for p in Path("new/folder").iterdir()} == {"out.json", "out.rows.npz"}


def test_scores_survive_a_place_that_goes_while_they_are_made(place, capsys, monkeypatch):
    """The table is printed, the file is kept elsewhere; with no place left it is printed too."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("tempfile.tempdir", str(place / "kept"))
    scored = models.score_all

    def go(*words):
        report = scored(*words)
        Path("late").rmdir()
        return report

    monkeypatch.setattr(models, "score_all", go)
    for folder in (True, False):
        if folder:
            Path("kept").mkdir()
        else:
            monkeypatch.setattr("tempfile.tempdir", str(place / "gone"))
        assert main("--recipe", "mine.yaml", "--domains", "en", "--out", "late/out.json") == 2
        out, err = capsys.readouterr()
        assert "accuracy on test" in out
        last = err.splitlines()[-1]
        assert last.startswith("error: --out late/out.json: the results cannot be written")
        if folder:
            (kept,) = Path("kept").iterdir()
            assert str(kept) in last
            assert json.loads(kept.read_text())["metric"] == "accuracy"
        else:
            assert last.endswith("they are printed above")
            assert json.loads(out[out.index("{") :])["metric"] == "accuracy"


@pytest.mark.parametrize("sharded", [[], ["--sharded"]], ids=["whole", "sharded"])
def test_two_ranks_and_another_batch_size_give_the_same_scores(place, sharded):
    common = [
        "--recipe",
        "mine.yaml",
        "--model",
        "runs/one",
        "--no-pretrained",
        "--domains",
        "ur,en",
        "--split",
        "validation",
    ]
    assert main(*common, "--out", "one.json") == 0
    more = [*common, *sharded, "--out", "two.json", "eval.batch=5"]
    done = script(SCRIPT, *more, world=2, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("accuracy on validation") == 1 and "one" in done.stderr, (
        "a table and a bar, on rank 0"
    )
    one, two = (
        json.loads(Path(name).read_text())["models"][0]["scores"]
        for name in ("one.json", "two.json")
    )
    assert list(one) == list(two) == ["en", "ur"]
    for name in one:
        assert one[name]["accuracy"] == two[name]["accuracy"]
        assert one[name]["loss"] == pytest.approx(two[name]["loss"], rel=1e-6)
    # every pair once, in one order; other batches are padded otherwise, and are as right
    assert Path("one.rows.npz").read_bytes() == Path("two.rows.npz").read_bytes()
    rows = row_scores.read(Path("one.rows.npz"))["0"]
    assert {name: of.score for name, of in rows.items()} == {
        name: pytest.approx(scores["accuracy"]) for name, scores in one.items()
    }


def test_what_is_made_whole_is_not_scored_sharded(place, capsys):
    words = ["--recipe", "mine.yaml", "--model", "runs/one", "--sharded", "--interpolate", "0.5"]
    assert main(*words) == 2
    assert "--sharded: a checkpoint, or a point between" in capsys.readouterr().err


def test_a_checkpoint_is_scored_as_the_model_it_holds(place, capsys):
    task = tasks.build(load("mine.yaml"))
    model = task.model()
    stepper = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "base")
    for start in range(0, 40, 8):
        stepper.step(
            [task.collate(task.train_rows()[start : start + 8])], task.forward, task.counts
        )
    with checkpoint.Saver(place / "runs" / "two", stepper) as saver:
        folder = saver.save()
    expected = evaluate(model, task, task.eval_sets("test"), 4)
    assert main("--recipe", "mine.yaml", "--model", str(folder), "--out", "checkpoint.json") == 0
    before, after = json.loads(Path("checkpoint.json").read_text())["models"]
    assert (before["untrained_head"], after["untrained_head"]) == (True, False)
    assert before["scores"] != after["scores"] == expected
    words = [
        "--recipe",
        "m2d2_s2orc_gpt2",
        "--smoke",
        f"task.cache_dir={place / 'cache'}",
        "task.data=generated",
    ]
    assert main(*words, "--model", str(folder)) == 4
    assert "is of another model than the recipe's" in capsys.readouterr().err
    next(folder.glob("*.safetensors")).write_bytes(b"broken")
    assert main("--recipe", "mine.yaml", "--model", str(folder)) == 4


def test_domains_without_train_text_can_be_scored(place, capsys):
    text = place / "text"
    for domain in ("math_l1", "Art"):
        (text / domain).mkdir(parents=True)
        (text / domain / "test.txt").write_text(f"{domain} has only a test split\n" * 30)
    task = tasks.build(
        load(
            "m2d2_s2orc_gpt2",
            [f"task.cache_dir={place / 'cache'}", "task.data=generated"],
            smoke=True,
        )
    )
    task.model().save_pretrained(place / "gpt2")
    task.tokenizer.save_pretrained(place / "gpt2")
    words = [
        f"task.data={text}",
        f"task.cache_dir={place / 'cache'}",
        "task.seq_len=16",
        f"model.path={place / 'gpt2'}",
    ]
    assert main("--recipe", "m2d2_s2orc_gpt2", "--domains", "Art", "--out", "ppl.json", *words) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["model", "ART", "zero-shot"]
    (entry,) = json.loads(Path("ppl.json").read_text())["models"]
    assert (
        entry["zero_shot_average"] == entry["scores"]["Art"]["perplexity"]
        and not entry["untrained_head"]
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--recipe", "mine.yaml", "--model", "pre"],
            "'pre' lacks 4 weights of XLMRoberta.*not trained for this task",
        ),
        (["--recipe", "mine.yaml", "--model", "no/such"], "'no/such' has no usable"),
        (["--recipe", "mine.yaml", "--domains", "en,xx"], "unknown domain 'xx'"),
        (["--recipe", "mine.yaml", "--no-pretrained"], "no model to evaluate"),
        (["--recipe", "mine.yaml", "task.sed=1"], "unknown key 'sed'"),
        (["--recipe", "nine"], "no such recipe"),
    ],
)
def test_what_cannot_be_scored_is_named_with_exit_2(capsys, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(*words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_real_domains_against_the_pretrained_row(place):
    """A tiny GPT-2 is trained on one domain: in-domain perplexity falls, and all 13 are reported
    beside the row before."""
    data = os.path.join(os.environ.get("TRAM_DS_DATA", ""), "edu_domains")
    if not os.path.isdir(data):
        pytest.skip("TRAM_DS_DATA does not point at a folder with edu_domains")
    words = [
        f"task.cache_dir={place / 'cache'}",
        f"task.data={data}",
        "task.train=math",
        "task.seq_len=64",
    ]
    words += ["task.max_train_tokens=60000", "task.max_eval_tokens=1500"]
    recipe = load("m2d2_s2orc_gpt2", words, smoke=True)
    task = tasks.build(recipe)
    model = task.model()
    for folder, steps in (("before", 0), ("after", 40)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        stepper = wrap(model, optimizer, "tram_prev")
        rows = task.train_rows()
        for step in range(steps):
            stepper.step(
                [task.collate(rows[step * 8 % (len(rows) - 8) :][:8])], task.forward, task.counts
            )
        model.save_pretrained(place / folder)
        task.tokenizer.save_pretrained(place / folder)
    words = [*words, f"model.path={place / 'before'}", "task.eval=null", "eval.batch=8"]
    assert (
        main(
            "--recipe",
            "m2d2_s2orc_gpt2",
            "--model",
            str(place / "after"),
            "--out",
            "real.json",
            *words,
        )
        == 0
    )
    report = json.loads(Path("real.json").read_text())
    before, after = (entry["scores"] for entry in report["models"])
    assert list(before) == list(after) and len(after) == 13 and next(iter(after)) == "math"
    assert after["math"]["perplexity"] < 0.7 * before["math"]["perplexity"]


def test_the_line_from_the_pretrained_model_to_the_trained_one(place):
    """Its ends are the two models, bit for bit; its middle is neither."""
    words = ["--recipe", "mine.yaml", "--model", "runs/one", "--out", "line.json"]
    assert main(*words) == 0
    pre, one = json.loads(Path("line.json").read_text())["models"]
    assert main(*words, "--interpolate", "0,0.5,1") == 0
    line = json.loads(Path("line.json").read_text())["models"]
    assert [m["name"] for m in line] == ["pre-trained", "one at 0", "one at 0.5", "one at 1"]
    assert [m["interpolation"] for m in line] == [None, 0.0, 0.5, 1.0]
    assert [m["untrained_head"] for m in line] == [True, True, False, False]
    assert line[0]["scores"] == line[1]["scores"] == pre["scores"]
    assert line[3]["scores"] == one["scores"]
    losses = [m["scores"]["en"]["loss"] for m in line]
    assert len({losses[0], losses[2], losses[3]}) == 3


def test_perplexities_of_other_tokens_are_told_apart(place, capsys):
    """Two exports with tokenizers of other words: each is scored, and a line names both."""
    for split, words in (("train", 400), ("test", 40)):
        path = place / "words" / "d" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"word{i * i} and{i * 37}" for i in range(words)))
    text = (
        f"task: {{name: language_modeling, data: {place / 'words'}, seq_len: 16}}\n"
        "model: {init: {architecture: gpt2, n_embd: 8, n_layer: 1, n_head: 1}}\n"
        "algorithm: base\noptimizer: {lr: 0.1}\n"
        "train: {steps: 1, global_batch: 4, micro_batch: 4}\n"
    )
    (place / "fresh.yaml").write_text(text)
    cache = f"task.cache_dir={place / 'cache'}"
    for name, size in (("a", 270), ("b", 280), ("same", 270)):
        recipe = load("fresh.yaml", [cache, f"model.init.vocab_size={size}"])
        task = tasks.build(recipe, training=False)
        task.model().save_pretrained(place / name)
        task.tokenizer.save_pretrained(place / name)
    words = [
        "--recipe",
        "fresh.yaml",
        cache,
        "model.init=null",
        "model.path=a",
        "--out",
        "told.json",
    ]
    assert main(*words, "--model", "same") == 0
    assert "not comparable" not in capsys.readouterr().out
    assert main(*words, "--model", "b") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    tokens = [entry["tokens"] for entry in json.loads(Path("told.json").read_text())["models"]]
    assert last == (
        "not comparable: perplexities are per token, and the models have another tokenizer: "
        f"pre-trained {tokens[0]['tokenizer']}, b {tokens[1]['tokenizer']}"
    )


@pytest.mark.parametrize("a", (0.0, 0.25, 1.0))
def test_interpolated_weights_by_hand(a):
    start, end = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in "ab")
    end[1].running_mean += 1.0
    end[1].num_batches_tracked += 5
    ours, theirs = ([*m.state_dict().values()] for m in (end, start))
    want = [
        (t + a * (o - t)) if o.is_floating_point() else (t if a == 0 else o)
        for o, t in zip(map(torch.clone, ours), theirs, strict=True)
    ]
    ends = {0.0: list(map(torch.clone, theirs)), 1.0: list(map(torch.clone, ours))}
    weights.towards(start, end, a, "it")
    found = [*end.state_dict().values()]
    assert all(torch.allclose(f, w, atol=1e-7) for f, w in zip(found, want, strict=True))
    if a in ends:
        assert all(torch.equal(f, w) for f, w in zip(found, ends[a], strict=True))


@pytest.mark.parametrize(
    "own", (torch.nn.Linear(4, 2), torch.nn.Linear(3, 2, bias=False), torch.nn.Embedding(2, 3))
)
def test_models_of_another_shape_or_other_names_have_no_line_between(own):
    with pytest.raises(DataError, match=r"'it' cannot be interpolated.*differ in name or shape"):
        weights.towards(own, torch.nn.Linear(3, 2), 0.5, "it")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "runs/one", "--interpolate", "0,1.01"], "from 0"),
        (["--model", "runs/one", "--interpolate", "-0.1"], "from 0"),
        (["--model", "runs/one", "--interpolate", "half"], "from 0"),
        (["--model", "runs/one", "--interpolate", ""], "from 0"),
        (["--model", "runs/one", "--interpolate", "nan"], "from 0"),
        (["--interpolate", "0.5"], "name the trained model with --model"),
    ],
)
def test_a_line_that_is_none_is_named(words, message, capsys):
    words = [f"--interpolate={words[-1]}" if w == words[-1] else w for w in words]
    words = [w for w in words if w != "--interpolate"]
    assert main("--recipe", "mine.yaml", *words) == 2
    assert message in capsys.readouterr().err
