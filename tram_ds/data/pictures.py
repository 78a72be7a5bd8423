"""A stored picture as RGB, the way its file says it is to be seen.

Turned as its EXIF orientation says (as `datasets` does), 16-bit grey scaled to 8 bits by 257.
What has no one meaning in 8 bits (32-bit integers, floats) is refused, never clipped.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.runtime.errors import DataError

VERSION = 2  # raise it when what can be decoded changes: it is part of the cache key
ORIENTATION = 0x0112  # EXIF
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF
BROKEN = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)
AT_ONCE = 1024  # pictures handed to the threads at a time


def decode(data: bytes) -> Image.Image:
    """The picture as RGB, 8 bits a channel. ValueError, in words, for bytes that are no picture
    or have no one meaning as one."""
    try:
        image = Image.open(io.BytesIO(data))
        # open() reads the header alone: damaged data is found here
        image.load()
        tags = dict(getattr(image, "tag_v2", {}))  # of TIFF
        bits, inverted = tags.get(BITS, (16,))[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _eight_bits(image, bits, inverted).convert("RGB")
    except BROKEN as error:
        raise ValueError(str(error)) from error


def first_broken(
    count: int,
    fault: Callable[[int], str | None],
    digest: str,
    cache_dir: str | os.PathLike[str] | None,
) -> str | None:
    """What is wrong with the first broken one of `count` pictures, or None; all are looked at once
    per content (`digest`) and machine, in threads.

    fault: what is wrong with the picture of a row, or None.
    """
    # with Pillow's version: another may decode what this one cannot
    target = cache_root(cache_dir) / "pictures" / digest_of(VERSION, digest, Image.__version__)

    def build(folder: Path) -> None:
        found = _first(count, fault)
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    folder = build_once(target, build, lambda path: (path / "found.json").is_file())
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def refuse(where: str, found: str | None) -> None:
    """DataError if `found` says that a picture is broken."""
    if found is not None:
        raise DataError(f"{where}: {found}; replace it, or leave its row out of the file")


def _first(count: int, fault: Callable[[int], str | None]) -> str | None:
    rows = iter(range(count))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(islice(rows, AT_ONCE)):
            # map() keeps the order: the first broken row is named, whichever thread ends first
            if found := next(filter(None, pool.map(fault, some)), None):
                return found
    return None


def _eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if sixteen and bits != 16:
        raise ValueError(f"its pixels are grey of {bits} bits: save it with 8 or 16 bits")
    if sixteen:  # 0 to 65535; PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        values = 65535 - values if inverted else values
        # to the nearest, 65535 being 255 x 257; in uint16 the sum would wrap around
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floats'} "
            f"(mode {image.mode}), whose range nothing says: save it with 8 or 16 bits"
        )
    return image
