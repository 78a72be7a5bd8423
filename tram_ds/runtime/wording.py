"""How every message shows a value, and says which known word was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


def short(value: Any, limit: int = 60) -> str:
    """A value for a one-line message."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))  # a tensor or a module prints several lines
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: Exception) -> str:
    """Libraries' messages go on for paragraphs; ours end in a way out."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def hint(word: Any, known: Iterable[str], close: float = 0.6) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=close)
    return f"; did you mean '{lowered[near[0]]}'?" if near else ""
