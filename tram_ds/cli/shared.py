"""Options that several commands have."""

from __future__ import annotations

import argparse

from tram_ds.cli import completion


def recipe(parser: argparse.ArgumentParser, more: str = "", required: bool = True) -> None:
    """--recipe. more: what this command takes from it."""
    text = f"a file, or a name in recipes/{more}"
    added = parser.add_argument("--recipe", required=required, help=text)
    added.completer = completion.recipes  # type: ignore[attr-defined] # argcomplete's


def overrides(parser: argparse.ArgumentParser, text: str = "recipe keys to change") -> None:
    """`section.key=value`, any number of them, wherever they stand."""
    added = parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    added.completer = completion.keys  # type: ignore[attr-defined]


def local_rank(parser: argparse.ArgumentParser) -> None:
    """What the deepspeed launcher adds."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def slurm_keys(words: list[str]) -> tuple[list[str], list[str]]:
    """(overrides of the SLURM config, without `slurm.`; those of the recipe)."""
    ours = [text.removeprefix("slurm.") for text in words if text.startswith("slurm.")]
    return ours, [text for text in words if not text.startswith("slurm.")]
