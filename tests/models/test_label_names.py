"""A checkpoint's classes are known by their names, in whatever order it numbers them."""

from __future__ import annotations

import pytest
from transformers import BertConfig

from tram_ds.models.label_names import numbers_by_name, set_label_names
from tram_ds.runtime.errors import DataError

NLI = ("entailment", "neutral", "contradiction")


def config(*names: str) -> BertConfig:
    return BertConfig(num_labels=len(names), id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    "names, numbers",
    [
        (NLI, [0, 1, 2]),
        (("contradiction", "neutral", "entailment"), [2, 1, 0]),  # fairseq's
        (("CONTRADICTION", "ENTAILMENT", "NEUTRAL"), [1, 2, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),  # says nothing
        (("yes", "no"), [0, 1, 2]),  # another size: the head is new
    ],
)
def test_the_models_numbers(names, numbers):
    assert numbers_by_name("m", config(*names), NLI, "data").tolist() == numbers


def test_a_fresh_model_takes_the_datas_order():
    assert numbers_by_name(None, config(*reversed(NLI)), NLI, "data").tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [("negative", "neutral", "positive"), ("a", "a", "b")])
def test_other_classes_are_refused_with_both_lists(names):
    with pytest.raises(DataError, match=f"called {', '.join(names)} .* of data {', '.join(NLI)}"):
        numbers_by_name("m", config(*names), NLI, "data")


def test_names_that_differ_in_case_alone_stay_apart():
    assert numbers_by_name("m", config("a", "A"), ["A", "a"], "data").tolist() == [1, 0]


def test_the_export_keeps_the_models_order():
    own = config("contradiction", "neutral", "entailment")
    set_label_names(own, NLI, numbers_by_name("m", own, NLI, "data"))
    assert own.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert own.label2id == {"contradiction": 0, "neutral": 1, "entailment": 2}
