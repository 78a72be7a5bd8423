"""The files of a run folder, by what they are: the only place that knows their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, overload


class _File:
    """Of the class the name, of one run's folder the path."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, folder: None, owner: type) -> str: ...
    @overload
    def __get__(self, folder: RunFolder, owner: type) -> Path: ...
    def __get__(self, folder: RunFolder | None, owner: type) -> str | Path:
        return self.name if folder is None else folder.path / self.name


class RunFolder:
    """`RunFolder(path).results` is a path, `RunFolder.results` its name. Makes and reads nothing.

    Whether what ended here is a given recipe's run is for checkpoint.changes.finished to say.
    """

    recipe = _File("recipe.yaml")
    """The recipe, resolved."""
    metrics = _File("metrics.jsonl")
    """The record of the run, a line a step."""
    system = _File("system.jsonl")
    """Samples of the machine."""
    initial = _File("initial.json")
    """Scores before the first step."""
    best_loss = _File("best.json")
    """Step and eval.key of what lies in `best`."""
    results = _File("results.json")
    """Final scores."""
    rows = _File("rows.npz")
    """Final scores of every row; see evaluation.row_scores."""
    done = _File("DONE")
    """Marks a run that came to its end."""
    requeue = _File("REQUEUE")
    """Marks one that was stopped and is to go on."""
    run_id = _File("run_id")
    """Its id in MLflow."""
    tracking = _File("tracking.json")
    """What MLflow is to have, and has."""
    tracking_lock = _File(".tracking.lock")
    """Of whoever uploads."""
    analysis_report = _File("analysis.json")
    """Sharpness, landscape and the like, in full."""
    lock = _File("lock")
    """Of the job that trains; see run_lock."""
    lock_mutex = _File("lock.mutex")
    """Held while the lock is looked at."""
    checkpoints = _File("checkpoints")
    """Folder: a folder a step; see checkpoint.files."""
    export = _File("export")
    """Folder: the selected weights, in Hugging Face format."""
    best = _File("best")
    """Folder: the best weights so far, in the same format."""
    analysis = _File("analysis")
    """Folder: figures, and what comparisons read."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def ended(self) -> bool:
        """Whether a run, of whatever recipe, came to its end here."""
        return self.done.is_file()


MANIFEST, LATEST, WEIGHTS = "manifest.json", "latest", ".safetensors"  # of and in checkpoints
# .nfs*: what NFS leaves of a removed file that somebody still holds open
LOCKS = (RunFolder.lock, f"{RunFolder.lock}.*", ".nfs*")
# A submission's own folder, slurm-20260131T101500-4242: the job may be running from it.
JOBS = ("slurm-[0-9]*T[0-9]*-[0-9]*",)
TEMPORARY = ".*.tmp"  # of files.write_whole
ADAPTER = "adapter"  # in an export of adapters: a folder in peft's format
CARD = "README.md"  # of an export: a run's as long as it is signed (runtime/signed.py)


def superseded(log: Path | str) -> Path:
    """Beside a log: its records of a way that was left for another."""
    return Path(log).with_name(f"{Path(log).stem}.superseded.jsonl")


def rows_beside(report: Path) -> Path:
    """Beside a report of evaluate: the scores of every row."""
    return report.with_name(f"{report.stem}.{RunFolder.rows}")


def partial(export: Path) -> Path:
    """Beside an export: where it is written before it is whole."""
    return export.with_name(f"{export.name}.partial")


def replaced(export: Path) -> Path:
    """Beside an export: the one before it, until the new one stands."""
    return export.with_name(f"{export.name}.old")


_TOP = (
    RunFolder.recipe,
    *(
        name
        for log in (RunFolder.metrics, RunFolder.system)
        for name in (log, superseded(log).name)
    ),
    RunFolder.initial,
    RunFolder.best_loss,
    RunFolder.results,
    RunFolder.rows,
    RunFolder.run_id,
    RunFolder.tracking,
    RunFolder.done,
    RunFolder.requeue,
    RunFolder.tracking_lock,
    TEMPORARY,
    RunFolder.analysis_report,
    *LOCKS,
)
_CHECKPOINTS = (
    LATEST,
    f"{LATEST}.tmp-*",
    "probe.tmp-*",
    TEMPORARY,
    f"step-*/{MANIFEST}",
    f"step-*/*{WEIGHTS}",
    f"step-*/{TEMPORARY}",
)
_ANALYSIS = ("sharpness.json", "cka.json", "*.png", "*.svg", TEMPORARY)
# What save_pretrained of a model, a tokenizer and an image processor write.
_EXPORT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    TEMPORARY,
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    CARD,
    f"{ADAPTER}/{CARD}",
    f"{ADAPTER}/{TEMPORARY}",
    f"{ADAPTER}/adapter_config.json",
    f"{ADAPTER}/adapter_model.safetensors",
)
EXPORTS = tuple(
    name
    for export in (RunFolder.export, RunFolder.best)
    for name in (export, partial(Path(export)).name, replaced(Path(export)).name)
)

MADE: Final[tuple[str, ...]] = (
    *_TOP,
    *(f"{RunFolder.checkpoints}/{pattern}" for pattern in _CHECKPOINTS),
    *(f"{RunFolder.analysis}/{pattern}" for pattern in _ANALYSIS),
    *(f"{folder}/{pattern}" for folder in EXPORTS for pattern in _EXPORT),
)
"""Patterns of the paths, below a run folder, of every file that a run makes; `*` stays inside one
name."""


def made(path: str) -> bool:
    """Whether a run makes the file with this relative path."""
    return any(matches(path.split("/"), pattern.split("/")) for pattern in MADE)


def matches(parts: list[str], patterns: list[str]) -> bool:
    """Name by name."""
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def is_one_of(patterns: tuple[str, ...], name: str) -> bool:
    """Whether one of the patterns is the name's."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
