"""x + z at a place inside the model, for as long as a pass lasts: its forward, and what backward
computes again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.models.randomness import StepRandomness


@dataclass(frozen=True)
class Noise:
    """x + z: where z is added ("embedding": the word embeddings' output; "pixel_values"; or a
    module of the model). relative: sigma is in units of the root mean square of x, of each
    position's vector, or of each picture."""

    site: str | nn.Module
    sigma: float
    kind: str = "normal"
    relative: bool = False


@dataclass(frozen=True)
class Added:
    """The z of one forward pass. detach: cut the graph below it. fixed: keep the graph, but let no
    gradient through, so that what lies below has one of zeros: where gradients are reduced, every
    rank waits for it."""

    noise: Noise
    draws: StepRandomness
    index: int
    detach: bool = False
    fixed: bool = False

    def to(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(
                f"noise is added to real numbers, and noise_site gives {x.dtype}: pass the module "
                "that turns them into features"
            )
        # of (step, micro-batch) alone: a recomputation in backward draws the same z
        z = self.draws.noise(x, self.index, self.noise.sigma, self.noise.kind)
        if self.noise.relative:
            z = z * rms(x)
        if self.fixed:
            return x.detach() + z + 0.0 * x
        return (x.detach() if self.detach else x) + z


def rms(x: Tensor) -> Tensor:
    """Root mean square over a position's features (..., D) or a picture's pixels (B, C, H, W), to
    be multiplied with x: no row's depends on what else is in its micro-batch."""
    own = (1, 2, 3) if x.dim() == 4 else -1
    # fp32: bf16 keeps 8 bits of a square. A scale of z, so no gradient flows through it
    return x.detach().float().square().mean(own, keepdim=True).sqrt().to(x.dtype)


@dataclass
class Conditions:
    """Under which the forward passes of a step run, told to the hooks that add the noise.

    A checkpointed block runs again inside backward, when the forward pass it belongs to is long
    over. Its conditions are those of the passes with a graph since the last backward: one, or the
    recomputation cannot know whose it is and is refused.
    """

    model: Any
    module: nn.Module
    inside: bool = False
    now: Added | None = None
    reached: bool = False
    graphs: set[tuple[Added | None, bool]] = field(default_factory=set)
    complete: bool = False  # the next forward pass with a graph is another micro-batch's
    held: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def during(self, added: Added | None, train: bool, last: bool) -> Iterator[None]:
        """One forward pass. last: the one whose objective is differentiated."""
        graph = torch.is_grad_enabled()
        if graph and self.complete:
            self.close()
        with ExitStack() as passing:
            # what a graph needs is kept until the next micro-batch's, or the end of the step
            hooks = self.held if graph else passing
            if added is not None:
                self._hook(added.noise, hooks)
            if graph and not train and not last:  # a reference with a gradient
                self._refuse_recomputation(hooks)
            self.inside, self.now, self.reached = True, added, False
            try:
                yield
                self._check(added)
            finally:
                self.inside, self.now = False, None
            if graph:
                self.graphs.add((added, train))
                self.complete = last

    def close(self) -> None:
        """No hook is left in the model."""
        self.graphs.clear()
        self.complete = False
        self.held.close()

    def _check(self, added: Added | None) -> None:
        if added is not None and not self.reached:
            raise ValueError(
                f"the noise never reached {_name(added.noise.site)}: the forward pass does not "
                "call it (is it inside a function compiled by hand?). Pass noise_site=<a module "
                "that is called>"
            )

    def _standing(self) -> Added | None:
        if self.inside:
            return self.now
        if len(self.graphs) > 1:
            raise ValueError(
                "the noise site lies in a checkpointed block, which is computed again in backward "
                "for a noised and for a clean pass alike: move noise_site out of it, or switch "
                "activation checkpointing off"
            )
        return next(iter(self.graphs), (None, True))[0]

    def _hook(self, noise: Noise, hooks: ExitStack) -> None:
        if noise.site == "pixel_values":
            handle = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
            hooks.callback(handle.remove)
            return
        site = find_site(self.module, noise.site)
        hooks.callback(site.register_forward_hook(self._after).remove)
        if _compiled(self.model, site):
            # compiled code does not look for hooks that came after it
            hooks.enter_context(torch.compiler.set_stance("force_eager"))

    def _before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        added = self._standing()
        if added is None:
            return None
        self.reached = True
        return _on_pixels(added, args, kwargs)

    def _after(self, site: nn.Module, _: Any, out: Any) -> Any:
        added = self._standing()
        if added is None:
            return None
        self.reached = True
        return _noised(added, out)

    def _refuse_recomputation(self, hooks: ExitStack) -> None:
        """A pass in eval mode with a graph: computed again, it would be in train mode."""

        def refuse(_: nn.Module, __: Any) -> None:
            if not self.inside:
                raise ValueError(
                    "the reference is in eval mode and has a gradient, and a checkpointed block "
                    "would be computed again in train mode: set the reference's mode to train, or "
                    "switch activation checkpointing off"
                )

        for m in self.module.modules():
            hooks.callback(m.register_forward_pre_hook(refuse).remove)


def _noised(added: Added, out: Any) -> Any:
    """Of a layer that returns several things the first is noised: a recurrent layer's output, a
    block's hidden states."""
    if isinstance(out, Tensor):
        return added.to(out)
    if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        return _made(type(out), [added.to(out[0]), *out[1:]])
    raise ValueError(
        f"noise_site returns a {type(out).__name__}: pass a module that returns a tensor, or a "
        "tuple whose first member is one"
    )


def _made(kind: Any, members: list[Any]) -> Any:
    return getattr(kind, "_make", kind)(members)  # a namedtuple takes its members apart


def _on_pixels(added: Added, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """New arguments with noised pixels; the caller's batch stays as it was."""
    if "pixel_values" in kwargs:
        return args, {**kwargs, "pixel_values": added.to(kwargs["pixel_values"])}
    if args and isinstance(args[0], Tensor):
        return (added.to(args[0]), *args[1:]), kwargs
    raise ValueError(
        "noise on pixel_values needs the model called with pixel_values=... or with the pixels "
        "first"
    )


def find_site(module: nn.Module, site: str | nn.Module) -> nn.Module:
    """The module whose output is x. ValueError where the model has none that is known."""
    if isinstance(site, nn.Module):
        return site._modules.get("_orig_mod", site)  # type: ignore[return-value]
    getter = getattr(module, "get_input_embeddings", None)
    found = getter() if getter is not None else None
    if found is None:
        raise ValueError(
            f"{type(module).__name__} has no input embedding to add noise to: pass "
            "noise_site=<the module whose output is x>"
        )
    return found


def _name(site: str | nn.Module) -> str:
    return site if isinstance(site, str) else f"noise_site ({type(site).__name__})"


def _compiled(model: nn.Module, site: nn.Module) -> bool:
    """Whether `site` runs inside code made by torch.compile."""
    compiled = [
        m
        for m in model.modules()
        if "_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None
    ]
    return any(site is inner for m in compiled for inner in m.modules())
