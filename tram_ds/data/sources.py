"""Where text comes from: a source has domains, and a domain has a train, a valid and a test split.

`open_source` is the registry: one name or one folder in, one `Source` out.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from tram_ds.data.text import decoded
from tram_ds.runtime.errors import DataError

# split -> its file names
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "eval"), "test": ("test",)}
CHUNK = 1 << 20  # bytes per chunk
RESERVED = ("zero_shot", "zs_avg", "stem_avg", "avg", "average")
HUB_ID = "machelreid/m2d2"  # the one data set of text domains on the hub


class Source(Protocol):
    """Text by domain and split. `split` is train, valid or test."""

    def domains(self) -> list[str]:
        """Domain names, sorted."""
        ...

    def splits(self, domain: str) -> list[str]:
        """The splits `domain` has."""
        ...

    def read(self, domain: str, split: str) -> Iterator[str]:
        """The split's text in chunks of any size; the whole is never in memory. DataError if it is
        not there."""
        ...

    def digest(self, domain: str, split: str) -> str:
        """sha256 (hex) of the split's content: equal digests mean equal text."""
        ...


class FolderSource:
    """`<root>/<domain>/{train,valid,test}.txt`; the valid file may be called validation or eval.

    tram_ds.data.text decodes: a trace of bytes that are not UTF-8 (files are often cut at a byte
    count) becomes U+FFFD. A domain may have only test.txt.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"data folder {self.root} is not a directory")
        if not self.domains():
            raise DataError(
                f"data folder {self.root} has no domain: expected "
                f"{self.root}/<domain>/{{train,valid,test}}.txt, or files of rows (train.jsonl), "
                f"found {some(sorted(p.name for p in self.root.iterdir()))}"
            )
        refuse_alike_domains(self.domains(), str(self.root))

    @classmethod
    def fits(cls, root: Path) -> bool:
        """Whether a folder is laid out so."""
        return any(cls._files(folder) for folder in root.iterdir() if folder.is_dir())

    def domains(self) -> list[str]:
        folders = (p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        return sorted(p.name for p in folders if self._files(p))

    def splits(self, domain: str) -> list[str]:
        return list(self._files(self._folder(domain)))

    def read(self, domain: str, split: str) -> Iterator[str]:
        path = self._path(domain, split)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: the {split} split of domain '{domain}' needs text")
        return _chunks(path)

    def digest(self, domain: str, split: str) -> str:
        path = self._path(domain, split)
        stat = path.stat()
        return _file_digest(str(path), stat.st_size, stat.st_mtime_ns)

    def _folder(self, domain: str) -> Path:
        check_domain_name(domain)
        domains = self.domains()
        if domain not in domains:
            raise unknown_domain(domain, domains, str(self.root))
        return self.root / domain

    @staticmethod
    def _files(folder: Path) -> dict[str, Path]:
        candidates = {
            split: [folder / f"{name}.txt" for name in names] for split, names in SPLITS.items()
        }
        return {
            split: found[0]
            for split, paths in candidates.items()
            if (found := [p for p in paths if p.is_file()])
        }

    def _path(self, domain: str, split: str) -> Path:
        files = self._files(self._folder(domain))
        if split not in files:
            names = " or ".join(f"{name}.txt" for name in SPLITS[split])
            there = ", ".join(path.name for path in files.values())
            raise DataError(
                f"domain '{domain}' in {self.root} has no {split} split ({names}); it has {there}"
            )
        return files[split]


def refuse_revision(data: str, revision: str | None) -> None:
    """DataError if a hub revision is given for data that is not on the hub."""
    if revision is not None:
        raise DataError(
            f"task.revision {revision} is for data on the hub, and task.data {data} is not: "
            "remove it"
        )


def check_domain_name(domain: str) -> None:
    """Refuses names that could leave the data folder or hide in it."""
    control = any(unicodedata.category(c) == "Cc" for c in domain)
    if not domain or domain.startswith(".") or control or any(c in domain for c in "/\\:"):
        raise DataError(
            f"{domain!r} is not a domain name: it may not be empty, start with '.' or contain / "
            "\\ : or control characters"
        )
    refuse_reserved(domain)


def refuse_reserved(name: str) -> None:
    """DataError for a name that the averages of results and tables have."""
    if name in RESERVED:
        raise DataError(f"'{name}' is what an average is called: rename this domain's folder")


def refuse_alike(names: Iterable[str], what: str) -> None:
    """DataError for two names that look the same: blanks around them, or an accent as a letter of
    its own (NFD, as macOS writes names)."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).strip(), name)
        if other != name:
            raise DataError(f"two of {what} look the same: {other!a} and {name!a}: rename one")


def refuse_alike_domains(names: Sequence[str], where: str) -> None:
    """The same of domains, which also name metrics and files: DataError for two that differ by case
    alone, which are one in a tracking server's database or file system that does not see case."""
    refuse_alike(names, f"the domains of {where}")
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise DataError(
                f"two of the domains of {where} differ by case alone, {other!a} and {name!a}, and "
                "where case is not seen their metrics and files are one: rename one"
            )


def unknown_domain(domain: str, domains: Iterable[str], where: str) -> DataError:
    """The error for a domain that is not there, with the nearest name and the list of those that
    are."""
    domains = list(domains)
    for name in domains:
        if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", domain):
            return DataError(
                f"domain '{domain}' in {where} is written {name!a} there, and {domain!a} in the "
                "recipe (NFC and NFD): rename the folder so"
            )
    lowered = {name.lower(): name for name in domains}
    near = difflib.get_close_matches(domain.lower(), lowered, n=1, cutoff=0.5)
    hint = f" (did you mean '{lowered[near[0]]}'?)" if near else ""
    return DataError(f"unknown domain '{domain}' in {where}{hint}; it has {some(domains)}")


def corpus_digest(source: Source, parts: Iterable[tuple[str, str]]) -> str:
    """sha256 (hex) over the (domain, split) pairs given and the content of each, in any order."""
    lines = sorted(f"{domain}\0{split}\0{source.digest(domain, split)}" for domain, split in parts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _chunks(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from filter(None, decoded(iter(lambda: file.read(CHUNK), b""), str(path)))


@lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, modified_ns: int) -> str:
    """sha256 of a file, computed again only when its size or modification time changes."""
    # they are in the cache's key alone
    del size, modified_ns
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: list[str], limit: int = 40) -> str:
    """The names for a message, at most `limit` of them."""
    shown = ", ".join(names[:limit]) or "nothing"
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
