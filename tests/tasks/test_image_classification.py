"""Image classification: the hub's three data sets, folders, labels as numbers and texts, lazy
decoding, accuracy."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from tests.data.test_m2d2 import offline_hub, put_in_hub_cache  # noqa: F401 (a fixture)
from tram_ds.algorithms.stepper import wrap
from tram_ds.data import images
from tram_ds.data.generated_tables import images_folder, write
from tram_ds.evaluation.score import evaluate
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.image_classification import build

VIT = {"architecture": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 64, "image_size": 16, "patch_size": 4}


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
        return SimpleNamespace(
            task=TaskSection(
                **{"name": "image_classification", "data": "generated", "cache_dir": cache} | task
            ),
            model=ModelSection(**(model or {"init": VIT})),
            train=TrainSection(steps=1, global_batch=2, micro_batch=1),
            eval=EvalSection(**(evaluation or {})),
        )

    return make


@pytest.fixture(scope="module")
def task(recipe_for):
    return build(recipe_for())


@pytest.fixture
def folder(cache, tmp_path):
    return shutil.copytree(images_folder(cache), tmp_path / "pictures")


def png(colour=(255, 0, 0), size=(5, 4), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def stored(count):
    return [{"bytes": png((i, 0, 0)), "path": None} for i in range(count)]


def test_accuracy_is_scikit_learns_at_any_batch_size_and_training_learns(task):
    model, rows = task.model(), task.train_rows()
    before = evaluate(model, task, task.eval_sets("test"), 8)["generated"]
    stepper = wrap(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "tram_x",
        noise_site=task.noise_site,
    )
    for step in range(12):
        report = stepper.step(
            [task.collate(rows[16 * step % 64 :][:16])], task.forward, task.counts
        )
    assert float(report.distance) > 0
    (name, test), *_ = task.eval_sets("test").items()
    with torch.no_grad():
        logits = [task.forward(model.eval(), task.collate([row])).logits for row in test]
    expected = accuracy_score([row[1] for row in test], torch.cat(logits).argmax(-1).tolist())
    for batch in (1, 7, 24):
        assert evaluate(model, task, {name: test}, batch)[name]["accuracy"] == expected
    assert expected > before["accuracy"]


def test_forward_counts_what_counts_says(task):
    batch = task.collate(task.train_rows()[:3])
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["pixel_values"].abs().max() <= 1
    output = task.forward(task.model(), batch)
    assert output.logits.shape == (3, 4) and task.counts(batch) == (3, 3) == (
        output.count,
        output.rows,
    )


def test_a_row_is_the_same_each_time_and_in_a_copy(task, folder, recipe_for):
    copy = build(recipe_for(data=str(folder)))
    for index in (0, 5, -1):
        first, again, other = (t.collate([t.train_rows()[index]]) for t in (task, task, copy))
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        assert torch.equal(first["pixel_values"], other["pixel_values"])
    assert copy.data_digest() == task.data_digest() and copy.eval_domains == ["pictures"]
    assert copy.contents().keys() == set(task.read) and {
        split: list(found.values()) for split, found in copy.contents().items()
    } == {split: list(found.values()) for split, found in task.contents().items()}


def test_images_of_any_mode_become_rgb_of_the_models_size(tmp_path, recipe_for):
    content = [
        png(7, mode="L"),
        png((1, 2, 3, 4), mode="RGBA"),
        png(1, mode="1"),
        png((9, 9, 9), size=(50, 3)),
    ]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", {"image": content, "label": [0, 1, 2, 0]}, {})
    task = build(recipe_for(data=str(tmp_path)))
    assert task.collate(task.train_rows()[:]).get("pixel_values").shape == (4, 3, 16, 16)
    assert task.source.classes == ["0", "1", "2"]


def test_text_labels_are_numbered_in_lexicographic_order(tmp_path, recipe_for):
    labels = [str(number) for number in (2, 1, 10, 100, 11, 1)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}-0.parquet", {"image": stored(6), "label": labels}, {})
    task = build(recipe_for(data=str(tmp_path)))
    assert task.source.classes == ["1", "10", "100", "11", "2"]
    assert [row[1] for row in task.train_rows()[:]] == [4, 0, 1, 2, 3, 0]
    assert task.model().config.id2label[1] == "10"


def small(monkeypatch, data, classes, rows):
    """The table's row for `data` with the sizes of a small copy."""
    known = dataclasses.replace(images.IMAGE_SETS[data], classes=classes, rows=rows)
    monkeypatch.setitem(images.IMAGE_SETS, data, known)
    return known


