"""A person's own files as text that is read where it is needed, and kept nowhere.

The text of a split is what tram_ds.data.own_text would keep of it, row by row in the same order,
and a row is held out by the same rule. A place in it is a few numbers, at which reading and
tokenising go on without what comes before.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tram_ds.data.layout import Files
from tram_ds.data.sources import SPLITS, check_domain_name, refuse_alike_domains, unknown_domain
from tram_ds.data.usable import Count, Reading, column_of_text, lacking, side, usable
from tram_ds.data.windows import Piece, pieces
from tram_ds.runtime.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a text's tokens go on: behind `taken` tokens of a piece (tram_ds.data.windows).

    window: the piece's, as (its first character, the tokens of it that come before the piece); it
    begins `behind` characters into row `row` of file `file`, both from 0. None: nothing was taken.

    left_out, named: of the rows before that one; of all of them where they were counted, in an
    earlier pass.
    """

    file: int = 0
    row: int = 0
    behind: int = 0
    window: tuple[int, int] | None = None
    taken: int = 0
    left_out: int = 0
    named: tuple[str, ...] = ()
    counted: bool = False


BEGINNING = Place()


class Began(NamedTuple):
    """Where in a text a row began."""

    character: int
    file: int
    row: int
    left_out: int
    named: tuple[str, ...]


class StreamedText:
    """Implements tram_ds.data.sources.Source over files of rows, whose domains are files or
    folders. Nothing is written anywhere."""

    def __init__(self, data: str, reading: Reading, files: Files) -> None:
        self.data, self.reading, self.files = data, reading, files
        self.count = Count()  # of the training rows that were read
        for domain in files:
            check_domain_name(domain)
        refuse_alike_domains(self.domains(), str(data))

    def domains(self) -> list[str]:
        return sorted(self.files)

    def splits(self, domain: str) -> list[str]:
        check_domain_name(domain)
        if domain not in self.files:
            raise unknown_domain(domain, self.domains(), self.data)
        there = [*self.files[domain], *lacking(self.files[domain])]
        return [split for split in SPLITS if split in there]

    def held_out(self, domain: str, split: str) -> bool:
        """Whether the split has no file, and is found among the training rows."""
        return split in lacking(self.files[domain])

    def read(self, domain: str, split: str) -> Iterator[str]:
        return iter(self.text(domain, split, BEGINNING, Count()))

    def text(self, domain: str, split: str, place: Place, count: Count) -> Text:
        """The split's text from a place on. count: takes the rows that are left out."""
        if split not in self.splits(domain):
            raise DataError(f"domain '{domain}' of {self.data} has no {split} split")
        return Text(self.files[domain], domain, split, self.reading, place, count)

    def digest(self, domain: str, split: str) -> str:
        """sha256 (hex) of the names and sizes of its files, and of what is read of them. The
        content is not known before it is read."""
        files = self.files[domain]["train" if self.held_out(domain, split) else split]
        sizes = [f"{path.name}\0{path.stat().st_size}" for path in files]
        lines = [split, repr(self.reading), *sizes]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def said(self) -> dict[str, str]:
        """What is held out, and what was left out so far."""
        said, reading = {}, self.reading
        if missing := {split for splits in self.files.values() for split in lacking(splits)}:
            names = " and ".join(split for split in SPLITS if split in missing)
            said["held_out"] = f"{reading.held_out:g} for {names}, seed {reading.held_out_seed}"
        if self.count.left_out:
            rows = f"{self.count.left_out} row{'s' * (self.count.left_out != 1)} so far"
            said["left_out"] = f"{rows}: {'; '.join(self.count.first)}"
        return said


class Text:
    """A split's text in the order of its rows, once. It knows where its last rows began."""

    def __init__(
        self,
        splits: dict[str, list[Path]],
        domain: str,
        split: str,
        reading: Reading,
        place: Place,
        count: Count,
    ) -> None:
        missing = lacking(splits)
        self.files = splits["train" if split in missing else split]
        self.held = missing if split in ("train", *missing) else []
        self.wanted = split if split in missing else "train"  # what side() calls its rows
        self.domain, self.reading, self.place = domain, reading, place
        self.count = Count() if place.counted else count
        self.began: deque[Began] = deque()

    def __iter__(self) -> Iterator[str]:
        place, count, behind = self.place, self.count, self.place.behind
        character = (place.window[0] if place.window else 0) - behind
        for file, path in list(enumerate(self.files))[place.file :]:
            first = place.row if file == place.file else 0
            rows = usable(path, self.domain, self.reading, column_of_text, count, first)
            for row, _, text in rows:
                if side(text, "train", self.held, self.reading) != self.wanted:
                    continue
                self.began.append(Began(character, file, row, count.left_out, tuple(count.first)))
                yield text[behind:]
                character, behind = character + len(text), 0

    def row_at(self, character: int) -> Began:
        """The row in which a character of the text is; those before it are forgotten."""
        while len(self.began) > 1 and self.began[1].character <= character:
            self.began.popleft()
        return self.began[0]


class Tape:
    """The tokens of a domain's training text, behind `prefix`, in order from a place on."""

    def __init__(
        self,
        source: StreamedText,
        domain: str,
        tokenizer: Any,
        prefix: Sequence[int],
        place: Place = BEGINNING,
    ) -> None:
        """Rows that are left out are counted in source.count. DataError for a tokeniser that takes
        a document only as a whole."""
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"task.streaming: a {type(tokenizer).__name__} tokenises a text only as a whole, "
                "in memory: remove task.streaming, or set task.tokenizer to one with a "
                "tokenizer.json"
            )
        source.count = self.count = Count({}, place.left_out, list(place.named))
        self.began, self.prefix = place, np.asarray(prefix, dtype=np.int64)
        self.text = source.text(domain, "train", place, self.count)
        after = Piece(self.prefix, *place.window) if place.window else None
        self.pieces = pieces(self.text, tokenizer, after)
        self.piece: Piece | None = None
        self.ids, self.taken = np.empty(0, dtype=np.int64), 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens; fewer at the end of the text."""
        parts: list[np.ndarray] = []
        while count > 0 and (self.taken < len(self.ids) or self._go_on()):
            parts.append(self.ids[self.taken : self.taken + count])
            self.taken += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate([*parts, np.empty(0, dtype=np.int64)])

    def place(self) -> Place:
        """Where take() goes on."""
        if self.piece is None:
            return self.began
        piece = self.piece
        row = self.text.row_at(piece.start)
        known = self.again() if self.began.counted else row
        return Place(
            row.file,
            row.row,
            piece.start - row.character,
            (piece.start, piece.first),
            self.taken,
            known.left_out,
            known.named,
            self.began.counted,
        )

    def again(self) -> Place:
        """The beginning of the text, once it was read to its end: nothing is counted twice."""
        return Place(left_out=self.count.left_out, named=tuple(self.count.first), counted=True)

    def _go_on(self) -> bool:
        found = next(self.pieces, None)
        if found is None:
            return False
        begins = found.start == found.first == 0
        self.ids = np.concatenate([self.prefix, found.ids]) if begins else found.ids
        self.taken = self.began.taken if self.piece is None else 0
        self.piece = found
        # for what it forgets: `began` would grow with the text
        self.text.row_at(found.start)
        return True
