"""M2D2 (machelreid/m2d2): 11 Wikipedia and 11 S2ORC domains, each a `<config>.tar.gz` with train,
valid and test text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from tram_ds.data.hub import hub_file
from tram_ds.data.m2d2_archive import index_of, member_digest, read_member, splits_of
from tram_ds.data.m2d2_names import ABBREVIATIONS
from tram_ds.data.sources import (
    HUB_ID,
    SPLITS,
    FolderSource,
    Source,
    check_domain_name,
    unknown_domain,
)

# m2d2_test_sets/<config>/test.txt, from the data set's own repository
TEST_SETS = "m2d2_test_sets.tar.gz"


def hub_source(
    cache_dir: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Source:
    """The 22 domains of the paper from the hub, each downloaded when first read."""

    def fetch(domain: str) -> Path:
        instead = (
            f"put {domain}.tar.gz (data/{domain}.tar.gz there) into a folder and set "
            "task.data to that folder"
        )
        return hub_file(HUB_ID, f"data/{domain}.tar.gz", revision, instead)

    return ArchiveSource(HUB_ID, sorted(ABBREVIATIONS), fetch, cache_dir)


def archives_in(folder: Path) -> list[Path]:
    """The .tar.gz files of a folder, or of its data/ as in a clone of the hub's repository."""
    return sorted(folder.glob("*.tar.gz")) or sorted((folder / "data").glob("*.tar.gz"))


def local_source(path: Path, cache_dir: str | os.PathLike[str] | None = None) -> Source:
    """An archive, or a folder of archives `<domain>.tar.gz`, the test-only archive and `<domain>/`
    text folders.

    Where a split is there twice, text folders come before archives, and those before the test-only
    archive.
    """
    archives = archives_in(path) if path.is_dir() else [path]
    own = {domain_of(archive): archive for archive in archives if archive.name != TEST_SETS}
    parts: list[Source] = []
    if path.is_dir() and any(path.glob("*/*.txt")):
        parts.append(FolderSource(path))
    if own:
        parts.append(ArchiveSource(str(path), sorted(own), own.__getitem__, cache_dir))
    parts += [BundleSource(archive, cache_dir) for archive in archives if archive.name == TEST_SETS]
    return parts[0] if len(parts) == 1 else Merged(str(path), parts)


def domain_of(archive: Path) -> str:
    """The domain an archive is named after."""
    return archive.name.removesuffix(".tar.gz")


class ArchiveSource:
    """One archive per domain, `fetch`ed when first read and taken to have all three splits until
    then."""

    def __init__(
        self,
        where: str,
        domains: Iterable[str],
        fetch: Callable[[str], Path],
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.where, self.names, self.cache_dir = where, list(domains), cache_dir
        # once a domain: huggingface_hub asks the hub at every call whether its copy is the newest
        self.fetch = cache(fetch)

    def domains(self) -> list[str]:
        return list(self.names)

    def splits(self, domain: str) -> list[str]:
        self._check(domain)
        return list(SPLITS)

    def read(self, domain: str, split: str) -> Iterator[str]:
        self._check(domain)
        return read_member(self.fetch(domain), domain, split, self.cache_dir)

    def digest(self, domain: str, split: str) -> str:
        self._check(domain)
        return member_digest(self.fetch(domain), domain, split, self.cache_dir)

    def _check(self, domain: str) -> None:
        check_domain_name(domain)
        if domain not in self.names:
            raise unknown_domain(domain, self.names, self.where)


class BundleSource:
    """One archive with many domains."""

    def __init__(self, archive: Path, cache_dir: str | os.PathLike[str] | None) -> None:
        self.archive, self.cache_dir = archive, cache_dir

    def domains(self) -> list[str]:
        return sorted(index_of(self.archive, self.cache_dir)["domains"])

    def splits(self, domain: str) -> list[str]:
        return list(splits_of(self.archive, domain, self.cache_dir))

    def read(self, domain: str, split: str) -> Iterator[str]:
        return read_member(self.archive, domain, split, self.cache_dir)

    def digest(self, domain: str, split: str) -> str:
        return member_digest(self.archive, domain, split, self.cache_dir)


class Merged:
    """Several sources as one; the first that has a split gives it."""

    def __init__(self, where: str, parts: list[Source]) -> None:
        self.where, self.parts = where, parts

    def domains(self) -> list[str]:
        return sorted({domain for part in self.parts for domain in part.domains()})

    def splits(self, domain: str) -> list[str]:
        there = {split for part in self._having(domain) for split in part.splits(domain)}
        return [split for split in SPLITS if split in there]

    def read(self, domain: str, split: str) -> Iterator[str]:
        return self._part(domain, split).read(domain, split)

    def digest(self, domain: str, split: str) -> str:
        return self._part(domain, split).digest(domain, split)

    def _having(self, domain: str) -> list[Source]:
        check_domain_name(domain)
        found = [part for part in self.parts if domain in part.domains()]
        if not found:
            raise unknown_domain(domain, self.domains(), self.where)
        return found

    def _part(self, domain: str, split: str) -> Source:
        parts = self._having(domain)
        return next((part for part in parts if split in part.splits(domain)), parts[0])
