"""A step of Algorithm 1 in a loop of accelerate's: the batches of an accumulation are kept until
the last of them, and then make one step together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.stepper import UserForward, wrap
from tram_ds.integrations import deepspeed_plugin, saved
from tram_ds.integrations.refusals import refuse_accelerator, refuse_recomputation
from tram_ds.integrations.same_run import made

if TYPE_CHECKING:
    from accelerate import Accelerator


class AcceleratedStepper:
    """Around a model and an optimizer that `accelerator.prepare` has given back.

    algorithm, seed, clip_norm and further options as of wrap(); under DeepSpeed its config's
    gradient_clipping clips where clip_norm is left out. save_state() and load_state() of the
    accelerator keep what it remembers, in tram.safetensors. ValueError names what cannot be trained
    right.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        algorithm: Any = "tram_prev",
        *,
        seed: int = 0,
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        refuse_accelerator(accelerator)
        if optimizer not in accelerator._optimizers:
            raise ValueError(
                f"{type(optimizer).__name__} was not prepared by this accelerator: "
                "model, optimizer = accelerator.prepare(model, optimizer), then AcceleratedStepper"
            )
        # bound methods, ours among them, are all that accelerate keeps of who registered
        hooks = accelerator._save_model_state_pre_hook.values()
        if any(isinstance(getattr(hook, "__self__", None), AcceleratedStepper) for hook in hooks):
            raise ValueError(
                "a second AcceleratedStepper of one accelerator would write over the file of the "
                "first in save_state(): use wrap() and a place of your own"
            )
        self.accelerator, self.optimizer = accelerator, optimizer
        clip_norm = deepspeed_plugin.clip_norm(accelerator, clip_norm)
        self.stepper = wrap(
            model, optimizer.optimizer, algorithm, seed=seed, clip_norm=clip_norm, **options
        )
        # now: load_state() and schedulers change the groups that it reads
        self._made = made(deepspeed_plugin.bare(optimizer))
        self._batches: list[Any] = []
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self, batch: Any, forward: UserForward) -> StepReport | None:
        """Inside `accelerator.accumulate(model)`, instead of backward, clipping, optimizer.step()
        and zero_grad(). None until the last batch of an accumulation, which takes the step.

        scheduler.step() behind it then moves once, and not where the step was skipped.
        """
        self._batches.append(batch)
        if not self.accelerator.sync_gradients:
            return None
        batches, self._batches = self._batches, []
        # at the step, in train mode: whether dropout is active shows only there
        refuse_recomputation(self.accelerator, self.stepper.engine.module)
        deepspeed_plugin.note_skipped(self.optimizer, False)
        report = self.stepper.step(batches, forward)
        deepspeed_plugin.note_skipped(self.optimizer, report.skipped)
        return report

    def _save(self, _models: Any, _weights: Any, folder: str) -> None:
        saved.save(self.stepper, Path(folder), self._made)

    def _load(self, _models: Any, folder: str) -> None:
        """Before accelerate loads weights and optimizer, which nothing here depends on."""
        saved.load(self.stepper, Path(folder), self._made)
        self._batches = []
