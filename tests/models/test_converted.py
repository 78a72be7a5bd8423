"""Weights that are there as pickles alone are written once as safetensors into the cache, and what
is read from there is what whole loading gives."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tram_ds.models import converted
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.models.stored import Stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.errors import DataError

TINY = {"vocab_size": 31, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
ONE, PARTS = "pytorch_model.bin", "pytorch_model-{:05d}-of-00002.bin"
TIED = "lm_head.weight"


def model(tied: bool = True) -> Any:
    config = AutoConfig.for_model(
        "gpt2", **TINY, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoModelForCausalLM.from_config(config)


def single(folder: Path, of: Any, **options: Any) -> None:
    of.config.save_pretrained(folder)
    torch.save(of.state_dict(), folder / ONE, **options)


def in_parts(folder: Path, of: Any, first: set[str] | None = None) -> None:
    """The embedding in the one, the tied head in the other, as the hub has many."""
    of.config.save_pretrained(folder)
    state, where = of.state_dict(), {}
    first = first or {name for name in state if "wte" in name or "ln_f" in name}
    for number, mine in enumerate((first, state.keys() - first), start=1):
        torch.save({name: state[name] for name in sorted(mine)}, folder / PARTS.format(number))
        where |= dict.fromkeys(mine, PARTS.format(number))
    (folder / f"{ONE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def load(folder: Path, cache: Path, way: Callable[..., Any] = load_stored) -> Any:
    return way(AutoModelForCausalLM, ModelSection(path=str(folder)), cache_dir=str(cache))


def digest(of: Any) -> str:
    """sha256 of the parameters' names and values, whether they are in memory or in files."""
    found = hashlib.sha256()
    for name, parameter in of.named_parameters():
        values = parameter.detach()
        if values.is_meta:
            values = torch.empty(parameter.numel())
            of.stored.read(name, 0, values)
        found.update(name.encode() + values.flatten().numpy().tobytes())
    return found.hexdigest()


def copies(cache: Path) -> list[Path]:
    return sorted(p for p in (cache / "models").iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("save", [single, in_parts])
def test_the_copy_is_what_whole_loading_and_safetensors_give(
    tmp_path: Path, capsys: Any, save: Any, tied: bool, dtype: torch.dtype
) -> None:
    of = model(tied).to(dtype)
    (tmp_path / "bin").mkdir()
    save(tmp_path / "bin", of)
    of.save_pretrained(tmp_path / "safetensors")
    there = sorted(p.name for p in (tmp_path / "bin").iterdir())
    capsys.readouterr()
    left = load(tmp_path / "bin", tmp_path / "cache")
    assert all(p.is_meta for p in left.parameters()) and not hasattr(left, "loaded_whole")
    whole = load(tmp_path / "bin", tmp_path / "cache", load_model)
    other = load(tmp_path / "safetensors", tmp_path / "cache")
    assert digest(left) == digest(other) == digest(whole)
    assert (left.lm_head.weight is left.transformer.wte.weight) == tied
    (copy,) = copies(tmp_path / "cache")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"'{tmp_path / 'bin'}' has its weights as pickles alone")
    assert line.endswith(f"into {copy}")
    assert sorted(p.name for p in (tmp_path / "bin").iterdir()) == there, "the model's folder"
    again = load(tmp_path / "bin", tmp_path / "cache")
    assert digest(again) == digest(left) and capsys.readouterr().out == ""


