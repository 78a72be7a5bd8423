"""Pictures as their files say: every mode, depth and orientation of one picture is that picture."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tram_ds.data.pictures import decode

GREY = np.array([[0, 40, 80], [120, 200, 255]], dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled(kind):
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)  # 255 * 257 = 65535
    assert np.array_equal(np.asarray(decode(stored(sixteen, kind)))[..., 0], GREY)
    between = Image.fromarray(np.array([[128, 129]], dtype=np.uint16))  # halves of 257: 128.5
    assert np.asarray(decode(stored(between, kind)))[..., 0].tolist() == [[0, 1]]


# EXIF orientation -> what a viewer does to the stored pixels
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.asarray(decode(stored(Image.fromarray(GREY), exif=exif)))[..., 0]
    assert np.array_equal(shown, TURNS[orientation](GREY))


@pytest.mark.parametrize("mode, kind", [("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "BMP")])
def test_modes_of_eight_bits_are_the_same_picture(mode, kind):
    shown = np.asarray(decode(stored(Image.fromarray(GREY).convert(mode), kind)))
    assert np.array_equal(shown, np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize(
    "values, words", [(np.float32, "floats.*mode F"), (np.int32, "32-bit integers.*mode I")]
)
def test_a_range_that_nothing_says_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        decode(stored(Image.fromarray(GREY.astype(values)), "TIFF"))


@pytest.mark.parametrize("cut", [0, 20, -40])
def test_a_cut_file_is_refused(cut):
    whole = stored(Image.fromarray(np.tile(GREY, (20, 20))))
    with pytest.raises(ValueError):
        decode(whole[:cut])


def tiff(values: bytes, bits: int, photometric: int) -> bytes:
    """GREY's shape, one strip, as other programs write it."""
    tags = [(256, 4, 3), (257, 4, 2), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 2), (279, 4, len(values))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + ifd


def test_sixteen_bits_that_begin_at_white_are_the_same_picture():
    values = (65535 - GREY.astype(np.uint16) * 257).astype("<u2").tobytes()
    assert np.array_equal(np.asarray(decode(tiff(values, 16, 0)))[..., 0], GREY)


def test_twelve_bits_of_grey_are_not_taken_for_sixteen():
    with pytest.raises(ValueError, match="grey of 12 bits: save it with 8 or 16 bits"):
        decode(tiff(bytes(10), 12, 1))


def test_ink_and_luminance_are_the_same_picture():
    for mode in ("CMYK", "YCbCr"):
        shown = np.asarray(
            decode(stored(Image.fromarray(GREY).convert("RGB").convert(mode), "TIFF"))
        )
        assert np.array_equal(shown, np.stack([GREY] * 3, axis=-1))
