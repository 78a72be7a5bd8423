"""A model's configuration: from a path, or from `model.init`, with the recipe's dropout."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tram_ds.runtime.errors import DataError
from tram_ds.runtime.hub import waiting
from tram_ds.runtime.paths import refuse_missing
from tram_ds.runtime.wording import first_line

WAY_OUT = (
    "give a folder with the files, or a hub name that is reachable or already in the hub "
    "cache (HF_HUB_OFFLINE=1)"
)


def load_config(section: Any, **overrides: Any) -> PretrainedConfig:
    """The model's configuration, no weights read. `section` is the recipe's model section.
    DataError where there is none, and for quantised weights.

    overrides: config fields. They win over `model.path`'s own, and are only defaults under what
    `model.init` sets.
    """
    if section.path is None:
        config = _fresh_config(dict(section.init or {}), overrides)
    else:
        refuse_missing(section.path, "model.path")
        try:
            with waiting(section.path, "model.path"):
                config = AutoConfig.from_pretrained(
                    section.path, revision=revision(section), trust_remote_code=False, **overrides
                )
        except (OSError, ValueError) as error:
            raise DataError(
                f"model.path '{section.path}' has no usable config: {first_line(error)}; {WAY_OUT}"
            ) from error
        _refuse_quantised(config, section.path)
    if getattr(section, "dropout", None) is not None:
        _set_dropout(config, float(section.dropout))
    # or the model would keep and return past keys and values, for nobody
    config.use_cache = False
    return config


def _refuse_quantised(config: PretrainedConfig, path: str) -> None:
    """DataError for a config of quantised weights. They would be read as what they are not, codes
    without their scales, or round epsilon away."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    told = found if isinstance(found, dict) else found.to_dict()
    raise DataError(
        f"model.path '{path}' holds quantised weights (quantization_config: "
        f"{told.get('quant_method', 'of no name')}), in which a perturbation is lost: give the "
        "checkpoint that they were made from, or write this one out in bfloat16 (dequantize() and "
        "save_pretrained of transformers); a quantised base under adapters is for wrap()"
    )


def _fresh_config(init: dict[str, Any], defaults: dict[str, Any]) -> PretrainedConfig:
    architecture = init.pop("architecture", None)
    if architecture is None:
        raise DataError("the model section needs path, or init with an architecture such as gpt2")
    if architecture not in CONFIG_MAPPING:
        raise DataError(
            f"model.init.architecture '{architecture}' is "
            f"unknown{_near(architecture, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[architecture]
    renamed = dict(config_class.attribute_map or {})
    known = set(config_class().to_dict()) | set(renamed) | {"num_labels"}
    for name in init:
        if name not in known:
            raise DataError(
                f"model.init.{name} is not a field of {config_class.__name__}{_near(name, known)}"
            )
    given = {renamed.get(name, name) for name in init}
    added = {name for name in defaults if name in known and renamed.get(name, name) not in given}
    values = init | {name: defaults[name] for name in added}
    try:
        return AutoConfig.for_model(architecture, **values)
    except (TypeError, ValueError) as error:
        raise DataError(f"model.init does not make a {architecture} config: {error}") from error


def _set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Every dropout probability of the config that is a number; None means "as another field", and
    stays."""
    for name, value in config.to_dict().items():
        is_dropout = name.endswith("_pdrop") or ("dropout" in name and "layer" not in name)
        if is_dropout and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, probability)


def revision(section: Any) -> str:
    """Of a hub name; a folder has none, and transformers does not look at it then."""
    return section.revision or "main"


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
