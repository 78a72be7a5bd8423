"""What the tests of recipes share: the shipped ones, and the shortest that loads."""

from __future__ import annotations

from pydantic import BaseModel

from tram_ds.recipe.file import ROOT
from tram_ds.recipe.recipe import Recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = """\
task: {name: language_modeling, data: installed_docs}
model: {init: {architecture: gpt2}}
algorithm: sam
optimizer: {lr: 1e-5}
train: {steps: 10, global_batch: 8, micro_batch: 2}
"""


def section_models() -> dict[str, type[BaseModel]]:
    """The models of the recipe tree by key; "" is the recipe's own."""
    fields = {"": Recipe} | {key: field.annotation for key, field in Recipe.model_fields.items()}
    return {k: m for k, m in fields.items() if isinstance(m, type) and issubclass(m, BaseModel)}