def test_tied_weights_are_in_the_copy_once(tmp_path: Path) -> None:
    single(tmp_path, model())
    load(tmp_path, tmp_path / "cache")
    (copy,) = copies(tmp_path / "cache")
    with safe_open(copy / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == model().state_dict().keys() - {TIED}
    assert json.loads((copy / converted.ALIKE).read_text()) == {TIED: "transformer.wte.weight"}


def test_a_model_saved_tied_that_its_config_unties_keeps_both(tmp_path: Path) -> None:
    """What shares memory in the file is one tensor of the copy, and two parameters of the model."""
    single(tmp_path, model())
    model(tied=False).config.save_pretrained(tmp_path)
    left = load(tmp_path, tmp_path / "cache")
    assert left.lm_head.weight is not left.transformer.wte.weight
    assert digest(left) == digest(load(tmp_path, tmp_path / "cache", load_model))


def test_views_of_one_memory_transposes_and_the_older_format(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float64).view(6, 10)
    state = {
        "part": whole[1:3],
        "turned": whole.t(),
        "whole": whole,
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    for archive in (True, False):
        torch.save(state, tmp_path / ONE, _use_new_zipfile_serialization=archive)
        found: Any = converted.entries(str(tmp_path), "main", tmp_path / f"cache {archive}")
        assert found is not None and found.keys() == state.keys()
        for name, values in state.items():
            with safe_open(found[name].file, "pt") as file:
                got = file.get_tensor(found[name].key)
            assert got.dtype == values.dtype and torch.equal(got, values), name


def test_another_content_of_the_same_size_is_another_copy(tmp_path: Path) -> None:
    of = model()
    single(tmp_path, of)
    before = digest(load(tmp_path, tmp_path / "cache"))
    stat = (tmp_path / ONE).stat()
    with torch.no_grad():
        of.transformer.wte.weight.add_(1)
    single(tmp_path, of)
    os.utime(tmp_path / ONE, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (tmp_path / ONE).stat().st_size == stat.st_size
    assert digest(load(tmp_path, tmp_path / "cache")) == digest(of) != before
    assert len(copies(tmp_path / "cache")) == 2
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=lambda *_: ["cache", "elsewhere"])
    load(tmp_path / "elsewhere", tmp_path / "cache")
    assert len(copies(tmp_path / "cache")) == 2, "the same content elsewhere is the same copy"


def test_a_copy_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    single(tmp_path, model())
    first = digest(load(tmp_path, tmp_path / "cache"))
    (copy,) = copies(tmp_path / "cache")
    os.truncate(copy / "model.safetensors", 1000)
    assert digest(load(tmp_path, tmp_path / "cache")) == first


def in_fork(action: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    return process


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: Any
) -> None:
    in_parts(tmp_path, model())
    save = converted.save_file

    def save_one_and_die(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(converted, "save_file", save_one_and_die)
    killed = in_fork(lambda: load(tmp_path, tmp_path / "cache"))
    killed.join(60)
    monkeypatch.undo()
    assert killed.exitcode == -signal.SIGKILL and copies(tmp_path / "cache") == []
    left = [p for p in (tmp_path / "cache/models").iterdir() if p.is_dir()]
    assert len(left) == 1, "what it had written"
    assert digest(load(tmp_path, tmp_path / "cache")) == digest(model())
    assert not left[0].exists() and len(copies(tmp_path / "cache")) == 1


def test_of_processes_at_once_one_converts(tmp_path: Path, monkeypatch: Any) -> None:
    in_parts(tmp_path, model())
    save, context = converted.save_file, multiprocessing.get_context("fork")
    begin, done = context.Barrier(3), context.Queue()

    def counted(tensors: Any, path: Path, metadata: Any) -> None:
        done.put(path.name)
        save(tensors, path, metadata)

    def job() -> None:
        begin.wait(60)
        done.put(digest(load(tmp_path, tmp_path / "cache")))

    monkeypatch.setattr(converted, "save_file", counted)
    jobs = [in_fork(job) for _ in range(3)]
    found = [done.get(timeout=60) for _ in range(5)]
    for each in jobs:
        each.join(60)
    assert [each.exitcode for each in jobs] == [0, 0, 0]
    written = [name for name in found if name.endswith(".safetensors")]
    assert sorted(written) == [PARTS.format(n).replace(".bin", ".safetensors") for n in (1, 2)]
    assert [name for name in found if name not in written] == [digest(model())] * 3


def no_room(monkeypatch: Any) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(converted.shutil, "disk_usage", lambda _: full)


def fills_up(monkeypatch: Any) -> None:
    """As a quota, which is not seen before: the kernel refuses to go on at 2 kB."""
    save = converted.save_file

    def limited(*arguments: Any) -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most[1]))
        try:
            save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)

    monkeypatch.setattr(converted, "save_file", limited)


