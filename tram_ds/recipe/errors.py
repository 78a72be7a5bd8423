"""Turns pydantic's report into lines a user can act on: where, which key and value, what is
allowed, did you mean."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from tram_ds.recipe import aliases
from tram_ds.recipe.file import RecipeError, Source
from tram_ds.recipe.model_section import REMOTE_CODE
from tram_ds.runtime.checked import problems


def explain(error: ValidationError, model: type[BaseModel], source: Source) -> RecipeError:
    """One line per problem, in the order of the sections."""
    found = problems(
        error,
        model,
        source.data,
        never={"trust_remote_code": REMOTE_CODE, **aliases.refusals()},
        theirs=aliases.VALUES,
        hidden=("tracking.uri",),  # it may hold credentials
    )
    lines = (f"{source.where(path)}: {line}" for path, line in found)
    return RecipeError("\n".join(dict.fromkeys(lines)))
