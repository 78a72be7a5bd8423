"""XNLI: the hub's layout and folders with the same, what is counted and scored, and what is refused
before any weight."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import accuracy_score

from tests.data.test_m2d2 import offline_hub, put_in_hub_cache  # noqa: F401 (a fixture)
from tram_ds.algorithms.stepper import wrap
from tram_ds.data.generated_tables import pairs_folder, write
from tram_ds.data.xnli import LABELS, LANGUAGES
from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.models.noise import Added, Conditions, Noise
from tram_ds.models.randomness import StepRandomness
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.entailment import build

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
XLMR = SMALL | {"architecture": "xlm-roberta"}
NAMES = ["entailment", "neutral", "contradiction"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def recipe_for(cache):
    def make(model=None, evaluation=None, **task):
        section = {
            "name": "entailment",
            "data": "generated",
            "seq_len": 48,
            "cache_dir": cache,
        } | task
        return SimpleNamespace(
            task=TaskSection(**section),
            model=ModelSection(**(model or {"init": XLMR})),
            train=TrainSection(steps=1, global_batch=2, micro_batch=1),
            eval=EvalSection(**(evaluation or {})),
        )

    return make


@pytest.fixture(scope="module")
def task(recipe_for):
    return build(recipe_for())


@pytest.fixture
def folder(cache, tmp_path):
    """A copy of the generated data that a test may change."""
    return shutil.copytree(pairs_folder(cache), tmp_path / "pairs")


def predictions(model, task, rows):
    """One example at a time, without padding."""
    model = model.eval()
    with torch.no_grad():
        return [int(task.forward(model, task.collate([row])).logits.argmax()) for row in rows]


@pytest.fixture(scope="module")
def trained(task):
    """(a model after 40 steps of TRAM-x, the distance of each step)."""
    model = task.model()
    stepper = wrap(
        model, torch.optim.AdamW(model.parameters(), lr=2e-3), "tram_x", noise_site=task.noise_site
    )
    batches = [task.collate(task.train_rows()[16 * step % 96 :][:16]) for step in range(40)]
    return model, [
        float(stepper.step([batch], task.forward, task.counts).distance) for batch in batches
    ]


def nudged(task):
    """A model whose predictions are not all the same."""
    model = task.model()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def test_accuracy_is_scikit_learns_at_any_batch_size_and_rank_count(task, trained):
    model, sets = trained[0], task.eval_sets("test")
    assert list(sets) == ["en", "sw", "ur"] == task.eval_domains and task.train_domains == ["en"]
    expected = {
        n: accuracy_score([r[2] for r in rows], predictions(model, task, rows))
        for n, rows in sets.items()
    }
    assert len(set(predictions(model, task, sets["en"]))) > 1
    whole = [evaluate(model, task, sets, batch) for batch in (1, 7, 64)]
    shared, slots, barrier = [{}, {}], [torch.zeros(3)] * 2, threading.Barrier(2, timeout=60)

    def rank(number):
        def data_sum(x):
            slots[number] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        shared[number] = evaluate(copy.deepcopy(model), task, sets, 5, number, 2, data_sum=data_sum)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for result in [*whole, *shared]:
        assert {name: scores["accuracy"] for name, scores in result.items()} == expected
        assert result["sw"]["loss"] == pytest.approx(whole[0]["sw"]["loss"], rel=1e-5)
    mean = (expected["sw"] + expected["ur"]) / 2
    assert zero_shot_average(whole[0], task.train_domains, "accuracy") == pytest.approx(mean)


def test_forward_counts_what_counts_says_and_leaves_the_batch_alone(task):
    batch = task.collate(task.train_rows()[:5])
    before = {key: value.clone() for key, value in batch.items()}
    output = task.forward(task.model(), batch)
    assert output.logits.shape == (5, 3) and task.counts(batch) == (5, 5) == (
        output.count,
        output.rows,
    )
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    expected = -output.logits.log_softmax(-1)[torch.arange(5), batch["labels"]].sum()
    torch.testing.assert_close(output.loss_sum, expected)


def test_padding_is_dynamic_and_long_pairs_are_cut(recipe_for):
    task = build(recipe_for(seq_len=12))
    rows = [("a b", "c", 0), ("word " * 50, "other " * 50, 1)]
    assert (
        task.collate(rows[:1])["input_ids"].shape[1]
        < 12
        == task.collate(rows)["input_ids"].shape[1]
    )
    assert task.collate(rows)["attention_mask"].sum(1).tolist()[0] < 12


@pytest.mark.parametrize("side", ["right", "left"])
def test_position_ids_ignore_padding_also_under_embedding_noise(task, side, monkeypatch):
    """input_ids are passed even where embeddings are noised, so XLM-R counts positions from the
    first real token."""
    monkeypatch.setattr(task.tokenizer, "padding_side", side)
    rows = [
        ("sw1 sw2 sw3", "sw2", 0),
        ("en1 en2 en3 en4 en5 en6 en7 en8", "en9 en1 en4 en4 en2", 1),
    ]
    model = nudged(task).eval()
    seen = []
    hook = model.roberta.embeddings.position_embeddings.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    batch = task.collate(rows)
    assert bool((batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any())
    added = Added(Noise("embedding", 1e-12), StepRandomness(0, 0), 0, detach=False)
    with torch.no_grad(), Conditions(model, model).during(added, train=False, last=False):
        together = task.forward(model, batch).logits
        alone = [task.forward(model, task.collate([row])).logits for row in rows]
    hook.remove()
    if side == "right":  # on the left, position 0, which the head reads, would be padding
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    pad, mask = task.tokenizer.pad_token_id, batch["attention_mask"].bool()
    for position, m in zip(seen[0], mask, strict=True):
        assert position[m].tolist() == list(range(pad + 1, pad + 1 + int(m.sum())))


def test_padding_is_on_the_right_whatever_the_tokenizer_says(task, recipe_for, tmp_path):
    task.model().save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "padding_side": "left"
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    batch = build(recipe_for(model={"path": str(tmp_path)})).collate(
        [("a", "b", 0), ("a a a a", "b b b", 1)]
    )
    assert batch["attention_mask"][0, 0] == 1 and batch["attention_mask"][0, -1] == 0


def test_training_learns_the_generated_pairs_with_noise(task, trained):
    model, distances = trained
    rows = {"en": task.train_rows()}
    before, after = (evaluate(m, task, rows, 32)["en"] for m in (task.model(), model))
    assert min(distances[1:]) > 0
    assert after["loss"] < before["loss"] and after["accuracy"] > before["accuracy"]


def test_the_hubs_layout_is_read_through_its_cache(offline_hub, folder, recipe_for):  # noqa: F811
    files = {f"{path.parent.name}/{path.name}": path for path in sorted(folder.rglob("*.parquet"))}
    put_in_hub_cache(offline_hub, "facebook/xnli", files)
    hub, local = (
        build(recipe_for(data=d, eval=["sw", "ur"])) for d in ("facebook/xnli", str(folder))
    )
    assert hub.train_rows()[:3] == local.train_rows()[:3] and hub.eval_domains == ["en", "sw", "ur"]
    assert hub.data_digest() == local.data_digest() and hub.contents() == local.contents()
    assert {split: set(found) for split, found in hub.contents().items()} == {
        "train": {"en"},
        "validation": {"en", "sw", "ur"},
        "test": {"en", "sw", "ur"},
    }
    assert hub.pairs.languages() == list(LANGUAGES) and len(LANGUAGES) == 15
    with pytest.raises(
        DataError, match=r"th/test-\*\.parquet.*facebook/xnli.*set task\.data to .*HF_HUB_OFFLINE=1"
    ):
        build(recipe_for(data="facebook/xnli", eval=["th"]))


def test_selection_needs_the_training_language_only(folder, recipe_for):
    (folder / "sw" / "validation-00000-of-00001.parquet").unlink()
    task = build(recipe_for(data=str(folder), evaluation={"every_steps": 1}))
    assert list(task.eval_sets("validation")) == ["en", "ur"] and list(task.eval_sets("test")) == [
        "en",
        "sw",
        "ur",
    ]
    (folder / "en" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"'en' .*no validation split; it has train, test"):
        build(recipe_for(data=str(folder), evaluation={"every_steps": 1}))


def test_evaluation_needs_no_train_split(folder, recipe_for, task, tmp_path):
    (folder / "en" / "train-00000-of-00001.parquet").unlink()
    task.model().save_pretrained(tmp_path / "model")
    task.tokenizer.save_pretrained(tmp_path / "model")
    recipe = recipe_for(data=str(folder), train="en", model={"path": str(tmp_path / "model")})
    assert list(build(recipe, training=False).eval_sets("test")) == ["en", "sw", "ur"]
    with pytest.raises(DataError, match="no train split"):
        build(recipe)


def pairs(**change):
    return {"premise": ["a b", "c d"], "hypothesis": ["a", "d"], "label": [0, 2]} | change


@pytest.mark.parametrize(
    "columns, names, message",
    [
        (pairs(label=[0, 3]), NAMES, "labels from 0 to 3, but only 0 entailment, 1 neutral and 2"),
        (pairs(label=[-1, 2]), NAMES, "labels from -1 to 2"),
        (pairs(label=["yes", "no"]), None, "label holds string, not 0, 1 or 2"),
        (pairs(premise=[None, "x"]), NAMES, "row 0 has no premise"),
        (
            pairs(premise=[{"en": "x"}] * 2),
            NAMES,
            "column premise holds struct.*one language's files",
        ),
        (
            pairs(),
            NAMES[::-1],
            "labels are called contradiction, neutral, entailment; expected entailment",
        ),
        ({"text": ["x"], "label": [0]}, NAMES, "no column premise, hypothesis; it has text, label"),
        ({key: values[:0] for key, values in pairs().items()}, None, "no rows|holds null"),
    ],
)
def test_wrong_tables_are_refused_before_any_weight(
    folder, recipe_for, monkeypatch, columns, names, message
):
    write(folder / "sw" / "test-00000-of-00001.parquet", columns, {"label": names} if names else {})
    monkeypatch.setattr(
        "tram_ds.tasks.entailment.load_model", lambda *_, **__: pytest.fail("model built")
    )
    with pytest.raises(DataError, match=message):
        build(recipe_for(data=str(folder)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": "eng"}, "unknown domain 'eng'.*did you mean 'en'"),
        ({"eval": ["xx"]}, "unknown domain 'xx'.*it has en, sw, ur"),
        ({"train": "sw"}, "'sw' of generated has no train split; it has validation, test"),
        (
            {"data": "facebook/xnly"},
            "'facebook/xnly' is neither 'generated', 'facebook/xnli' nor a folder",
        ),
        ({"revision": "abc"}, "revision abc is for data on the hub"),
        ({"seq_len": 4}, "seq_len 4 leaves no room"),
        (
            {"model": {"init": XLMR | {"max_position_embeddings": 40}}},
            "exceeds the model's 38 positions",
        ),
        ({"model": {"init": XLMR | {"vocab_size": 100}}}, "vocab_size 100 is too small"),
        ({"model": {"path": "/no/such/folder"}}, "model.path /no/such/folder: there is no such"),
    ],
)
def test_wrong_recipes_are_refused(recipe_for, change, message):
    with pytest.raises(DataError, match=message):
        build(recipe_for(**change))


def test_damaged_parquet_is_refused(folder, recipe_for):
    path = folder / "ur" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"ur/test-00000-of-00001\.parquet is damaged"):
        build(recipe_for(data=str(folder)))


def test_a_backbone_without_its_weights_is_no_new_head(task, recipe_for, tmp_path):
    from safetensors.torch import load_file, save_file

    model = task.model()
    model.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
    save_file(head, tmp_path / "model.safetensors", {"format": "pt"})
    recipe = recipe_for(model={"path": str(tmp_path)})
    again = build(recipe).model()
    assert again.new_weights and all(name.startswith("classifier.") for name in again.new_weights)
    assert torch.equal(
        again.roberta.embeddings.word_embeddings.weight,
        model.roberta.embeddings.word_embeddings.weight,
    )
    save_file(dict(list(head.items())[3:]), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 3 weights .* of XLMRoberta"):
        build(recipe).model()


def test_real_xnli_with_a_sentencepiece_model_and_no_tokenizer_json(recipe_for, tmp_path):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    data, spm = (
        os.path.join(os.environ.get("TRAM_DS_DATA", ""), name)
        for name in ("xnli_sample", "spm_small")
    )
    if not (os.path.isdir(data) and os.path.isdir(spm)):
        pytest.skip("TRAM_DS_DATA does not point at a folder with xnli_sample and spm_small")
    model = tmp_path / "model"
    XLMRobertaModel(
        XLMRobertaConfig(vocab_size=1002, type_vocab_size=1, max_position_embeddings=130, **SMALL)
    ).save_pretrained(model)
    shutil.copy(os.path.join(spm, "test_model.model"), model / "sentencepiece.bpe.model")
    for language in ("en", "sw", "ur"):
        shutil.copytree(os.path.join(data, language), tmp_path / "xnli" / language)
    shutil.copy(
        tmp_path / "xnli/en/validation-00000-of-00001.parquet",
        tmp_path / "xnli/en/train-00000-of-00001.parquet",
    )
    task = build(recipe_for(data=str(tmp_path / "xnli"), train="en", model={"path": str(model)}))
    assert len(task.tokenizer) == 1002 and not (model / "tokenizer.json").exists()
    fresh = task.model()
    stepper = wrap(
        fresh,
        torch.optim.AdamW(fresh.parameters(), lr=1e-3),
        "tram_prev",
    )
    rows = task.train_rows()
    losses = [
        float(stepper.step([task.collate(rows[i * 16 :][:16])], task.forward, task.counts).loss)
        for i in range(12)
    ]
    assert max(losses) < 3
    sets = {name: rows[:200] for name, rows in task.eval_sets("test").items()}
    result = evaluate(fresh, task, sets, 50)
    assert list(result) == ["en", "sw", "ur"]
    expected = accuracy_score([r[2] for r in sets["ur"]], predictions(fresh, task, sets["ur"]))
    assert result["ur"]["accuracy"] == expected


def test_a_checkpoint_of_another_label_order_scores_the_same(recipe_for, task, tmp_path):
    """The same classifier, saved with its labels in two orders: one accuracy and one loss."""
    found = {}
    for name, order in (("ours", (0, 1, 2)), ("fairseq", (2, 1, 0))):
        model = task.model()
        head = model.classifier.out_proj
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.manual_seed(1)))
            head.weight.copy_(head.weight[list(order)])
        model.config.id2label = {place: LABELS[label] for place, label in enumerate(order)}
        model.config.label2id = {v: k for k, v in model.config.id2label.items()}
        model.save_pretrained(tmp_path / name)
        task.tokenizer.save_pretrained(tmp_path / name)
        own = build(recipe_for(model={"path": str(tmp_path / name)}))
        loaded = own.model()
        assert loaded.config.id2label == model.config.id2label
        found[name] = evaluate(loaded, own, own.eval_sets("test"), 8)
    for language, scores in found["ours"].items():
        assert found["fairseq"][language] == pytest.approx(scores, abs=1e-6)