# as on the hub: data set, image column, label column, other columns, files of train and of test
LAYOUTS = [
    ("uoft-cs/cifar100", "img", "fine_label", "coarse_label", "cifar100/{}-00000-of-00001.parquet"),
    (
        "Multimodal-Fatima/StanfordCars_train",
        "image",
        "label",
        "blip_caption",
        "data/{}-00000-of-00001-0123abcd.parquet",
    ),
    ("nelorth/oxford-flowers", "image", "label", None, "data/{}-00000-of-00001-4567cdef.parquet"),
]


@pytest.mark.parametrize("data, image, label, other, file", LAYOUTS)
def test_the_hubs_layouts(
    offline_hub,  # noqa: F811
    monkeypatch,
    tmp_path,
    recipe_for,
    data,
    image,
    label,
    other,
    file,
):
    known = small(monkeypatch, data, 3, {"train": 6, "test": 3})
    for split, count in known.rows.items():
        columns = {image: stored(count), label: [i % 3 for i in range(count)]} | (
            {other: [0] * count} if other else {}
        )
        write(tmp_path / f"{split}.parquet", columns, {label: ["1", "10", "2"]})
        put_in_hub_cache(
            offline_hub,
            known.repositories[split],
            {file.format(split): tmp_path / f"{split}.parquet"},
        )
    task = build(recipe_for(data=data))
    assert (len(task.train_rows()), len(task.eval_sets("test")[known.name])) == (6, 3)
    assert task.source.classes == ["1", "10", "2"] and task.model().config.num_labels == 3
    small(monkeypatch, data, 4, known.rows)
    with pytest.raises(DataError, match="3 classes found, 4 expected"):
        build(recipe_for(data=data))