@pytest.mark.parametrize(
    "refuse, says",
    [
        (no_room, f"{os.strerror(errno.ENOSPC)}.*free some space there.*task.cache_dir to another"),
        (fills_up, "File too large.*make room there, give task.cache_dir"),
    ],
    ids=["no room", "a quota"],
)
def test_no_room_is_one_line_and_what_was_there_stands(
    tmp_path: Path, monkeypatch: Any, refuse: Any, says: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, of in ((old, model()), (new, model(tied=False))):
        folder.mkdir()
        single(folder, of)
    before = digest(load(old, tmp_path / "cache"))
    refuse(monkeypatch)
    with pytest.raises(DataError, match=says) as caught:
        load(new, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert digest(load(old, tmp_path / "cache")) == before
    assert len(copies(tmp_path / "cache")) == 1
    assert not [p for p in (tmp_path / "cache/models").iterdir() if ".tmp-" in p.name]


def twice(folder: Path) -> None:
    in_parts(folder, model())
    torch.save(model().state_dict(), folder / PARTS.format(2))


def coded(folder: Path) -> None:
    codes = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"w": codes}, folder / ONE)


def laid_out_sparsely(folder: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, folder / ONE)


def complex_twice_as_wide(folder: Path) -> None:
    torch.save({"w": torch.ones(3, dtype=torch.complex128)}, folder / ONE)


def numbered(folder: Path) -> None:
    torch.save({1: torch.ones(3)}, folder / ONE)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "spoil, says",
    [
        (twice, "has transformer.* in pytorch_model-00002-of-00002.bin and in a file before it"),
        (coded, f"{ONE} holds tensors that are not numbers .* not quantised"),
        (laid_out_sparsely, f"{ONE} holds w as what no safetensors file can"),
        (complex_twice_as_wide, rf"{ONE} holds what no safetensors file can \(.*complex128"),
        (numbered, f"{ONE} holds more than a model's weights by name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, spoil: Any, says: str) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        converted.entries(str(tmp_path), "main", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert copies(tmp_path / "cache") == []


def test_tied_weights_that_differ_in_the_files_are_loaded_whole_and_said_so(
    tmp_path: Path,
) -> None:
    """transformers leaves them apart, although the config ties them."""
    of = model(tied=False)
    in_parts(tmp_path, of)
    model().config.save_pretrained(tmp_path)
    left = load(tmp_path, tmp_path / "cache")
    assert "lm_head.weight and transformer.wte.weight are tied" in left.loaded_whole
    assert left.lm_head.weight is not left.transformer.wte.weight
    assert torch.equal(left.lm_head.weight, of.lm_head.weight)
    assert digest(left) == digest(of)


def test_the_copy_is_read_without_another_in_memory(tmp_path: Path) -> None:
    """The values of an archive are mapped; of the older format they are in memory."""
    torch.save({"w": torch.ones(1 << 22)}, tmp_path / ONE)  # 16 MiB
    tensors = converted.pickled.tensors(tmp_path / ONE)
    maps = Path("/proc/self/maps").read_text()
    (mapped,) = [line for line in maps.splitlines() if line.endswith(f"{tmp_path / ONE}")]
    low, high = (int(part, 16) for part in mapped.split()[0].split("-"))
    assert low <= tensors["w"].data_ptr() < high
    found: Any = converted.entries(str(tmp_path), "main", tmp_path / "cache")
    into = torch.zeros(5)
    Stored(found, {}).read("w", 3, into)
    assert torch.equal(into, torch.ones(5))
