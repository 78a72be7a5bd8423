"""What a resumed run must have in common with the one that saved: the row and its options, the
seed, the clipping, and the optimizer as it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.algorithms.stepper import Stepper
from tram_ds.checkpoint.changes import changed

# of an optimizer's group: no setting, or one of how the same step is computed
NEUTRAL = {"params", "param_names", "lr", "initial_lr"}
NEUTRAL |= {"foreach", "fused", "capturable", "differentiable"}


def made(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's kind and settings, as JSON has them. Ask before a checkpoint is loaded, which
    brings those of then, and before a step, which schedulers may change them for."""
    groups = []
    for group in optimizer.param_groups:
        # as JSON, which it is compared with after a checkpoint has been through it
        found = {key: _plain(value) for key, value in group.items() if key not in NEUTRAL}
        # a scheduler keeps the rate that it multiplies, and has set the other already
        groups.append(found | {"lr": _plain(group.get("initial_lr", group["lr"]))})
    return {"name": type(optimizer).__name__, "groups": groups}


def about(stepper: Stepper, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run that is: JSON. optimizer: made() of its own."""
    return {
        "algorithm": stepper.algorithm.name,
        "seed": stepper.seed,
        "options": _options(stepper),
        "clip_norm": _plain(stepper.engine.clip_norm),
        "optimizer": dict(optimizer),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per difference, `algorithm.sigma: 0.1 -> 0.2`; then and now are of about().

    What a version did not write is taken for what it did: of an option its default; the first ones
    wrote the row and the seed, and compared no more.
    """
    found = list(_rows(then, now))
    for key in ("seed", "clip_norm"):
        if then.get(key, now[key]) != now[key]:
            found.append(f"{key}: {then[key]!r} -> {now[key]!r}")
    return [*found, *_optimizers(then.get("optimizer", now["optimizer"]), now["optimizer"])]


def _rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    names = [about["algorithm"] for about in (then, now)]
    if names[0] != names[1]:  # whose options are others
        yield f"algorithm.name: {names[0]!r} -> {names[1]!r}"
    elif "options" in then:
        yield from changed(
            *({"algorithm": {"name": names[0], **x["options"]}} for x in (then, now))
        )


def _optimizers(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that both versions of the optimizer's library have."""
    if then["name"] != now["name"]:
        return [f"optimizer: {then['name']} -> {now['name']}"]
    if len(then["groups"]) != len(now["groups"]):
        return [f"optimizer groups: {len(then['groups'])} -> {len(now['groups'])}"]
    found = [
        f"optimizer.{key}: {before[key]!r} -> {after[key]!r}"
        for before, after in zip(then["groups"], now["groups"], strict=True)
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key]
    ]
    return list(dict.fromkeys(found))


def _options(stepper: Stepper) -> dict[str, Any]:
    """By name, and a module that noise is added at by its name in the model."""
    parts = stepper.algorithm.parts.values()
    found = {key: getattr(part, key) for part in parts for key in type(part).model_fields}
    site = found.get("noise_site")
    if isinstance(site, nn.Module):
        names = (name for name, m in stepper.engine.module.named_modules() if m is site)
        found["noise_site"] = next(names, type(site).__name__)
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, bool | int | float | str)
    return value if known else type(value).__name__