def test_two_generations_of_shards_are_refused(offline_hub, monkeypatch, tmp_path, recipe_for):  # noqa: F811
    data = "Multimodal-Fatima/StanfordCars_train"
    small(monkeypatch, data, 2, {"train": 4, "test": 2})
    write(
        tmp_path / "a.parquet", {"image": stored(4), "label": [0, 1, 0, 1]}, {"label": ["a", "b"]}
    )
    names = [f"data/train-00000-of-00001-{generation}.parquet" for generation in ("0011", "2233")]
    put_in_hub_cache(offline_hub, data, dict.fromkeys(names, tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"has 8 rows, 4 expected.*two generations.*task\.revision"):
        build(recipe_for(data=data))


def test_the_table_is_the_papers():
    sizes = {
        known.name: (known.classes, *known.rows.values()) for known in images.IMAGE_SETS.values()
    }
    assert sizes == {
        "cifar100": (100, 50_000, 10_000),
        "cars": (196, 8_144, 8_041),
        "flowers": (102, 7_169, 1_020),
    }


def test_revisions_of_two_repositories(monkeypatch):
    asked = []

    def hub_files(repo, pattern, revision, _):
        asked.append((repo.rpartition("_")[2], revision))
        raise DataError("stop")

    monkeypatch.setattr(images, "hub_files", hub_files)
    source = images.ImageSource.__new__(images.ImageSource)
    for revision in (None, "abc", "abc,def"):
        with pytest.raises(DataError, match="stop"):
            source.__init__("Multimodal-Fatima/StanfordCars_train", None, revision)
        with pytest.raises(DataError, match="stop"):
            source.open("test")
    assert [revision for _, revision in asked] == [None, None, "abc", "abc", "abc", "def"]
    assert [repo for repo, _ in asked] == ["train", "test"] * 3


@pytest.mark.parametrize(
    "columns, names, message",
    [
        ({"image": stored(2), "label": [0, 9]}, None, "row 1 has label 9, outside 0 to 3"),
        ({"image": stored(2), "label": [0, -1]}, None, "row 1 has label -1, outside"),
        ({"image": stored(2), "label": ["x", "y"]}, None, "label 'x' is not among the 4 classes"),
        ({"image": stored(2), "label": [None, 1]}, None, "row 0 has no label"),
        ({"picture": ["a"], "label": [0]}, None, "one image column.*it has picture, label"),
        ({"image": stored(1), "kind": [0]}, None, "a label column.*it has image, kind"),
    ],
)
def test_wrong_tables_are_refused_before_any_weight(
    folder, recipe_for, monkeypatch, columns, names, message
):
    write(folder / "test-00000-of-00001.parquet", columns, {"label": names} if names else {})
    monkeypatch.setattr(
        "tram_ds.tasks.image_classification.load_model", lambda *_, **__: pytest.fail("model built")
    )
    with pytest.raises(DataError, match=message):
        build(recipe_for(data=str(folder)))


@pytest.mark.parametrize(
    "image, message",
    [
        ({"bytes": b"no picture", "path": None}, "row 0 cannot be decoded"),
        ({"bytes": None, "path": "a.png"}, r"row 0 \(a.png\) names a file"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(folder, recipe_for, image, message):
    write(
        folder / "test-00000-of-00001.parquet", {"image": [image, *stored(1)], "label": [0, 1]}, {}
    )
    with pytest.raises(DataError, match=message):  # before any weight, and again from the cache
        build(recipe_for(data=str(folder)))
    with pytest.raises(DataError, match=message):
        build(recipe_for(data=str(folder)), training=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"data": "uoft-cs/cifar10"},
            "'uoft-cs/cifar10' is neither 'generated', one of uoft-cs/cifar100",
        ),
        ({"train": "cats"}, "task.train cats: task.data generated is one data set, 'generated'"),
        (
            {"evaluation": {"every_steps": 5}},
            "no validation split; it has train, test: remove eval.every_steps",
        ),
        ({"revision": "abc"}, "revision abc is for data on the hub"),
        ({"model": {"path": "/no/such/folder"}}, "model.path /no/such/folder: there is no such"),
    ],
)
def test_wrong_recipes_are_refused(recipe_for, change, message):
    with pytest.raises(DataError, match=message):
        build(recipe_for(**change))


def test_a_folder_without_images_is_refused(recipe_for, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"has no images: expected .*found notes\.txt"):
        build(recipe_for(data=str(tmp_path)))


def test_a_path_brings_its_processor_and_gets_a_new_head(task, recipe_for, folder, tmp_path):
    task.model().save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        build(recipe_for(model={"path": str(tmp_path / "model")}))
    task.processor.save_pretrained(tmp_path / "model")
    again = build(recipe_for(model={"path": str(tmp_path / "model")}))
    assert again.model().new_weights == [] and again.processor.size == task.processor.size
    labels = {"label": ["a", "b"]}
    for split in ("train", "test"):
        write(
            folder / f"{split}-00000-of-00001.parquet",
            {"image": stored(2), "label": [0, 1]},
            labels,
        )
    other = build(recipe_for(data=str(folder), model={"path": str(tmp_path / "model")})).model()
    assert (
        other.new_weights == ["classifier.bias", "classifier.weight"]
        and other.config.num_labels == 2
    )
    again.processor.size = {"height": 8, "width": 8}
    again.processor.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="makes 8 pixels a side but the model takes 16"):
        build(recipe_for(model={"path": str(tmp_path / "model")}))


def test_real_images_train_on_a_folder(recipe_for):
    root = os.environ.get("TRAM_DS_DATA", "")
    if not os.path.isdir(os.path.join(root, "cifar10_sample")):
        pytest.skip("TRAM_DS_DATA does not point at a folder with cifar10_sample")
    task = build(
        recipe_for(
            data=os.path.join(root, "cifar10_sample"),
            model={"init": VIT | {"image_size": 32, "patch_size": 8}},
        )
    )
    assert (
        task.source.classes[3] == "cat"
        and len(task.train_rows()) == 1000
        and task.train_domains == ["cifar10_sample"]
    )
    model = task.model()
    stepper = wrap(
        model, torch.optim.AdamW(model.parameters(), lr=2e-3), "tram_x", noise_site=task.noise_site
    )
    rows = task.train_rows()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(30):
        batch = task.collate([rows[i] for i in order[32 * step % 992 :][:32]])
        stepper.step([batch], task.forward, task.counts)
    accuracy = evaluate(model, task, task.eval_sets("test"), 100)["cifar10_sample"]["accuracy"]
    assert accuracy > 0.13  # chance is 0.1


