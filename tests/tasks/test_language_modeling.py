"""The language modeling task: what it counts, how it scores, and what it refuses before any weight
is read."""

from __future__ import annotations

import copy
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors

from tram_ds.data.bpe import train_tokenizer
from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.models.pretrained import load_model
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.language_modeling import build, resolved_bos

TINY = {"architecture": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on a busy machine are ten times slower than one at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of three domains with 24, 24 and 7 lines."""
    root = tmp_path_factory.mktemp("data")
    for domain, splits, count in [
        ("math", "train valid test", 24),
        ("art", "train valid test", 24),
        ("far", "test", 7),
    ]:
        (root / domain).mkdir()
        for split in splits.split():
            words = [f"{domain}{i % 11} {split}{i % 5} shared{i % 3}" for i in range(count)]
            (root / domain / f"{split}.txt").write_text("\n".join(words) + "\n")
    return root


@pytest.fixture(scope="module")
def recipe_for(root, tmp_path_factory):
    """Makes a recipe from (task keys, model keys, eval keys)."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(model=None, evaluation=None, **task):
        task = {
            "name": "language_modeling",
            "data": str(root),
            "train": "math",
            "seq_len": 16,
            "cache_dir": cache,
        } | task
        model = model or {"init": TINY | {"vocab_size": 300}}
        return SimpleNamespace(
            task=TaskSection(**task),
            model=ModelSection(**model),
            train=TrainSection(steps=1, global_batch=2, micro_batch=1),
            eval=EvalSection(**(evaluation or {})),
        )

    return make


@pytest.fixture(scope="module")
def task(recipe_for):
    return build(recipe_for())


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory):
    """A pre-trained model's folder with its tokeniser."""
    folder = tmp_path_factory.mktemp("model")
    task.model().save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    return str(folder)


def direct_losses(model, tokens, seq_len):
    """nll of every predicted token of consecutive windows, one window at a time, in float64."""
    model = copy.deepcopy(model).double().eval()
    losses = []
    for start in range(0, len(tokens), seq_len):
        window = torch.as_tensor(np.asarray(tokens[start : start + seq_len], dtype=np.int64))
        if len(window) >= 2:
            with torch.no_grad():
                log_p = model(input_ids=window[None]).logits[0].log_softmax(-1)
            losses.append((-log_p[:-1].gather(1, window[1:, None])[:, 0]).tolist())
    return losses


def tokens_of(task, root, domain, split="test"):
    return task.tokenizer((root / domain / f"{split}.txt").read_text())["input_ids"]


def test_perplexity_is_the_direct_one_at_any_batch_size(task, root):
    model = task.model()
    results = [
        evaluate(model, task, task.eval_sets("test"), batch_size) for batch_size in (1, 3, 64)
    ]
    assert list(results[0]) == ["math", "art", "far"]
    for domain in results[0]:
        losses = [
            x for window in direct_losses(model, tokens_of(task, root, domain), 16) for x in window
        ]
        expected = math.exp(math.fsum(losses) / len(losses))
        for result in results:
            assert result[domain]["perplexity"] == pytest.approx(expected, rel=1e-6)
            assert result[domain]["loss"] == pytest.approx(math.log(expected), rel=1e-6)
    average = (results[0]["art"]["perplexity"] + results[0]["far"]["perplexity"]) / 2
    assert zero_shot_average(results[0], task.train_domains, "perplexity") == pytest.approx(
        average, rel=1e-12
    )


