"""Broken files and retention: what is refused, by which name, and what stays."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.jobs import digest, stepper, train, trained
from tram_ds.checkpoint import files
from tram_ds.checkpoint import manifest as manifests
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint.resume import Saver
from tram_ds.runtime.exits import CHECKPOINT, CheckpointError, code_of
from tram_ds.runtime.run_layout import MANIFEST

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[1]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def other_run(path: Path) -> None:
    """The manifest of another run's step 2: same model, same sizes."""
    built = stepper("single", "tram_init", 1, micros=1)
    train(built, 2, 1)
    with Saver(path.parent.parent.parent / "other", built) as saver:
        shutil.copy(saver.save() / MANIFEST, path / MANIFEST)


def relink(path: Path) -> None:
    file = shard(path)
    target = file.rename(path.parent.parent / "elsewhere")
    file.symlink_to(target)


def edit(path: Path, **changes: Any) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda p: os.truncate(shard(p), 100),
        r"00002-of-.*safetensors: has 100 bytes instead of",
    ),
    "flipped bit": (
        lambda p: flip(shard(p)),
        r"00002-of-.*safetensors: its sha256 is not the manifest's",
    ),
    "zero bytes": (
        lambda p: shard(p).write_bytes(b""),
        r"00002-of-.*safetensors: has 0 bytes instead of",
    ),
    "missing": (lambda p: shard(p).unlink(), r"00002-of-.*safetensors: missing"),
    "unlisted": (
        lambda p: shutil.copy(shard(p), p / "shard-9.safetensors"),
        r"shard-9.safetensors: is not in manifest",
    ),
    "symbolic link": (relink, r"00002-of-.*safetensors: is not a plain file"),
    "manifest of another run": (other_run, r"safetensors: (has|its sha256|missing)"),
    "manifest of another step": (
        lambda p: shutil.copy(p.parent / "step-00000001/manifest.json", p),
        r"of step 1, not of",
    ),
    "manifest truncated": (
        lambda p: os.truncate(p / MANIFEST, 50),
        r"manifest.json: cannot be read",
    ),
    "manifest edited": (lambda p: edit(p, base_steps=7), r"manifest.json: .* its own digest"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), r"manifest.json: missing"),
    "manifest climbs out": (
        lambda p: climb(p),
        r"names '\.\./\.\./x.safetensors', which is no file of a checkpoint",
    ),
}


def climb(path: Path) -> None:
    """A manifest that is consistent but names a file elsewhere, as an attacker could write it."""
    manifest = manifests.read_manifest(path)
    manifest["files"]["../../x.safetensors"] = {"size": 1, "sha256": "0"}
    reseal(path, manifest)


def reseal(path: Path, manifest: dict[str, Any]) -> None:
    edit(path, **manifest | {"digest": manifests.digest_of(manifest)})


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_and_fallback_is_a_choice(
    kind: str, run_dir: Path, template: Any
) -> None:
    damage, message = DAMAGE[kind]
    newest = checkpoint.latest(run_dir)
    assert newest is not None
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(newest)
    built, before = trained()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.resume(built, run_dir)
    assert "step-00000002" in str(caught.value) and code_of(caught.value) == CHECKPOINT
    assert digest(built) == before, "a refused load leaves the stepper alone"
    other = stepper("single", "tram_prev", 1, micros=1)
    found = checkpoint.resume(other, run_dir, fallback=True)
    assert (
        found is not None and found.path.name == "step-00000001" and digest(other) == template[1][1]
    )
    assert len(found.refused) == 1 and "step-00000002" in found.refused[0]


def test_nothing_whole_left(run_dir: Path) -> None:
    for path in checkpoint.candidates(run_dir):
        shard(path).unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000002.*step-00000001.*no earlier one is whole"
    ):
        checkpoint.resume(trained()[0], run_dir, fallback=True)