def test_classes_are_mapped_by_their_names(tmp_path, recipe_for):
    """Train calls 0, 1, 2 a, b, c; test calls them c, a, b: 0, 1, 2 there are 2, 0, 1 here."""
    write(
        tmp_path / "train.parquet",
        {"image": stored(3), "label": [0, 1, 2]},
        {"label": ["a", "b", "c"]},
    )
    write(
        tmp_path / "test.parquet",
        {"image": stored(3), "label": [0, 1, 2]},
        {"label": ["c", "a", "b"]},
    )
    rows = build(recipe_for(data=str(tmp_path))).eval_sets("test")[tmp_path.name]
    assert [label for _, label in rows] == [2, 0, 1]
    write(tmp_path / "test.parquet", {"image": stored(2), "label": [0, 1]}, {"label": ["c", "a"]})
    rows = build(recipe_for(data=str(tmp_path))).eval_sets("test")[tmp_path.name]
    assert [label for _, label in rows] == [2, 0]  # a class that is missing moves no other
    write(tmp_path / "test.parquet", {"image": stored(1), "label": [0]}, {"label": ["d"]})
    with pytest.raises(DataError, match="called d, those of the train split a, b, c"):
        build(recipe_for(data=str(tmp_path)))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"label": ["cat", "dog"]}, {"label": [0, 1]}, "numbers without names.* texts cat, dog"),
        ({"label": ["cat", "cat "]}, {"label": ["cat", "cat"]}, "look the same: 'cat' and 'cat '"),
        (
            {"label": [0, 1], "fine_label": [1, 0]},
            {"fine_label": [0, 1]},
            "test.parquet has no column label, which the train split's labels are in",
        ),
    ],
)
def test_labels_of_another_kind_or_column_are_refused(tmp_path, recipe_for, train, test, message):
    write(tmp_path / "train.parquet", {"image": stored(2), **train}, {})
    write(tmp_path / "test.parquet", {"image": stored(2), **test}, {})
    with pytest.raises(DataError, match=message):
        build(recipe_for(data=str(tmp_path)))


def test_the_column_of_the_train_labels_is_the_one_that_is_scored(tmp_path, recipe_for):
    write(tmp_path / "train.parquet", {"image": stored(2), "fine_label": [0, 1]}, {})
    both = {"label": [0, 0], "fine_label": [1, 0]}
    write(tmp_path / "test.parquet", {"image": stored(2), **both}, {})
    rows = build(recipe_for(data=str(tmp_path))).eval_sets("test")[tmp_path.name]
    assert [label for _, label in rows] == [1, 0]


def test_two_classes_of_one_name_are_refused(tmp_path, recipe_for):
    rows, names = {"image": stored(2), "label": [0, 1]}, {"label": ["a", "a"]}
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", rows, names)
    with pytest.raises(DataError, match="two of its classes have one name, of a, a"):
        build(recipe_for(data=str(tmp_path)))


def test_shards_that_number_their_classes_differently_are_refused(tmp_path, recipe_for):
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        file = tmp_path / f"train-{number:05}-of-00002.parquet"
        write(file, {"image": stored(2), "label": [0, 1]}, {"label": names})
    write(tmp_path / "test.parquet", {"image": stored(1), "label": [0]}, {"label": ["a", "b"]})
    with pytest.raises(DataError, match=r"called b, a in .*but a, b in .*number them alike"):
        build(recipe_for(data=str(tmp_path)))


def test_a_set_of_parts_that_is_not_whole_is_named(tmp_path, recipe_for):
    for split, number, total in (("train", 0, 3), ("train", 2, 3), ("test", 0, 1)):
        file = tmp_path / f"{split}-{number:05}-of-{total:05}.parquet"
        write(file, {"image": stored(2), "label": [0, 1]}, {})
    with pytest.raises(DataError, match="lacks part 1 of 3"):
        build(recipe_for(data=str(tmp_path)))
    write(tmp_path / "train-00001-of-00003.parquet", {"image": stored(2), "label": [0, 1]}, {})
    assert len(build(recipe_for(data=str(tmp_path))).train_rows()) == 6
    write(tmp_path / "train-00000-of-00001.parquet", {"image": stored(2), "label": [0, 1]}, {})
    with pytest.raises(DataError, match="more than one set of parts"):
        build(recipe_for(data=str(tmp_path)))
