"""Files of Hugging Face data sets, through the client's cache; one error, with the way out, for all
that can fail."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tram_ds.runtime.errors import DataError
from tram_ds.runtime.hub import waiting


def hub_file(repo: str, name: str, revision: str | None, instead: str) -> Path:
    """One file of a data set repository, downloaded on first use. instead: where to put the file
    without a network."""
    try:
        with waiting(repo, "task.data"):
            return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the client's errors come from four libraries
        raise _unreachable(repo, name, revision, instead, error) from error


def hub_files(repo: str, pattern: str, revision: str | None, instead: str) -> list[Path]:
    """The files of a data set repository that match `pattern` (of their path in it), sorted by
    name; at least one."""
    return hub_folder(repo, [pattern], revision, instead)[1]


def hub_folder(
    repo: str, patterns: Sequence[str], revision: str | None, instead: str, called: str = ""
) -> tuple[Path, list[Path]]:
    """(the folder of a data set repository, its files that match one of `patterns`, sorted).
    called: what these are, where the patterns do not say it better."""
    wanted = called or ", ".join(patterns)
    try:
        with waiting(repo, "task.data"):
            found = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        folder = Path(found)
    except Exception as error:
        raise _unreachable(repo, wanted, revision, instead, error) from error
    # the snapshot's folder also holds what earlier downloads with other patterns put there
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    matching = [folder / name for name in names if any(fnmatch(name, p) for p in patterns)]
    if not matching:
        raise _unreachable(
            repo,
            wanted,
            revision,
            instead,
            FileNotFoundError(f"no such file; it has {_some(names)}"),
        )
    return folder, matching


def _unreachable(
    repo: str, name: str, revision: str | None, instead: str, error: Exception
) -> DataError:
    at = f" at revision {revision}" if revision else ""
    reason = (
        f"{type(error).__name__}: "
        f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
    )
    if isinstance(error, RevisionNotFoundError):
        reason = "the hub has no such revision: set task.revision to a branch, tag or commit of it"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "the hub has no such data set, or it needs a login"
    # LocalEntryNotFoundError is one too, but no HTTP error: it says that the cache lacks the file
    elif isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        reason = "the data set has no such file"
    return DataError(
        f"cannot get {name} of the hub data set {repo}{at} ({reason}). Without a network: "
        f"{instead}; or copy a "
        "hub cache that holds it (HF_HOME) and set HF_HUB_OFFLINE=1"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) or "nothing"
