"""`tram`: which command, its options, its exit code, and the one line of what went wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import tram_ds
from tram_ds.cli import completion
from tram_ds.runtime import terminal
from tram_ds.runtime.launchers import tell_launcher

COMMANDS = (
    *("quickstart", "train", "evaluate", "compare", "analyze", "sweep"),
    *("export", "doctor", "plan", "submit", "sync", "benchmark", "verify_gpu"),
)
# their process groups' threads (DeepSpeed's, gloo's) can abort the interpreter's own way out
GROUPS = ("train", "evaluate", "analyze", "doctor")

KEYED = ("quickstart", "train", "evaluate", "analyze", "sweep", "doctor", "plan", "submit")
Choices = dict[str, argparse.ArgumentParser]

INTRO = """Trust Region Aware Minimization, and every method it is compared with, on sharded
training engines.

    tram quickstart                       # minutes on two CPU cores, nothing downloaded
    tram train --recipe quickstart.yaml
    torchrun --nproc_per_node 8 -m tram_ds train --recipe m2d2_gpt2xl.yaml engine=fsdp2
    deepspeed --num_gpus 4 --module tram_ds train --recipe m2d2_gpt2xl.yaml
"""


def tram() -> NoReturn:
    """The installed program."""
    _leave(main(sys.argv[1:]), sys.argv[1:])


def script(name: str) -> NoReturn:
    """launch/NAME.py: that command alone, its help in the spelling of a checkout."""
    words = [name, *sys.argv[1:]]
    _leave(main(words, checkout=True), words)


def main(words: Sequence[str], checkout: bool = False) -> int:
    """The exit code of one command line, without the program's name. What goes wrong is one line
    on stderr."""
    terminal.guard()
    words = _command_first(words)
    whole, commands = parsers(checkout)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may stand here
        completion.complete(whole)
    if not words or words[0] not in commands:
        whole.parse_args(words)
        whole.print_help()
        return 0
    try:
        # intermixed: argparse else takes all overrides at the first place where one may stand, and
        # refuses those behind the next flag
        options = _expanded(commands[words[0]].parse_intermixed_args(_understood(words)))
    except ValueError as error:
        return _failed(error)
    start = ["python", f"launch/{words[0]}.py"] if checkout else ["tram", words[0]]
    options.command = [*start, *words[1:]]
    try:
        code = _module(words[0]).run(options)
    except Exception as error:
        return _failed(error)
    if code:
        tell_launcher(words[0], code)
    return code


def parsers(checkout: bool = False) -> tuple[argparse.ArgumentParser, Choices]:
    """The parser of `tram`, and by name those of its commands."""
    shape = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("tram", description=INTRO, formatter_class=shape)
    whole.add_argument("--version", action="version", version=f"tram_ds {tram_ds.__version__}")
    added = whole.add_subparsers(title="commands", metavar="COMMAND")
    choices: Choices = {}
    for name in COMMANDS:
        module = _module(name)
        text = module.__doc__ or ""
        choices[name] = added.add_parser(
            name,
            prog=f"{name}.py" if checkout else f"tram {name}",
            help=" ".join(text.split("\n\n")[0].split()).partition(": ")[0],
            description=in_checkout(text) if checkout else text,
            formatter_class=shape,
        )
        module.options(choices[name])
    return whole, choices


def in_checkout(text: str) -> str:
    """`tram NAME` and `-m tram_ds NAME` as the scripts of a checkout, launch/NAME.py."""
    names = "|".join(COMMANDS)
    text = re.sub(rf"(?:--module|-m) tram_ds ({names})\b", r"launch/\1.py", text)
    return re.sub(rf"\btram ({names})\b", r"python launch/\1.py", text)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tram_ds.cli.{name}")


def _command_first(words: Sequence[str]) -> list[str]:
    """`deepspeed --module tram_ds train ...` starts `tram_ds --local_rank=0 train ...`."""
    ahead = [word for word in words[:1] if word.startswith("--local_rank=")]
    return [*words[len(ahead) :][:1], *ahead, *words[len(ahead) :][1:]]


def _understood(words: Sequence[str]) -> list[str]:
    """A command's words with `--train.steps=3` as `train.steps=3`. ValueError for a flag that is
    another library's name of a recipe key."""
    from tram_ds.recipe import aliases

    found = []
    for word in words[1:]:
        flag, _, _ = word.partition("=")
        if flag.startswith("--") and re.fullmatch(r"--[a-z_]+(\.[a-z_0-9]+)+", flag):
            word = word.removeprefix("--")
        elif words[0] in KEYED and flag.startswith("--") and (ours := aliases.key(flag[2:])):
            raise ValueError(f"{flag}: {ours}; recipe keys are written section.key=value")
        found.append(word)
    return found


def _expanded(options: argparse.Namespace) -> argparse.Namespace:
    """`~` as the home it stands for in every path; a shell leaves it in `--out=~/x`. ValueError."""
    from tram_ds.runtime.paths import expanded

    for name, value in vars(options).items():
        if isinstance(value, Path):
            flag = name if name == "run_dir" else f"--{name.replace('_', '-')}"
            setattr(options, name, Path(expanded(str(value), flag)))
    return options


def _failed(error: Exception) -> int:
    """Says what went wrong, once a job where every rank finds the same mistake; the exit code."""
    from tram_ds.runtime.exits import USAGE, code_of

    expected = USAGE if isinstance(error, ValueError) else code_of(error)
    tell_launcher(f"error: {error}", 1 if expected is None else expected)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if expected is None:
        traceback.print_exception(error)
    # a mistake in the recipe is found by every rank; a lost peer or a broken disk is one's own
    elif rank == "0" or expected != USAGE:
        print(f"error: {error}", file=sys.stderr)
    return 1 if expected is None else expected


def _leave(code: int, words: Sequence[str]) -> NoReturn:
    # os._exit flushes nothing
    sys.stdout.flush()
    sys.stderr.flush()
    if any(name in GROUPS for name in _command_first(words)[:1]):
        os._exit(code)  # all is written and closed
    sys.exit(code)