def test_m2d2_ref_weights_each_window_by_its_length(recipe_for, root):
    task = build(recipe_for(m2d2_ref=True, train="math", eval=["far"]))
    model, tokens = task.model(), tokens_of(task, root, "far")
    windows = direct_losses(model, tokens, 16)
    assert len(windows[-1]) != len(windows[0])  # or the two rules could not differ
    expected = math.exp(
        sum(np.mean(w) * (len(w) + 1) for w in windows) / sum(len(w) + 1 for w in windows)
    )
    for batch_size in (1, 64):
        result = evaluate(model, task, task.eval_sets("test"), batch_size)
        assert result["far"]["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_forward_counts_what_counts_says_and_leaves_the_batch_alone(task):
    model = task.model().eval()
    rows = [np.arange(1, 17), np.arange(20, 27)]
    for chosen, counted, valid in [(rows, 15 + 6, 16 + 7), (rows[:1] * 2, 30, 32)]:
        batch = task.collate(chosen)
        before = {key: value.clone() for key, value in batch.items()}
        output = task.forward(model, batch)
        assert (int(output.count), len(output.logits), output.rows) == (counted, valid, 2)
        assert (
            int(output.counted.sum()) == counted == task.counts(batch)[0]
            and task.counts(batch)[1] == valid
        )
        assert batch.keys() == before.keys() and all(
            torch.equal(batch[key], before[key]) for key in batch
        )
        assert ("attention_mask" in batch) == (chosen is rows)


def test_padding_changes_nothing(task):
    model = task.model().eval()
    rows = [np.arange(1, 17), np.arange(20, 27)]
    together, apart = (
        task.forward(model, task.collate(rows)),
        [task.forward(model, task.collate([r])) for r in rows],
    )
    torch.testing.assert_close(
        together.logits, torch.cat([output.logits for output in apart]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        together.loss_sum, apart[0].loss_sum + apart[1].loss_sum, rtol=1e-6, atol=0
    )
    batch = task.collate(rows)
    batch["input_ids"][1, 7:] = 99  # under the padding
    torch.testing.assert_close(
        task.forward(model, batch).loss_sum, together.loss_sum, rtol=0, atol=0
    )


def test_labels_replace_targets_and_minus_100_is_not_counted(task):
    model = task.model().eval()
    batch = task.collate([np.arange(1, 17)])
    labels = batch["input_ids"].clone()
    labels[:, 5:] = -100
    output = task.forward(model, batch | {"labels": labels})
    whole = task.forward(model, batch)
    expected = -whole.logits.log_softmax(-1)[torch.arange(4), batch["input_ids"][0, 1:5]].sum()
    assert int(output.count) == 4 and len(output.logits) == 16
    torch.testing.assert_close(output.loss_sum, expected)


def test_train_rows_are_full_blocks_of_the_training_domains(recipe_for, root):
    both = build(recipe_for(train="all", exclude=["far"]))
    assert both.train_domains == ["art", "math"] and both.eval_domains == ["art", "math"]
    expected = []
    for domain in both.train_domains:
        tokens = tokens_of(both, root, domain, "train")
        expected += [tokens[i : i + 16] for i in range(0, len(tokens) - 15, 16)]
    assert [row.tolist() for row in both.train_rows()] == expected
    limited = build(recipe_for(max_train_tokens=40, max_eval_tokens=20))
    assert len(limited.train_rows()) == 2 and [
        len(r) for r in limited.eval_sets("test")["art"]
    ] == [16, 4]


def test_domains_that_lack_validation_are_scored_on_test_only(task):
    assert list(task.eval_sets("validation")) == ["math", "art"]
    assert list(task.eval_sets("test")) == ["math", "art", "far"]


def test_initialisation_depends_on_the_seed_alone(task):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = task.model()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = task.model()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert first.training and {p.dtype for p in first.parameters()} == {torch.float32}


def test_options_of_the_model_section_reach_the_model(recipe_for):
    section = {
        "init": TINY | {"vocab_size": 300},
        "dropout": 0.25,
        "attention": "eager",
        "activation_checkpointing": True,
    }
    model = build(recipe_for(model=section)).model()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert model.config._attn_implementation == "eager" and model.is_activation_checkpointing
    assert not model.config.use_cache and model.config.n_positions == 16


def test_a_path_brings_its_weights_and_tokenizer(recipe_for, task, saved):
    loaded = build(recipe_for(model={"path": saved}))
    assert loaded.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    pairs = zip(loaded.model().parameters(), task.model().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.data_digest() == task.data_digest()


def test_contents_are_by_domain_and_split_whatever_else_is_read(recipe_for, root, tmp_path):
    everything, far = build(recipe_for()).contents(), build(recipe_for(eval=["far"])).contents()
    assert {split: set(found) for split, found in everything.items()} == {
        "train": {"math"},
        "valid": {"math", "art"},
        "test": {"math", "art", "far"},
    }
    assert len({d for found in everything.values() for d in found.values()}) == 6
    assert far["test"] == {name: everything["test"][name] for name in ("math", "far")}
    shutil.copytree(root, tmp_path / "data")
    with open(tmp_path / "data" / "far" / "test.txt", "a") as file:
        file.write("one line more\n")
    changed = build(recipe_for(data=str(tmp_path / "data"))).contents()
    assert changed["test"].pop("far") != everything["test"].pop("far") and changed == everything


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_other_architectures_work(recipe_for, architecture):
    init = {
        "architecture": architecture,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    if architecture != "gpt_neox":
        init["num_key_value_heads"] = 2
    task = build(recipe_for(model={"init": init | {"intermediate_size": 32}}, train="art"))
    batch = task.collate([task.train_rows()[0]])
    output = task.forward(task.model(), batch)
    assert (
        task.counts(batch) == (15, 16)
        and output.logits.shape[0] == 16
        and bool(output.loss_sum.isfinite())
    )


def test_heads_of_the_other_tasks_are_built_the_same_way():
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    small = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    for architecture, auto_class in [
        ("xlm-roberta", AutoModelForSequenceClassification),
        ("vit", AutoModelForImageClassification),
    ]:
        section = ModelSection(init={"architecture": architecture} | small, dropout=0.0)
        model = load_model(auto_class, section, seed=3, num_labels=7, vocab_size=50)
        assert model.num_labels == 7 and getattr(model.config, "vocab_size", 50) == 50
    with pytest.raises(DataError, match=r"sdpa \(model\.attention=eager works"):
        section = ModelSection(init={"architecture": "deberta-v2"} | small)
        load_model(AutoModelForSequenceClassification, section, vocab_size=50)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": "maths"}, "unknown domain 'maths'.*did you mean 'math'"),
        ({"eval": ["aart"]}, "unknown domain 'aart'.*did you mean 'art'"),
        ({"train": "far"}, r"'far'.*no train split.*it has test\.txt"),
        ({"seq_len": 16, "max_train_tokens": 9}, "too short: 9 tokens found.*seq_len 16"),
        (
            {"model": {"init": TINY | {"n_positions": 8}}},
            "seq_len 16 exceeds the model's 8 positions",
        ),
        (
            {"model": {"init": TINY | {"n_layers": 8}}},
            r"init\.n_layers is not a field.*did you mean 'n_layer'",
        ),
        (
            {"model": {"init": {"architecture": "gpt3"}}},
            "architecture 'gpt3' is unknown.*did you mean 'gpt",
        ),
        ({"model": {"init": TINY | {"vocab_size": 100}}}, "vocab_size 100 is too small"),
        ({"model": {"path": "/no/such/folder"}}, "model.path /no/such/folder: there is no such"),
        ({"data": "machelreid/nothing"}, "hub data set machelreid/nothing"),
    ],
)
def test_errors_come_before_any_weight(recipe_for, monkeypatch, change, message):
    monkeypatch.setattr(
        "tram_ds.tasks.language_modeling.load_model", lambda *_, **__: pytest.fail("model built")
    )
    with pytest.raises(DataError, match=message):
        build(recipe_for(**change))


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(recipe_for, saved, tmp_path):
    train_tokenizer([f"w{i}" for i in range(500)], 500).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="500 entries but the model's vocabulary only 300"):
        build(recipe_for(model={"path": saved}, tokenizer=str(tmp_path)))


def test_a_path_without_tokenizer_or_with_missing_weights_is_refused(
    recipe_for, task, saved, tmp_path
):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=300)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"holds no tokeniser; set task\.tokenizer"):
        build(recipe_for(model={"path": str(tmp_path)}))
    model.config.n_layer = 2  # the weights of the second layer are not in the file
    model.config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"lacks 12 weights .* of GPT2LMHeadModel"):
        build(recipe_for(model={"path": str(tmp_path)}, tokenizer=saved)).model()


