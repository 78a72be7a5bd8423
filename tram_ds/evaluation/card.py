"""The model card of an export, README.md: what it was trained from, on and how, its scores, and
how it is loaded.

A card belongs to its run until somebody changes it; from then on it is theirs, and is neither
replaced nor removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tram_ds.evaluation.card_loading import KINDS, loading
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.recipe import Recipe, to_dict
from tram_ds.runtime.files import write_whole
from tram_ds.runtime.redact import redact, redact_yaml
from tram_ds.runtime.run_layout import ADAPTER, CARD
from tram_ds.runtime.signed import is_signed, signed

Results = Mapping[str, Any]  # of results.json, or as much of it as is known

HERE = ("run_dir", "tracking", "checkpoint")  # sections that are of a machine, not of a model
CODE = re.compile(r"[a-z]{2,3}")  # of a language


@dataclass
class Beside:
    """What is saved beside the weights: tokenizer or image processor, and the card of what the
    folder holds. results: asked when it is written."""

    companion: Any
    recipe: Recipe
    results: Callable[[], Results]

    def save_pretrained(self, folder: Path) -> None:
        """Into a folder that has the weights already."""
        if self.companion is not None:
            self.companion.save_pretrained(folder)
        write(folder, self.recipe, self.results())


def write(folder: Path, recipe: Recipe, results: Results) -> None:
    """The card of `folder`, written whole, and that of the adapters in it. One that a person has
    written or changed stays, which is said."""
    whole = (folder / "config.json").is_file()
    inside = (folder / ADAPTER).is_dir()
    adapter = ADAPTER if inside else "" if (folder / "adapter_config.json").is_file() else None
    cards = {folder / CARD: text(recipe, results, whole=whole, adapter=adapter)}
    if inside:
        cards[folder / ADAPTER / CARD] = text(recipe, results, whole=False, adapter="")
    for path, content in cards.items():
        if path.exists() and not is_signed(path):
            print(f"{path} was written by somebody else, and is kept")
        else:
            write_whole(path, signed(content))


def text(recipe: Recipe, results: Results, *, whole: bool, adapter: str | None) -> str:
    """Markdown with the hub's metadata in front. whole, adapter: as in card_loading.loading."""
    from huggingface_hub import ModelCard

    facts = results.get("trained") or {}
    summary = (
        f"{_base(recipe, facts)}, trained with `{recipe.algorithm.name}` by tram_ds (Trust Region "
        "Aware Minimization and the methods it is compared with)"
    )
    if adapter is not None:
        summary += (
            ": low-rank adapters, merged into the weights" if whole else ": low-rank adapters"
        )
    card = ModelCard.from_template(
        _metadata(recipe, results, whole),
        template_path=str(files("tram_ds.evaluation") / "card.md.j2"),
        title=f"{recipe.name}-{recipe.algorithm.name}-{recipe.train.seed}",
        summary=f"{summary}.",
        scores=_scores(results),
        warnings=results.get("warnings") or [],
        training=[(name, value) for name, value in _training(recipe, results) if value],
        loading=loading(recipe, facts, whole=whole, adapter=adapter),
        recipe=_recipe(recipe),
    )
    return redact(str(card))


def _metadata(recipe: Recipe, results: Results, whole: bool) -> Any:
    from huggingface_hub import ModelCardData

    facts = results.get("trained") or {}
    languages = [
        name
        for name in results.get("train_domains") or []
        if recipe.task.name == "entailment" and CODE.fullmatch(name)
    ]
    return ModelCardData(
        base_model=facts.get("base_model"),
        datasets=facts.get("datasets") or None,
        language=languages or None,
        library_name="transformers" if whole else "peft",
        pipeline_tag=KINDS[recipe.task.name].pipeline,
        tags=["tram_ds", recipe.algorithm.name],
        **(facts.get("base_license") or {}),
    )


def _base(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    if base := facts.get("base_model"):
        return f"[{base}](https://huggingface.co/{base})"
    if recipe.model.path is not None:
        return f"The model `{Path(recipe.model.path).name}`"
    return f"A fresh `{(recipe.model.init or {}).get('architecture')}`"


def _scores(results: Results) -> list[dict[str, Any]]:
    """A table a split: a row a domain, those trained on marked, and the zero-shot average."""
    found = []
    trained = results.get("train_domains") or []
    for split, domains in (results.get("scores") or {}).items():
        metric = "accuracy" if "accuracy" in next(iter(domains.values())) else "perplexity"
        before = (results.get("initial") or {}).get(split) or {}
        average = ((results.get("zero_shot_average") or {}).get(split) or {}).get(metric)
        columns = (before, domains) if before else (domains,)
        rows = [
            [(f"{name} (trained)" if name in trained else name).replace("|", "\\|")]
            + [_shown((column.get(name) or {}).get(metric), metric) for column in columns]
            for name in domains
        ]
        if average is not None:
            gap = [""] if before else []
            rows.append(["zero-shot average", *gap, _shown(average, metric)])
        better = "higher" if metric == "accuracy" else "lower"
        found.append(
            {
                "metric": metric,
                "split": split,
                "before": bool(before),
                "rows": rows,
                "note": f"{'In percent, ' if metric == 'accuracy' else ''}{better} is better. One "
                "run of one seed.",
            }
        )
    return found


def _training(recipe: Recipe, results: Results) -> list[tuple[str, Any]]:
    facts, selected = results.get("trained") or {}, results.get("selected") or {}
    versions = [f"{name} {found}" for name, found in (facts.get("versions") or {}).items()]
    early, key = results.get("stopped_early"), recipe.eval.key
    chosen = f"of step {selected['step']}" if "step" in selected else ""
    chosen += f", {key} {selected[key]:.4f}" if selected.get(key) is not None else ""
    chosen += f" ({selected['weights']})" if "weights" in selected else ""
    world, lora = facts.get("world_size"), recipe.model.lora
    return [
        ("licence of the base", _licence(recipe, facts)),
        ("data", f"`{_public(recipe.task.data)}`"),
        ("data, sha256", facts.get("data_digest") and f"`{facts['data_digest']}`"),
        ("trained on", ", ".join(results.get("train_domains") or [])),
        ("weights", chosen),
        ("ended early", early and f"at step {early['step']} of {early['of']}: {early['why']}"),
        ("adapters", lora and f"r {lora.r}, alpha {lora.alpha:g}"),
        ("batch, seed", f"{recipe.train.global_batch} rows a step, seed {recipe.train.seed}"),
        ("optimizer", f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}"),
        ("working copy", f"{recipe.model.dtype}, masters float32"),
        ("ranks", world and f"{world} ({facts.get('device')}), engine {recipe.engine.name}"),
        ("code", ", ".join(versions)),
        ("commit of tram_ds", facts.get("commit")),
    ]


def _licence(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    if recipe.model.path is None:
        return ""
    named = facts.get("base_license") or {}
    if not named:
        return "not named in its files here: see its own page"
    return ", ".join([*named.values()]) + ", as its own files name it"


def _recipe(recipe: Recipe) -> str:
    data = {key: value for key, value in to_dict(recipe).items() if key not in HERE}
    data["task"].pop("cache_dir", None)
    return redact_yaml(recipe_file.write(_public(data))).rstrip("\n")


def _public(value: Any) -> Any:
    """A file of this machine by its last name: a card is read elsewhere."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:,.2f}"