def test_after_a_fallback_the_abandoned_commit_is_set_aside(run_dir: Path) -> None:
    flip(shard(run_dir / "checkpoints/step-00000002"))
    train(built := stepper("single", "tram_prev", 1, micros=1), 0, 1)
    checkpoint.resume(built, run_dir, fallback=True)
    with Saver(run_dir, built) as saver:
        saver.save()
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step-00000001", "step-00000002.superseded"]
    assert checkpoint.resume(built, run_dir) is not None


def test_explicit_checkpoint_missing_and_no_checkpoint_yet(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        checkpoint.load(trained()[0], tmp_path / "step-00000007")
    assert checkpoint.resume(trained()[0], tmp_path) is None and checkpoint.latest(tmp_path) is None


def test_private_plain_files_and_manifest(run_dir: Path) -> None:
    where = run_dir / "checkpoints"
    for folder in (where, *checkpoint.candidates(run_dir)):
        assert folder.stat().st_mode & 0o777 == 0o700
    committed = [p for folder in checkpoint.candidates(run_dir) for p in folder.iterdir()]
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (*committed, where / "latest"))
    assert {p.suffix for p in committed} == {".safetensors", ".json"}
    assert (where / "latest").read_text() == "step-00000002\n"
    manifest = checkpoint.verify(where / "step-00000002")
    want = {
        "step": 2,
        "base_steps": 2,
        "seed": 5,
        "algorithm": "tram_prev",
        "data": "rows-a",
        "engine": "Replicated",
    }
    assert {key: manifest[key] for key in want} == want and manifest["recipe"]["optimizer"][
        "lr"
    ] == 0.003
    assert (
        manifest["parameters"]["transformer.wte.weight"] == [19, 10]
        and "torch" in manifest["versions"]
    )


class Bomb:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def test_pickles_are_never_loaded(run_dir: Path, tmp_path: Path) -> None:
    """An attacker who can write the folder can also write a manifest: still nothing in it is
    executed."""
    newest = run_dir / "checkpoints/step-00000002"
    payload = pickle.dumps(Bomb(tmp_path / "exploded"))
    for name in (".metadata", "optimizer.pt", "__0_0.distcp"):
        (newest / name).write_bytes(payload)
    assert checkpoint.load(stepper("single", "tram_prev", 1, micros=1), newest)["step"] == 2
    shard(newest).write_bytes(payload)
    manifest = manifests.read_manifest(newest)
    manifest["files"][shard(newest).name] = manifests.describe(shard(newest))
    reseal(newest, manifest)
    with pytest.raises(CheckpointError, match="loading"):
        checkpoint.load(stepper("single", "tram_prev", 1, micros=1), newest)
    assert not (tmp_path / "exploded").exists()


def test_retention_keeps_the_newest_and_what_is_being_read(tmp_path: Path) -> None:
    built = stepper("single", "sam", 1, micros=1)
    with Saver(tmp_path, built, keep=2) as saver:
        first = saver.save()
        with files.reading(first):
            for _ in range(3):
                train(built, 1, 1)
                saver.save()
            assert [p.name[-1] for p in checkpoint.candidates(tmp_path)] == ["3", "2", "0"]
        train(built, 1, 1)
        saver.save()
    assert [p.name[-1] for p in checkpoint.candidates(tmp_path)] == ["4", "3"]
    with pytest.raises(ValueError, match="keep=0"):
        Saver(tmp_path, built, keep=0)


def test_start_removes_what_killed_saves_left(run_dir: Path) -> None:
    where = run_dir / "checkpoints"
    (where / "step-00000003.tmp-1-ab").mkdir()
    (where / "step-00000003.tmp-1-ab/manifest.json").write_text("{")
    (where / "latest.tmp-ab").write_text("step-00000003")
    shutil.copytree(where / "step-00000002", where / "step-00000002.old")
    Saver(run_dir, trained()[0]).close()
    assert sorted(p.name for p in where.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_an_interrupted_replacement_is_still_a_candidate(run_dir: Path, template: Any) -> None:
    where = run_dir / "checkpoints"
    (where / "step-00000002").rename(where / "step-00000002.old")
    built = stepper("single", "tram_prev", 1, micros=1)
    assert checkpoint.resume(built, run_dir) is not None and digest(built) == template[1][2]
