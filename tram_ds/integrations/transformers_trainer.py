"""transformers' Trainer, with a step of Algorithm 1 where it would take one of its optimizer.

Its loop calls training_step once a micro-batch and its optimizer once a window of them. Here a
window's batches are kept until the last of them, and then make one step together; the optimizer's
own turn, clipping included, was inside it and is passed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.stepper import Stepper, UserForward, wrap
from tram_ds.integrations import deepspeed_plugin, saved
from tram_ds.integrations.own_loss import forward_of, refuse_other_loss
from tram_ds.integrations.refusals import refuse, refuse_recomputation
from tram_ds.integrations.same_run import made


class TramTrainer(Trainer):
    """Trainer, and two arguments more.

    algorithm: a row, or it and its options, as of wrap(): {"name": "tram_x", "sigma": 0.2}.
    forward: as of Stepper.step; None: that of the model's class, for causal language models and
    classifiers, whose loss is compared with the model's own before the first step.

    The loss is the mean over the counted targets of the window on all ranks; max_grad_norm clips
    the second gradient; the learning rate is Trainer's, whose scheduler does not move after a step
    that was skipped because it was not finite. ValueError, here or before the first step, names
    what cannot be trained right. stepper, report: of the last step; None before the first.
    """

    def __init__(
        self,
        *args: Any,
        algorithm: Any = "tram_prev",
        forward: UserForward | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.algorithm, self.forward = algorithm, forward
        self.stepper: Stepper | None = None
        self.report: StepReport | None = None
        self.skipped_steps = 0
        self._probe = EpsilonProbe(full=False)
        self._window: list[Any] = []
        self._resumed: str | None = None
        self._made: dict[str, Any] | None = None
        refuse(self, own_forward=forward is not None)
        deepspeed_plugin.set_clip_norm(self.accelerator, self.args.max_grad_norm)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.stepper, self.report, self._window, self._resumed = None, None, [], None
        self.skipped_steps, self._made = 0, None
        # a step that raised has left it, and accelerate loads no optimizer into one that may not
        # step
        self._synchronised()
        try:
            return super().train(*args, **kwargs)
        finally:
            # the next run of this trainer begins as a new one does
            self._synchronised()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """0 for every micro-batch of a window but the last, which returns the loss of all."""
        model.train()
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        stepper, forward = self._prepared(model, window)
        deepspeed_plugin.note_skipped(self.optimizer, False)
        self.report = stepper.step(window, forward, probe=self._probe)
        self.skipped_steps += self.report.skipped
        # The optimizer has stepped: accelerate passes over its turn where nothing was synchronised,
        # and Trainer over the scheduler's where the optimizer says that it did not step.
        self.accelerator.gradient_state._set_sync_gradients(False)
        deepspeed_plugin.note_skipped(self.optimizer, self.report.skipped)
        # Trainer adds it to an fp32 sum on its device, and refuses one of another
        return self.report.loss.to(self.args.device, torch.float32)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What accelerate passes over was the optimizer's turn, and nothing behind it."""
        self._synchronised()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _synchronised(self) -> None:
        self.accelerator.gradient_state._set_sync_gradients(True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A training record gets what the last step was: distance, radius, the norm of epsilon."""
        if "grad_norm" in logs and self.report is not None:
            logs["grad_norm"] = float(self.report.grad_norm)
            for name in ("distance", "radius", "perturbed_loss"):
                logs[name] = float(getattr(self.report, name))
            for name, value in self._probe.values.items():
                logs[name] = float(value)
            logs["skipped_steps"] = float(self.skipped_steps)
        super().log(logs, start_time)

    def _prepared(self, model: nn.Module, window: list[Any]) -> tuple[Stepper, UserForward]:
        """At the first step, when Trainer has wrapped the model and loaded what it resumes."""
        bare: Any = self.accelerator.unwrap_model(model)
        forward = self.forward or forward_of(bare)
        if self.stepper is None:
            refuse_recomputation(self.accelerator, model)
            if self._made is None:
                self._made = made(deepspeed_plugin.bare(self.optimizer))
            prepared: Any = self.optimizer
            self.stepper = wrap(
                model,
                prepared.optimizer,
                self.algorithm,
                seed=self.args.seed,
                # 0: Trainer does not clip
                clip_norm=self.args.max_grad_norm or None,
            )
            if self._resumed is not None:
                saved.load(self.stepper, Path(self._resumed), self._made)
            if self.forward is None:
                # after loading, so that the weights it is compared at are those that train
                world_size = self.stepper.engine.world_size
                refuse_other_loss(forward, model, window[0], world_size)
        return self.stepper, forward

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Behind accelerate's preparation and before a checkpoint is loaded: the optimizer is noted
        as it is made."""
        if optimizer is None:
            self._made = made(deepspeed_plugin.bare(self.optimizer))
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.stepper is not None:
            assert self._made is not None
            saved.save(self.stepper, Path(output_dir), self._made)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # read at the first step: there is no stepper yet, and no wrapped model
        self._resumed = checkpoint
