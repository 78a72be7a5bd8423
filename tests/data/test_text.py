"""What is in a file called .txt: decoded, counted, or refused by its name."""

from __future__ import annotations

import gzip
import lzma

import pytest

from tram_ds.data.text import decoded
from tram_ds.runtime.errors import DataError

TEXT = "Ωmega naïve\nsecond 字 line\n" * 50


def read(data: bytes, chunk: int = 7) -> str:
    parts = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    return "".join(decoded(parts, "train.txt"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_a_byte_order_mark_says_the_encoding_and_is_left_out(encoding, chunk):
    assert read(TEXT.encode(encoding), chunk) == TEXT
    assert read(("\ufeff" + TEXT).encode("utf-16-be"), chunk) == TEXT


def test_line_ends_become_newlines_also_between_chunks():
    assert read(b"a\r\nb\rc\n", 2) == "a\nb\nc\n"


def test_a_trace_is_replaced_and_more_is_refused():
    cut = TEXT.encode()[1:] + "字".encode()[:2]  # inside a character at both ends
    assert read(cut) == "\ufffd" + TEXT[1:] + "\ufffd"
    own = "\ufffd" * 300 + TEXT  # in the file itself: nobody's fault, wherever a chunk ends
    assert read(own.encode()) == own
    five = b"a\xff" * 5 + b"b" * 20
    with pytest.raises(DataError, match=r"train\.txt: 5 of 30 characters are not UTF-8"):
        read(five)
    with pytest.raises(DataError, match="100 of 1"):
        read(TEXT.encode("latin-1", errors="replace") + "é".encode("latin-1") * 50)


@pytest.mark.parametrize(
    "data, words",
    [
        (gzip.compress(TEXT.encode()), "train.txt is a gzip file"),
        (lzma.compress(TEXT.encode()), "train.txt is a xz file"),
        (b"PK\x03\x04....", "train.txt is a zip file"),
        (b"\x04\x22\x4d\x18....", "train.txt is a lz4 file"),
        (b"{\\rtf1\\ansi text", "train.txt is a RTF file"),
        (TEXT.encode("utf-16-le"), "zero bytes.*UTF-16 without a byte-order mark"),
        (b"\xff\xfea\0\0", "not the utf-16-le"),
    ],
)
def test_what_is_no_text_is_refused_by_name(data, words):
    with pytest.raises(DataError, match=words):
        read(data)
