"""What scores and analyses are measured with: keys of the recipe, and what files beside it say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tram_ds.checkpoint.changes import FORMERLY
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.numbers import SAME_NUMBERS
from tram_ds.recipe.sections import EvalSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.run_layout import RunFolder

SECTIONS: dict[str, Any] = {"task": TaskSection, "model": ModelSection, "eval": EvalSection}
DATA = ("task.data", "task.revision")
CHOICE = ("task.train", "task.eval", "task.exclude")  # which columns there are
# keys of these sections that say how a model is trained, not how it is scored; a moving average of
# the weights is another model, scored in the same way, and scoring neither packs nor streams
TRAINING = (
    *CHOICE,
    "eval.weights",
    "task.max_train_tokens",
    "task.packing",
    "task.streaming",
    "model.activation_checkpointing",
    "model.compile",
    "model.dropout",
    "model.logits",
    "model.lora",
)
# of what an analysis found, what was measured and not asked for
MEASURED = ("value", "loss", "max_loss", "steps", "at_bound")


def scoring(recipe: Mapping[str, Any], left_out: Sequence[str] = ()) -> dict[str, str]:
    """Dotted key -> value as text, of the keys of a recipe that change what a score is, but
    left_out. A key that an earlier version of the library lacked is what that version did."""
    out = {*SAME_NUMBERS, *TRAINING, *left_out}
    found: dict[str, str] = {}
    for name, section in SECTIONS.items():
        defaults = {
            key: field.default
            for key, field in section.model_fields.items()
            if not field.is_required()
        }
        formerly = {k.partition(".")[2]: v for k, v in FORMERLY.items() if k.startswith(f"{name}.")}
        written = dict(recipe.get(name) or {})
        # a run writes every key that it reads: one that is missing is of a version without it
        for key, value in (defaults | formerly | written).items():
            if f"{name}.{key}" not in out:
                found |= _flat(f"{name}.{key}", value)
    return found


def _flat(key: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for inner, x in value.items() for k, v in _flat(f"{key}.{inner}", x).items()}
    return {key: json.dumps(value, default=str).strip('"')}


def resolved(results: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the recipe as they were where it left them to the tokenizer."""
    said = results.get("task") or {}
    return {"task.bos": str(said["bos"])} if "bos" in said else {}


def contents(results: Mapping[str, Any]) -> dict[str, str]:
    """ "DOMAIN (SPLIT)" -> digest of what a run read there; empty for one of before there was such
    a record."""
    read = (results.get("trained") or {}).get("contents") or {}
    return {
        f"{domain} ({split})": str(digest)
        for split, domains in read.items()
        for domain, digest in domains.items()
    }


def analyses(files: RunFolder) -> dict[str, dict[str, str]]:
    """Analysis -> its settings; of domains that were analysed with others, all of them."""
    if not files.analysis_report.is_file():
        return {}
    report = json.loads(files.analysis_report.read_text(encoding="utf-8"))
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for of_domain in report["domains"].values():
        for name, measured in of_domain.items():
            for key in measured.keys() - MEASURED:
                found[name][f"{name}.{key}"].add(json.dumps(measured[key]).strip('"'))
    return {
        name: {"analysed split": str(report.get("split"))}
        | {key: " and ".join(sorted(values)) for key, values in settings.items()}
        for name, settings in found.items()
    }
