"""A tiny made-up text source for smoke runs and tests: instant, needs nothing, the same on every
machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

from tram_ds.data.sources import check_domain_name, unknown_domain
from tram_ds.runtime.errors import DataError

DOMAINS = ("animals", "colours", "numbers", "weather")
LINES = {"train": 400, "valid": 60, "test": 60}
SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "zu",
    "an",
    "er",
    "in",
)


class GeneratedSource:
    """Lines of made-up words. A domain draws them from a vocabulary of its own, half of it common
    to all domains."""

    def domains(self) -> list[str]:
        return list(DOMAINS)

    def splits(self, domain: str) -> list[str]:
        self._check(domain)
        return list(LINES)

    def read(self, domain: str, split: str) -> Iterator[str]:
        self._check(domain, split)
        return (_line(domain, split, number) for number in range(LINES[split]))

    def digest(self, domain: str, split: str) -> str:
        return hashlib.sha256("".join(self.read(domain, split)).encode()).hexdigest()

    def _check(self, domain: str, split: str = "train") -> None:
        check_domain_name(domain)
        if domain not in DOMAINS:
            raise unknown_domain(domain, DOMAINS, "generated")
        if split not in LINES:
            raise DataError(
                f"domain '{domain}' of generated has no {split} split; it has {', '.join(LINES)}"
            )


def _line(domain: str, split: str, number: int) -> str:
    words = [_word("common", i) for i in range(30)] + [_word(domain, i) for i in range(30)]
    draws = hashlib.sha256(f"{domain}/{split}/{number}".encode()).digest()[: 6 + number % 9]
    # squared: the first words, common to all domains, come most often; a byte of 255 gives word 59
    return " ".join(words[draw * draw * len(words) >> 16] for draw in draws) + ".\n"


@cache
def _word(domain: str, index: int) -> str:
    draws = hashlib.sha256(f"{domain}:{index}".encode()).digest()
    return "".join(SYLLABLES[draw % len(SYLLABLES)] for draw in draws[: 2 + draws[5] % 2])
