"""`tram export`: a run of adapters as a folder of adapters and as a merged model, which every other
command takes; a whole model in another dtype; the hub by a stand-in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.hub_server import serving
from tests.integration.test_own_data import RECIPE, notes, train
from tests.ranks import ROOT, free_port, script
from tram_ds.cli import main as tram
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import dump
from tram_ds.runtime import hub
from tram_ds.tasks import choose

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.integration

IDS = torch.arange(16).view(2, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a model whose card names its licence; `run`, adapters trained on it; `whole`, a run
    as if without adapters."""
    place = tmp_path_factory.mktemp("place")
    notes(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("tiny.yaml").write_text(RECIPE)
        task = choose.build(load("tiny.yaml", ["task.cache_dir=cache"]))
        task.model().save_pretrained(place / "base")
        task.tokenizer.save_pretrained(place / "base")
        (place / "base/README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
        words = ["model={path: base, lora: {r: 2, merge: false}}", "optimizer.lr=0.05"]
        done = train(place, *words, "train.steps=3", "algorithm=sam", "run_dir=run")
        assert done.returncode == 0, done.stderr[-3000:]
        assert tram.main(["export", "run", "--merge", "--out", "whole/export"]) == 0
        shutil.copy("run/results.json", "whole/results.json")
        recipe = load("run/recipe.yaml", ["model.lora=null"])
        Path("whole/recipe.yaml").write_text(dump(recipe))
    return place


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def export(*words: str) -> int:
    return tram.main(["export", *words])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def names(folder: str) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_adapters_are_handed_on_in_pefts_format_and_merged_they_are_the_model() -> None:
    assert export("run", "--out", "adapters") == 0
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert names("adapters") - own == {n for n in names("base") if n.startswith("tokenizer")}
    bare = AutoModelForCausalLM.from_pretrained("base")
    start = logits(bare)
    want = logits(peft.PeftModel.from_pretrained(bare, "adapters"))
    assert (want - start).abs().max() > 1e-3, "the adapters do something"
    found = logits(AutoModelForCausalLM.from_pretrained("whole/export"))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert not any("adapter" in name for name in names("whole/export"))
    kinds = {"adapters": "peft", "whole/export": "transformers", "run/export": "peft"}
    for folder, library in kinds.items():
        card = ModelCard.load(Path(folder, "README.md"))
        assert (card.data.license, card.data.library_name) == ("cc-by-4.0", library), folder
        trained = json.loads(Path("run/results.json").read_text())["trained"]
        assert trained["contents"].keys() >= {"train", "test"}
        assert trained["data_digest"] in card.text and "## Scores: perplexity on test" in card.text


def test_a_merged_export_is_a_model_to_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Its scores are those of the run, measured with the adapters beside the weights; the line from
    the base to it begins at the base."""
    common = ["evaluate", "--recipe", "run/recipe.yaml", "--model", "whole/export"]
    assert tram.main([*common, "--out", "line.json", "--interpolate", "0,0.5,1"]) == 0
    base, at_0, middle, at_1 = json.loads(Path("line.json").read_text())["models"]
    assert at_0["scores"] == base["scores"] and middle["scores"] != base["scores"]
    assert tram.main([*common, "--out", "one.json", "--no-pretrained"]) == 0
    (one,) = json.loads(Path("one.json").read_text())["models"]
    assert one["scores"] == at_1["scores"]
    scores = json.loads(Path("run/results.json").read_text())["scores"]["test"]
    for domain, found in scores.items():
        assert one["scores"][domain]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    words = ["--recipe", "run/recipe.yaml", "--export", "whole/export", "--what", "sharpness"]
    words += ["--rows", "8", "--domains", "birds", "run_dir=looked"]
    done = script(ROOT / "launch/analyze.py", *words, cwd=Path.cwd())
    assert done.returncode == 0 and "birds" in done.stdout, done.stderr[-3000:]


def test_a_whole_model_is_copied_bit_for_bit_or_rounded_once() -> None:
    assert export("whole", "--out", "same") == 0
    assert names("same") == names("whole/export")
    for name in names("same") - {"README.md"}:
        assert Path("same", name).read_bytes() == Path("whole/export", name).read_bytes()
    assert export("whole", "--out", "half", "--dtype", "bfloat16") == 0
    assert names("half") == names("same")
    stored = load_file("same/model.safetensors")
    for name, tensor in load_file("half/model.safetensors").items():
        assert torch.equal(tensor, stored[name].bfloat16()), name
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_card_that_a_person_has_changed_goes_along(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("whole", "mine")
    Path("mine/export/README.md").write_text("# My model\n")
    Path("mine/export/notes.txt").write_text("for me alone")
    assert export("mine", "--out", "theirs") == 0
    assert Path("theirs/README.md").read_text() == "# My model\n"
    assert not Path("theirs/notes.txt").exists()
    assert "README.md was written by somebody else" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base", "--out", "x"], "base is not the folder of a run that has ended"),
        (["run", "--out", "base"], "--out base is there already, and is not an empty folder"),
        (["run", "--out", "run/mine"], "--out run/mine is in the run's folder"),
        (["whole", "--out", "x", "--merge"], "was trained without adapters"),
        (["run", "--out", "x", "--dtype", "bfloat16"], "leave --dtype out, or add --merge"),
        (["run", "--out", "x", "--push", "a/b/c"], "give OWNER/NAME"),
        (["run", "--out", "x", "--push", "me/it"], "no token of the hub"),
        (["run", "--out", "tiny.yaml/x"], "--out tiny.yaml/x"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert export(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not Path("x").exists()


def test_without_a_network_nothing_is_merged_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    for offline, said in (("0", "does not answer"), ("1", "HF_HUB_OFFLINE is set")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert export("run", "--merge", "--out", "x", "--push", "me/it") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "hf upload" in line and not Path("x").exists()


def test_a_dry_run_names_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["whole", "--out", "dry", "--push", "me/it"]
    assert export(*words, "--dry-run") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "would be written to dry, uploaded to me/it:" and not Path("dry").exists()
    assert {line.split()[0] for line in lines} == names("whole/export")
    assert export("run", "--merge", "--out", "dry", "--dry-run") == 0
    assert "config.json, model*.safetensors  merged, in float32" in capsys.readouterr().out


def test_an_upload_is_one_commit_of_the_folder_which_stays_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the hub's own client, to a server that stands for the hub."""
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        assert export("run", "--out", "pushed", "--push", "me/it") == 0
        assert f"uploaded: {server.address}/me/it" in capsys.readouterr().out
        (made,) = server.made
        assert made == {"name": "it", "organization": "me", "visibility": "private"}
        (sent,) = server.commits
        assert sent == {name: Path("pushed", name).read_bytes() for name in names("pushed")}
        server.answers = 401
        assert export("run", "--out", "failed", "--push", "me/it") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "401" in line
        assert "failed is whole: try again with `hf upload me/it failed`" in line
        assert names("failed") == names("pushed") and len(server.commits) == 1


def test_adapters_alone_are_no_model_to_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--recipe", "run/recipe.yaml", "--no-pretrained", "--model"]
    assert tram.main([*words, "run"]) == 2
    assert "holds adapters alone" in capsys.readouterr().err
