"""An archive of M2D2, read as a stream: nothing is unpacked, and no text is held in memory.

Its text is that of the same files in a folder: lines are not stripped, bytes that are not UTF-8
(the files are cut at a byte count) become U+FFFD."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tram_ds.data.digests import remembered
from tram_ds.data.sources import CHUNK, SPLITS, check_domain_name, unknown_domain
from tram_ds.data.text import decoded
from tram_ds.runtime.errors import DataError


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
    splits = splits_of(archive, domain, cache_dir)
    if split not in splits:
        there = ", ".join(splits) or "nothing"
        raise DataError(f"{archive} has no {split} split of domain '{domain}'; it has {there}")
    return splits[split]


def splits_of(
    archive: Path, domain: str, cache_dir: str | os.PathLike[str] | None
) -> dict[str, str]:
    """Split -> the member that holds it, of those that the domain has. DataError for a domain that
    is not there."""
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
        # tarfile stops at the archive's end mark: gzip's checksum behind it is unread yet
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
                # r|: one way through, because gzip seeks back by unpacking from its beginning again
                with tarfile.open(fileobj=unpacked, mode="r|", bufsize=CHUNK) as tar:
                    yield tar, raw
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{archive} is damaged or no tar.gz archive ({error}): delete it and get it again"
        ) from error
