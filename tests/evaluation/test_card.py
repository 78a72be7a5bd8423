"""The card beside an export: what it says, that its lines load what they stand beside, and that one
which a person has changed is theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint.adapter_export import add_merged, export_adapter
from tram_ds.evaluation import card, card_facts
from tram_ds.evaluation.card_loading import KINDS
from tram_ds.models.pretrained import load_base, load_model
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import LoraSection, ModelSection
from tram_ds.recipe.recipe import Recipe
from tram_ds.recipe.task_section import task_names
from tram_ds.runtime import run_folder
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.signed import is_signed, signed

FACTS = {
    "base_model": "FacebookAI/xlm-roberta-base",
    "base_license": {"license": "mit"},
    "datasets": ["facebook/xnli"],
    "data_digest": "ab" * 32,
    "num_labels": 3,
    "world_size": 8,
    "device": "cuda",
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0"},
}
RESULTS: dict[str, Any] = {
    "train_domains": ["en"],
    "selected": {"step": 40, "validation_loss": 0.25},
    "trained": FACTS,
    "stopped_early": {"step": 60, "of": 100, "why": "no gain"},
    "scores": {
        "test": {"en": {"loss": 0.5, "accuracy": 0.8125}, "sw|x": {"loss": 1.0, "accuracy": 0.5}}
    },
    "zero_shot_average": {"test": {"loss": 1.0, "accuracy": 0.5}},
    "initial": {"test": {"en": {"loss": 1.1, "accuracy": 0.33}, "sw|x": {"accuracy": None}}},
    "warnings": ["the radius is small"],
}


def recipe(*words: str) -> Recipe:
    return load("xnli_xlmr", ["algorithm=tram_x", "train.seed=3", *words])


def text(chosen: Recipe, results: dict[str, Any] = RESULTS, **kind: Any) -> str:
    return card.text(chosen, results, **{"whole": True, "adapter": None, **kind})


def test_the_hub_reads_base_licence_data_and_language_from_it() -> None:
    found = ModelCard(text(recipe())).data
    assert found.to_dict() == {
        "base_model": "FacebookAI/xlm-roberta-base",
        "datasets": ["facebook/xnli"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-classification",
        "tags": ["tram_ds", "tram_x"],
    }


def test_scores_digest_and_how_it_was_trained_are_in_it() -> None:
    page = text(recipe("optimizer.lr=2e-5"))
    assert "# xnli_xlmr-tram_x-3\n" in page
    table = page[page.index("| domain") :].split("\n\n")[0]
    assert table.splitlines() == [
        "| domain | before | after |",
        "|---|---:|---:|",
        "| en (trained) | 33.0 | 81.2 |",
        "| sw\\|x | - | 50.0 |",
        "| zero-shot average |  | 50.0 |",
    ]
    for line in (
        "## Scores: accuracy on test",
        "In percent, higher is better. One run of one seed.",
        "* the radius is small",
        f"| data, sha256 | `{'ab' * 32}` |",
        "| licence of the base | mit, as its own files name it |",
        "| weights | of step 40, validation_loss 0.2500 |",
        "| ended early | at step 60 of 100: no gain |",
        "| optimizer | adam, lr 2e-05 |",
        "| ranks | 8 (cuda), engine zero |",
        "| commit of tram_ds | c0ffee |",
        "  title     = {{TRAM}: Bridging Trust Regions and Sharpness Aware Minimization},",
    ):
        assert f"\n{line}\n" in page, line
    again = re.search(r"```yaml\n(.*?)\n```", page, re.DOTALL)
    assert again and "name: tram_x" in again[1] and "run_dir" not in again[1]


def test_what_is_not_known_is_left_out_and_no_path_or_secret_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    words = [f"model.path={tmp_path}/mine", f"task.data={tmp_path}/rows", "name=abcdefgh1234"]
    page = text(recipe(*words), {"train_domains": ["birds"]})
    assert str(tmp_path) not in page and "abcdefgh1234" not in page
    assert "path: mine\n" in page and "data: rows\n" in page and "The model `mine`" in page
    assert "see its own page" in page
    for word in ("sha256", "Scores", "Warnings", "None", "language:", "base_model:", "datasets:"):
        assert word not in page, word


@pytest.mark.parametrize(
    ("readme", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "{}", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [x]\n---\n",
            '{"license": "mit"}',
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("# No front matter\n", '{"license": "mit"}', {"license": "mit"}),
        ("---\n{not yaml: [\n---\n", "not json", {}),
        (None, '{"license": ["mit"]}', {}),
    ],
)
def test_the_licence_is_the_one_that_the_base_itself_names(
    tmp_path: Path, readme: str | None, config: str, expected: dict[str, str]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    (tmp_path / "config.json").write_text(config)
    assert card_facts.licence(str(tmp_path), None) == expected


def test_of_a_hubs_model_the_cache_is_asked_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []

    def cached(path: str, name: str, revision: str | None = None) -> str | None:
        asked.append((path, name, revision))
        return str(tmp_path / name) if path == "a/b" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert card_facts.licence("a/b", "v1") == {"license": "mit"}
    assert card_facts.licence("a/c", None) == {}
    assert asked == [
        ("a/b", "README.md", "v1"),
        ("a/c", "README.md", None),
        ("a/c", "config.json", None),
    ]


def test_a_card_is_replaced_and_one_that_was_changed_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = tmp_path, tmp_path / "export"
    export.mkdir()
    (export / "config.json").touch()
    page = export / "README.md"
    card.write(export, recipe(), {})
    first = page.read_text()
    card.write(export, recipe(), RESULTS)
    assert page.read_text() != first and is_signed(page) and list(export.glob(".*")) == []
    assert run_folder.strangers(run) == []
    page.write_text(page.read_text().replace("accuracy", "precision"))
    changed = page.read_text()
    card.write(export, recipe(), RESULTS)
    assert page.read_text() == changed and f"{page} was written by" in capsys.readouterr().out
    assert run_folder.strangers(run) == ["export/README.md"]
    run_folder.discard_export(export)
    assert page.read_text() == changed, "nor is it removed"
    page.write_text(first)
    run_folder.discard_export(export)
    assert not export.exists()


def test_every_task_has_lines_that_load_its_models() -> None:
    assert KINDS.keys() == set(task_names())
    for kind in KINDS.values():
        assert hasattr(transformers, kind.model) and hasattr(transformers, kind.beside)


def test_a_signature_holds_for_its_text_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, holds in (
        (signed("a\n"), True),
        (signed(signed("a")), True),
        (signed("a") + "b\n", False),
        ("b" + signed("a"), False),
        ("a\n", False),
    ):
        file.write_text(content)
        assert is_signed(file) == holds
    assert not is_signed(tmp_path / "none")


def test_its_lines_load_the_model_and_the_adapters(tmp_path: Path) -> None:
    """Of a base with a name of the hub's: here, a folder stands for it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from tests.models.test_adapters import filled, section

    kind = transformers.AutoModelForCausalLM
    base, export = tmp_path / "base", tmp_path / "export"
    load_base(kind, section()).save_pretrained(base)
    model = filled(load_model(kind, section(base)))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = wrap(model, torch.optim.SGD(trained, lr=0.1), "base").engine
    chosen = load("llama_lora", ["model.path=owner/base"])
    facts = {"trained": {"base_model": "owner/base"}}
    beside = card.Beside(None, chosen, lambda: facts)
    export_adapter(engine, export, Peers(1), beside)
    cards = {"README.md": "FOLDER/adapter", "adapter/README.md": "FOLDER"}
    for name, folder in cards.items():
        page = ModelCard.load(export / name)
        assert page.data["library_name"] == "peft" and f'(base, "{folder}")' in page.text
    add_merged(export, load_base(kind, section(base)), companion=beside)
    page = (export / "README.md").read_text()
    assert ModelCard(page).data["library_name"] == "transformers"
    whole, adapters = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        for code in (whole.partition("tokenizer =")[0], adapters):
            code = code.replace('"owner/base"', f'"{base}"').replace('"FOLDER', f'"{export}')
            there: dict[str, Any] = {}
            exec(code, there)
            found = there["model"].eval()(input_ids=ids).logits
            torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert isinstance(there["model"], peft.PeftModel)


def test_a_classifiers_lines_load_its_head_with_the_adapters(tmp_path: Path) -> None:
    """On a base that has none."""
    pytest.importorskip("peft", reason="peft is not installed")
    from tests.models.test_adapters import filled

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11}
    config = transformers.AutoConfig.for_model("xlm-roberta", intermediate_size=8, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    section = ModelSection(path=str(tmp_path / "base"), lora=LoraSection(r=2))
    kind = transformers.AutoModelForSequenceClassification
    model: Any = filled(load_model(kind, section, new_head=True, num_labels=3))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = wrap(model, torch.optim.SGD(trained, lr=0.1), "base").engine
    facts = {"trained": {"base_model": "owner/base", "num_labels": 3}}
    beside = card.Beside(None, recipe("model={path: owner/base, lora: {r: 2}}"), lambda: facts)
    export_adapter(engine, tmp_path / "export", Peers(1), beside)
    page = (tmp_path / "export/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("owner/base", str(tmp_path / "base"))
    there: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(tmp_path / "export")), there)
    ids = torch.arange(2, 10).view(2, 4)
    with torch.no_grad():
        want, found = (m.eval()(input_ids=ids).logits for m in (model, there["model"]))
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
