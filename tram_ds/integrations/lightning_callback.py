"""Lightning's Trainer, with a step of Algorithm 1 where it would take one of its optimizer.

Its loop runs training_step once a batch, and the hook optimizer_step once an accumulation of them,
which is what it counts. While a fit lasts the two are ours: the first keeps the batch, the second
takes the step.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.integrations import saved
from tram_ds.integrations.refusals import refuse_lightning
from tram_ds.integrations.same_run import made


class TramCallback(Callback):
    """Among Trainer's callbacks. algorithm, seed and further options as of wrap().

    forward: (model, batch) -> Output or (loss_sum, count, logits), instead of the module's
    training_step, which is not called; model is the module, or the DistributedDataParallel around
    it. gradient_clip_val clips the second gradient. Checkpoints hold the references and the count
    of steps. ValueError, before the first step, names what cannot be trained right. stepper: of
    the fit that runs or ran last.
    """

    def __init__(
        self, algorithm: Any = "tram_prev", forward: Any = None, *, seed: int = 0, **options: Any
    ) -> None:
        if forward is None:
            raise ValueError(
                "TramCallback needs forward=, (model, batch) -> (loss_sum, count, logits (N, C)): "
                "a loss alone has no distance; tram_ds.integrations.causal_lm is one"
            )
        self.algorithm, self.forward, self.seed, self.options = algorithm, forward, seed, options
        self.stepper: Stepper | None = None
        self.skipped_steps = 0
        self._probe = EpsilonProbe(full=False)
        self._batches: list[Any] = []
        self._loaded: dict[str, Any] | None = None
        self._made: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_lightning(trainer, pl_module)
        self.stepper, self.skipped_steps, self._batches = None, 0, []
        # on the instance, over the class's: teardown() deletes them, and those are back
        pl_module.training_step = self._keep  # type: ignore[method-assign]
        pl_module.optimizer_step = self._step  # type: ignore[method-assign]
        # or Lightning would run backward on the zero of _keep(), and zero_grad() around it
        trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = True
        self._trainer, self._module = trainer, pl_module

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            del pl_module.training_step, pl_module.optimizer_step
            trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is made, and not loaded yet."""
        self._made = made(trainer.optimizers[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is wrapped, weights and optimizer are loaded."""
        # 0 is no clipping, as None is
        options, clip_norm = self.options, trainer.gradient_clip_val or None
        self.stepper = wrap(
            trainer.strategy.model,
            trainer.optimizers[0],
            self.algorithm,
            seed=self.seed,
            clip_norm=clip_norm,
            **options,
        )
        if self._loaded is not None:
            there = self._loaded
            where = "the checkpoint"
            told, pieces = there.get("told"), there.get("pieces", {})
            saved.continued(self.stepper, told, pieces, where, self._made)
            self._loaded = None
        elif trainer.global_step:
            raise ValueError(
                f"fit continues at step {trainer.global_step} and nothing was loaded of the steps "
                "of TRAM before: resume from a checkpoint of a run with TramCallback, or fit with "
                "a new Trainer"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch that is kept makes no gradient that DistributedDataParallel could wait for."""
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = False

    def state_dict(self) -> dict[str, Any]:
        if self.stepper is None:
            return {}
        # copies: Lightning's AsyncCheckpointIO writes them while the next step goes on
        pieces = {name: piece.clone() for name, piece in saved.pieces(self.stepper).items()}
        return {"told": saved.told(self.stepper, self._made), "pieces": pieces}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    def _keep(self, batch: Any, *_: Any) -> Tensor:
        self._batches.append(batch)
        return torch.zeros((), device=self._module.device)

    def _step(self, _epoch: int, _index: int, _optimizer: Any, closure: Any = None) -> None:
        closure()  # keeps the last batch
        batches, self._batches = self._batches, []
        assert self.stepper is not None
        report = self.stepper.step(batches, self._autocast, probe=self._probe)
        self.skipped_steps += report.skipped
        found = {"loss": report.loss, "distance": report.distance, "radius": report.radius}
        found |= {"grad_norm": report.grad_norm, **self._probe.values}
        logged = {f"tram/{name}": value.float() for name, value in found.items()}
        self._module.log_dict(logged | {"tram/skipped_steps": float(self.skipped_steps)})

    def _autocast(self, model: Any, batch: Any) -> Any:
        with self._trainer.precision_plugin.train_step_context():
            return self.forward(model, batch)
