"""Text of a config as bash in a job script: what is one word whatever it is, what is expanded, what
must not be written there."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

from tram_ds.recipe.file import RecipeError
from tram_ds.runtime.checked import refusal
from tram_ds.runtime.redact import is_secret_key, redact
from tram_ds.runtime.wording import short

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)\}|(?P<bare>[A-Za-z_]\w*))")
_COMMAND = re.compile(r"`|\$[({]")
# Set by SLURM for every task: in the job script, which expands a value once, they are those of the
# batch step, so that every rank would get rank 0's.
_OF_A_TASK = re.compile(
    r"SLURM_(PROCID|LOCALID|NODEID|STEP\w*|TASK_PID)|SLURMD_NODENAME|(LOCAL_)?RANK"
)
_SHELL_VALUE = re.compile(r"\$\([^()]*\)|\$\{[^{}]*\}|\$\w+")
_HOME = re.compile(r"(^|[:=])~(?=[/:]|$)")  # where a shell would expand it, and after an option's =
_FLAG_VALUE = re.compile(rf"--?[\w-]+\s+[\"']?(?:{_SHELL_VALUE.pattern})[\"']?")
# `exec` with a command: the job script would be that command, and never come to the training
_EXEC = re.compile(r"(?:^|[;&|(]|\b(?:then|do|else)\s)\s*exec\s+(?:-\w+\s+)*[^\s<>&\d{-]")
_A_PLACE = re.compile(r"\w*_(PATH|FILE|DIR)", re.IGNORECASE)


def word(value: Any) -> str:
    """One word of bash with exactly this text. RecipeError where it has a line break in it."""
    text = str(value)
    if not text.isprintable():
        raise RecipeError(
            f"{short(text)}: has a line break or control character in it, and would go into a job "
            "script"
        )
    return shlex.quote(text)


def expanded(value: str) -> str:
    """One word of bash in which `$NAME` and `${NAME}` are what they are in the job, and the rest
    stands as it is."""
    text, end = "", 0
    for found in _VARIABLE.finditer(value):
        before, end = value[end : found.start()], found.end()
        text += (word(before) if before else "") + f'"${{{found["braced"] or found["bare"]}}}"'
    return text + (word(value[end:]) if value[end:] or not text else "")


def check_expanded(value: str) -> str:
    """The value, where `expanded` is right for it, with `~` as `$HOME`; else refused with the way
    out."""
    value = _HOME.sub(r"\1$HOME", value)
    for found in _VARIABLE.finditer(value):
        name = found["braced"] or found["bare"]
        if _OF_A_TASK.fullmatch(name):
            text = (
                f"${name} differs from rank to rank, and this is expanded once for all of them, in "
                "the job script: use $SLURM_JOB_ID, or a name that does not depend on the rank"
            )
            raise refusal(("", text))
    if _COMMAND.search(_VARIABLE.sub("", value)):
        text = (
            "only $NAME and ${NAME} are expanded here: for more than that write the whole "
            "`export NAME=...` as a line of slurm.setup"
        )
        raise refusal(("", text))
    return value


def check_setup(line: str) -> str:
    """The line, where it is a whole command: whether it failed is asked after each of them."""
    done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
    continued = (len(line) - len(line.rstrip("\\"))) % 2
    if done.returncode or done.stderr or continued:
        said = done.stderr.strip().splitlines()
        why = f" ({said[-1].rpartition(': ')[2]})" if said else ""
        raise refusal(
            ("", f"is not a whole command of bash{why}: one line each, or a script to source")
        )
    if _EXEC.search(line):
        text = "would end the job script in place of the training: leave out `exec`"
        raise refusal(("", text))
    return line


def secret_in(text: str) -> bool:
    """Whether something secret is written out in this text. A variable or the output of a command
    in its place is none."""
    without = _SHELL_VALUE.sub("", _FLAG_VALUE.sub("", text))
    # what a removed value leaves between its quotes
    without = re.sub(r"\"\"|''", "", without)
    places = " ".join(
        part for part in re.split(r"[\s;]+", without) if not _A_PLACE.match(part.partition("=")[0])
    )
    return redact(places) != places


def secret_name(name: str, value: str) -> bool:
    """Whether a variable of this name with this value holds a secret: not where the value is a
    place, or another variable."""
    place = _A_PLACE.fullmatch(name) and "/" in value
    return bool(is_secret_key(name, value) and not place and _SHELL_VALUE.sub("", value))