def test_real_domains_train_on_a_folder(recipe_for):
    data = os.environ.get("TRAM_DS_DATA")
    if not data or not os.path.isdir(os.path.join(data, "edu_domains")):
        pytest.skip("TRAM_DS_DATA does not point at a folder with edu_domains")
    model = {"init": TINY | {"vocab_size": 512}}
    task = build(recipe_for(data=os.path.join(data, "edu_domains"), seq_len=64, model=model))
    sets = task.eval_sets("test")
    assert next(iter(sets)) == "math" and len(sets) == 13
    scores = evaluate(task.model(), task, {"math": sets["math"][:20]}, batch_size=8)
    # nothing learned yet
    assert scores["math"]["perplexity"] == pytest.approx(task.model().config.vocab_size, rel=0.3)


def test_bos_goes_where_it_is_asked_for(recipe_for, root):
    """Blocks of 16 of tokens t: [BOS, t0 .. t14], [BOS, t15 ..]; or [BOS, t0 .. t14], [t15 ..]."""
    rows, asked = {}, {}
    for bos in ("auto", "none", "block", "document"):
        task = build(recipe_for(bos=bos))
        rows[bos] = [row.tolist() for row in task.eval_sets("test")["math"]]
        asked[bos] = task.prompt("One two")
    t, begin = tokens_of(task, root, "math"), task.tokenizer.bos_token_id
    assert rows["none"] == [t[i : i + 16] for i in range(0, len(t) - 1, 16)]
    assert rows["auto"] == rows["none"]  # this tokenizer begins nothing by itself
    assert rows["block"] == [[begin, *t[i : i + 15]] for i in range(0, len(t), 15)]
    assert begin not in asked["none"] and asked["none"] == asked["auto"]
    assert asked["block"] == asked["document"] == [begin, *asked["none"]]
    whole = [begin, *t]
    assert rows["document"] == [whole[i : i + 16] for i in range(0, len(whole) - 1, 16)]


def test_auto_follows_a_tokenizer_that_begins_every_text(task):
    tokenizer = copy.deepcopy(task.tokenizer)
    assert resolved_bos("auto", tokenizer) == "none"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 0)]
    )
    assert resolved_bos("auto", tokenizer) == "block"
    assert resolved_bos("none", tokenizer) == "none"
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"task\.bos block: .*no beginning-of-text token"):
        resolved_bos("block", tokenizer)
