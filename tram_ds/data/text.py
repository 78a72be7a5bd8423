"""Bytes of a text file as text: UTF-8, or UTF-16 and UTF-32 that say so by their byte-order mark.

Whatever else is in a file called .txt is refused by its name. A file may be cut inside a
character, and a trace of bytes may be damaged: they become U+FFFD and are counted. Above a trace
the file is in another encoding, and refused.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from itertools import chain

from tram_ds.runtime.errors import DataError

TRACE = 4  # replaced characters that any file may have: one cut at either end of it
TRACE_SHARE = 1e-5  # and so many of its characters
REPLACEMENT = "\ufffd"
MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"%PDF": "PDF",
    b"{\\rtf": "RTF",
    b"\x04\x22\x4d\x18": "lz4",
}


def decoded(data: Iterable[bytes], where: str) -> Iterator[str]:
    """The text of a file's bytes, in chunks; line ends become newlines, a byte-order mark is left
    out. where: what messages call the file. DataError for what is no text."""
    parts = iter(data)
    first = next(parts, b"")
    for magic, kind in PACKED.items():
        if first.startswith(magic):
            raise DataError(f"{where} is a {kind} file, not text: unpack it, or give it its name")
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    parts = chain([first[len(mark) :]], parts)
    return _utf8(parts, where) if encoding == "utf-8" else _wide(parts, where, encoding)


def _utf8(parts: Iterable[bytes], where: str) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8")(errors="replace"), translate=True
    )
    replaced, characters, tail = 0, 0, b""
    for data, final in chain(((part, False) for part in parts), [(b"", True)]):
        if b"\0" in data:
            raise DataError(
                f"{where} holds zero bytes: it is no text, or UTF-16 without a byte-order mark; "
                "save it as UTF-8"
            )
        text = decoder.decode(data, final=final)
        # those that are in the file itself are nobody's fault
        own = (tail + data).count(REPLACEMENT.encode())
        replaced, characters = replaced + text.count(REPLACEMENT) - own, characters + len(text)
        # U+FFFD is three bytes: one may begin in this chunk and end in the next
        tail = (tail + data)[-2:]
        # before the end of a large file: gigabytes in another encoding are not read through
        if final or characters > 1 << 24:
            _refuse(replaced, characters, where)
        yield text


def _wide(parts: Iterable[bytes], where: str, encoding: str) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    try:
        for data in parts:
            yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not the {encoding} that its byte-order mark says: {error}"
        ) from error


def _refuse(replaced: int, characters: int, where: str) -> None:
    if replaced > TRACE + TRACE_SHARE * characters:
        raise DataError(
            f"{where}: {replaced} of {characters} characters are not UTF-8: save it as UTF-8 "
            "(iconv -f ENCODING -t UTF-8)"
        )
