"""A commit's manifest, and whether its files are those that the manifest names."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from tram_ds.checkpoint.commits import step_of
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.run_layout import MANIFEST, WEIGHTS

FORMAT = "tram_ds checkpoint 1"
Manifest = dict[str, Any]


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`. CheckpointError where it is missing, damaged or
    not ours."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing: this is not a committed checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a manifest of the format {FORMAT!r}")
    # before the files are judged by it: their sizes and sums are believed from here on
    if manifest.get("digest") != digest_of(manifest):
        raise CheckpointError(
            f"{file}: its contents do not match its own digest: it was altered or damaged"
        )
    if step_of(path) not in (None, manifest["step"]):
        raise CheckpointError(
            f"{file}: is of step {manifest['step']}, not of {path.name}: it belongs to another "
            "checkpoint"
        )
    return manifest


def problems(path: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files, one line each. Ranks can share the hashing: this does every
    `parts`-th file.

    Sizes are checked first, because that is free, and a file with the wrong size is not hashed.
    """
    files: dict[str, dict[str, Any]] = manifest["files"]
    found = []
    # by one of the ranks that share the work, or each would report the same line
    if part == 0:
        # the reader takes every safetensors file in the folder, so one too many would be read too
        unknown = sorted(
            p.name for p in path.iterdir() if p.name.endswith(WEIGHTS) and p.name not in files
        )
        found += [f"{path / extra}: is not in {MANIFEST}: remove it" for extra in unknown]
    for file_name in sorted(files)[part::parts]:
        found += _problem(path, file_name, files[file_name])
    return found


def _problem(path: Path, file_name: str, expected: dict[str, Any]) -> list[str]:
    file = path / file_name
    # a manifest may be forged: a name with a folder in it would point at a file elsewhere
    if Path(file_name).name != file_name or not file_name.endswith(WEIGHTS):
        return [f"{path / MANIFEST}: names {file_name!r}, which is no file of a checkpoint"]
    try:
        # not stat: a link would be followed to a file outside
        status = os.lstat(file)
        if not stat.S_ISREG(status.st_mode):
            return [f"{file}: is not a plain file"]
        if status.st_size != expected["size"]:
            return [
                f"{file}: has {status.st_size} bytes instead of {expected['size']}: truncated or "
                "overwritten"
            ]
        if describe(file)["sha256"] != expected["sha256"]:
            return [
                f"{file}: its sha256 is not the manifest's: altered, damaged, or of another "
                "checkpoint"
            ]
    except FileNotFoundError:
        return [f"{file}: missing"]
    except OSError as error:
        return [f"{file}: cannot be read ({error})"]
    return []


def verify(path: Path | str) -> Manifest:
    """Checks every file against the manifest, which it returns. CheckpointError names each bad file
    and what is wrong."""
    path = Path(path)
    manifest = read_manifest(path)
    found = problems(path, manifest)
    if found:
        raise CheckpointError("; ".join(found))
    return manifest


def describe(file: Path) -> dict[str, Any]:
    """{"size", "sha256"} of a file."""
    with open(file, "rb") as stream:
        return {
            "size": os.fstat(stream.fileno()).st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def digest_of(manifest: Manifest) -> str:
    """sha256 of what a manifest says, but of its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
