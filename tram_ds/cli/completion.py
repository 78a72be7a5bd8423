"""What a shell offers at a half-written word, by argcomplete: commands and flags from the parsers,
recipes by name, keys of a recipe. `eval "$(register-python-argcomplete tram)"` turns it on."""

from __future__ import annotations

import argparse
import glob
from typing import Any


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell that asked, and ends the process; returns where none did."""
    import argcomplete

    argcomplete.autocomplete(parser)


def recipes(prefix: str, **_: Any) -> list[str]:
    """The shipped recipes, and the YAML files and folders that begin as the word does."""
    from tram_ds.recipe.file import RECIPES

    shipped = sorted(path.name for path in RECIPES.glob("*.yaml"))
    begun = glob.escape(prefix)
    return [*shipped, *glob.glob(f"{begun}*.yaml"), *glob.glob(f"{begun}*/")]


def keys(prefix: str, **_: Any) -> list[str]:
    """`section.key=` of every recipe key."""
    from tram_ds.recipe.recipe import Recipe
    from tram_ds.runtime.checked import keys_of

    sections = keys_of(Recipe)
    plain = [name for name in sections[""] if name not in sections]
    dotted = [f"{section}.{key}" for section in sections if section for key in sections[section]]
    return [f"{key}=" for key in (*plain, *dotted)]
