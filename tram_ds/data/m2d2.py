"""M2D2 (machelreid/m2d2): 11 Wikipedia and 11 S2ORC domains, each a `<config>.tar.gz` with train,
valid and test text.

Archives are read as streams: nothing is unpacked, and no text is held in memory. Their text is that
of the same files
in a folder: lines are not stripped, bytes that are not UTF-8 (the files are cut at a byte count)
become U+FFFD.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from tram_ds.data.digests import remembered
from tram_ds.data.hub import hub_file
from tram_ds.data.sources import (
    CHUNK,
    HUB_ID,
    SPLITS,
    FolderSource,
    Source,
    check_domain_name,
    unknown_domain,
)
from tram_ds.data.text import decoded
from tram_ds.runtime.errors import DataError

# m2d2_test_sets/<config>/test.txt, from the data set's own repository
TEST_SETS = "m2d2_test_sets.tar.gz"
# the paper's split -> its abbreviation -> the data set's config, spelled as there; the first is
# trained on
PAPER = {
    "s2orc": {
        "MATH": "math_l1",
        "ART": "Art",
        "ASTRO": "astro-ph_l1",
        "CONDM": "cond-mat_l1",
        "CS": "cs_l1",
        "ECON": "econ_l1",
        "NLIN": "nlin_l1",
        "PHIL": "Philosophy",
        "PHYS": "physics_l1",
        "QBIO": "q-bio_l1",
        "STAT": "stat_l1",
    },
    "wiki": {
        "SOC": "Society_and_social_sciences",
        "CULT": "Culture_and_the_arts",
        "GEN": "General_referece",
        "HEALTH": "Health_and_fitness",
        "HIST": "History_and_events",
        "HUMAN": "Human_activites",
        "MATH": "Mathematics_and_logic",
        "NAT": "Natural_and_physical_sciences",
        "PHIL": "Philosophy_and_thinking",
        "REL": "Religion_and_belief_systems",
        "TECH": "Technology_and_applied_sciences",
    },
}
ABBREVIATIONS = {config: short for table in PAPER.values() for short, config in table.items()}


def short_names(domains: Iterable[str]) -> dict[str, str]:
    """Domain -> the paper's abbreviation in small letters, or its own name: no two are the same.

    MATH and PHIL stand for a domain of either split: where both are there, each keeps its name.
    """
    domains = list(dict.fromkeys(domains))
    short = {name: ABBREVIATIONS[name].lower() for name in domains if name in ABBREVIATIONS}
    taken = Counter([*short.values(), *(name for name in domains if name not in short)])
    return {name: s if (s := short.get(name, name)) and taken[s] == 1 else name for name in domains}


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
        return list(_splits(self.archive, domain, self.cache_dir))

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


def index_of(archive: Path, cache_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    """{"sha256", "domains": domain -> split -> member name} of an archive.

    The first call reads it all, so that a damaged or unsafe archive is refused (DataError) before
    anything is used.
    """
    return remembered(archive, "m2d2 index 1", lambda: _scan(archive), cache_dir)


def member_digest(
    archive: Path, domain: str, split: str, cache_dir: str | os.PathLike[str] | None
) -> str:
    """A key of the member's content: the archive's sha256 with the member's name, hashed."""
    member = _member(archive, domain, split, cache_dir)
    return hashlib.sha256(
        f"{index_of(archive, cache_dir)['sha256']}\0{member}".encode()
    ).hexdigest()


def read_member(
    archive: Path, domain: str, split: str, cache_dir: str | os.PathLike[str] | None
) -> Iterator[str]:
    """The member's text in chunks."""
    return _chunks(archive, _member(archive, domain, split, cache_dir))


def _chunks(archive: Path, wanted: str) -> Iterator[str]:
    with _stream(archive) as (tar, _):
        for member in tar:
            if member.name == wanted and (file := tar.extractfile(member)):
                data = iter(partial(file.read, CHUNK), b"")
                yield from filter(None, decoded(data, f"{wanted} in {archive}"))
                return


def _member(
    archive: Path, domain: str, split: str, cache_dir: str | os.PathLike[str] | None
) -> str:
    splits = _splits(archive, domain, cache_dir)
    if split not in splits:
        there = ", ".join(splits) or "nothing"
        raise DataError(f"{archive} has no {split} split of domain '{domain}'; it has {there}")
    return splits[split]


def _splits(archive: Path, domain: str, cache_dir: str | os.PathLike[str] | None) -> dict[str, str]:
    check_domain_name(domain)
    domains = index_of(archive, cache_dir)["domains"]
    if domain not in domains:
        raise unknown_domain(
            domain, domains, f"{archive} (expected {domain}/train.txt, valid.txt and test.txt)"
        )
    return {split: domains[domain][split] for split in SPLITS if split in domains[domain]}


def _scan(archive: Path) -> dict[str, Any]:
    splits = {f"{name}.txt": split for split, names in SPLITS.items() for name in names}
    domains: dict[str, dict[str, str]] = {}
    with _stream(archive) as (tar, raw):
        for member in tar:
            parts = _safe_parts(archive, member)
            if (
                member.isfile()
                and len(parts) > 1
                and parts[-1] in splits
                and not parts[-2].startswith(".")
            ):
                domains.setdefault(parts[-2], {}).setdefault(splits[parts[-1]], member.name)
        digest = raw.finish()
    return {"sha256": digest, "domains": domains}


def _safe_parts(archive: Path, member: tarfile.TarInfo) -> tuple[str, ...]:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{archive} is refused: its member '{member.name}' points outside the archive"
        )
    if not (member.isfile() or member.isdir()):
        raise DataError(
            f"{archive} is refused: its member '{member.name}' is a link or a device, not a file"
        )
    return path.parts


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.unpacked: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.sha256.update(data)
        return len(data)

    def finish(self) -> str:
        """Reads to the end, which checks the checksum of the compressed data; the sha256 of the
        file."""
        while self.unpacked.read(CHUNK):
            pass
        while self.read(CHUNK):
            pass
        return self.sha256.hexdigest()


@contextmanager
def _stream(archive: Path) -> Iterator[tuple[tarfile.TarFile, _Hashed]]:
    try:
        with archive.open("rb") as file:
            raw = _Hashed(file)
            with gzip.GzipFile(fileobj=io.BufferedReader(raw, CHUNK)) as unpacked:
                raw.unpacked = unpacked
                with tarfile.open(fileobj=unpacked, mode="r|", bufsize=CHUNK) as tar:
                    yield tar, raw
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{archive} is damaged or no tar.gz archive ({error}): delete it and get it again"
        ) from error
