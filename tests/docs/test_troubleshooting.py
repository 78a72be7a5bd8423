"""Each message that docs/troubleshooting.md quotes is one that the code can say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def literals(tree: ast.AST) -> Iterator[str]:
    """Texts of a module as they are put together, what is filled in as NUL."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = [
    text
    for path in sorted((ROOT / "tram_ds").rglob("*.py"))
    for text in literals(ast.parse(path.read_text()))
]


def said(message: str) -> bool:
    parts = (re.escape(part) for part in message.split("…"))
    found = re.compile("[^\n]*?".join(parts))
    return any(found.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert said(message)


def test_the_page_has_messages_and_a_wrong_one_is_noticed() -> None:
    assert len(QUOTED) > 20 and not said("the moon is … full")
