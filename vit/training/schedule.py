"""Compute the progress of training, set the learning rates, and end training.

Notable: schedules are functions of one number, progress in [0, 1], whichever budget sets it: epochs, steps or time.
With several budgets the one that is spent first counts.  So a schedule always ends where training ends, also with a
time limit.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch

from vit.errors import VitError, did_you_mean

if TYPE_CHECKING:
    from vit.training.module import TrainingModule

SCHEDULES = ("cosine", "linear", "wsd", "constant")
_CLOCK_EVERY = 20  # batches between readings of the first process's clock


def lr_factor(progress: float, *, name: str, warmup: float = 0.0, cooldown: float = 0.0, final: float = 0.0) -> float:
    """Return the learning rate at `progress`, as a fraction of its peak.

    Every schedule rises linearly over the fraction `warmup` of training.  Then "cosine" falls along half a cosine to
    `final` (Loshchilov & Hutter 2017), "linear" falls linearly, "wsd" stays and falls linearly over the last fraction
    `cooldown` of training (warmup-stable-decay; Zhai et al. 2022, Hu et al. 2024), and "constant" stays.  The warmup
    starts above 0, since a step of 0 would be wasted.  Raises `VitError` for another name.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    decay_progress = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * decay_progress)) / 2
    if name == "linear":
        return final + (1 - final) * (1 - decay_progress)
    if name == "wsd":
        return final + (1 - final) * min(1.0, (1 - progress) / cooldown) if cooldown else 1.0
    if name == "constant":
        return 1.0
    raise VitError(f"schedule.name: no schedule {name!r}; {did_you_mean(name, SCHEDULES)}")


def stop_after_step(trainer: L.Trainer) -> None:
    """End training after this step, with a last validation and a checkpoint."""
    trainer.should_stop = True
    trainer.check_val_every_n_epoch = 1


class Schedule(L.Callback):
    """Set the learning rates of each step and end training when a budget is spent.

    Sets `module.progress` before every step.  `trainer.max_time` includes validation and the `spent` seconds before the
    first step (features and the linear probe), and leaves time for one last validation.  Progress counts from the first
    step.  A distributed run uses the clock of the first process.
    """

    def __init__(
        self,
        *,
        schedule: dict[str, Any],
        max_epochs: int | None,
        max_steps: int | None,
        max_time: float | None,
        spent: float = 0.0,
    ) -> None:
        self.schedule = schedule
        self.max_epochs, self.max_steps, self.max_time = max_epochs, max_steps, max_time
        self.spent_before = self.before_steps = spent
        self.validation_seconds = 0.0
        self._start = self._validation_start = 0.0
        self._batches = 0
        self._clock_reading: tuple[int, float, float] = (
            -1,
            0.0,
            0.0,
        )  # batches, fraction and fraction per batch, at the last reading

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent(), "before_steps": self.before_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent_before = float(state_dict["spent"])
        self.before_steps = float(state_dict.get("before_steps", 0.0))

    def spent(self) -> float:
        """Return the seconds of training so far, including those before a resume."""
        return self.spent_before + (time.monotonic() - self._start if self._start else 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        for group in trainer.optimizers[0].param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True  # a run that was interrupted after its last step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.max_epochs and trainer.current_epoch + 1 >= self.max_epochs:
            trainer.check_val_every_n_epoch = 1  # the last epoch is always validated

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        module: TrainingModule = pl_module
        module.progress = self.progress(trainer, batch_idx)
        scale = lr_factor(module.progress, **self.schedule)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * scale

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            stop_after_step(trainer)
        if self.max_time is not None and self.time_fraction(trainer, batch_idx) >= 1:
            stop_after_step(trainer)
        self._batches += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_seconds = time.monotonic() - self._validation_start

    def progress(self, trainer: L.Trainer, batch_idx: int) -> float:
        """Return the progress of training when this batch starts, in [0, 1]."""
        fractions = [0.0]
        if self.max_epochs:
            batches = trainer.num_training_batches
            fractions.append((trainer.current_epoch + batch_idx / max(1, int(batches))) / self.max_epochs)
        if self.max_steps:
            fractions.append(trainer.global_step / self.max_steps)
        if self.max_time is not None:
            fractions.append(self.time_fraction(trainer, batch_idx))
        return min(1.0, max(fractions))

    def time_fraction(self, trainer: L.Trainer, batch_idx: int) -> float:
        """Return the fraction of `max_time` that is spent, the same on every process.

        Several processes read the first one's clock now and then, often at first, and after each validation.  In
        between they extrapolate.
        """
        assert self.max_time is not None
        limit, n = self.max_time - self.validation_seconds - self.before_steps, self._batches
        now = (self.spent() - self.before_steps) / limit if limit > 0 else 1.0
        if trainer.world_size == 1:
            return now
        last, fraction, per_batch = self._clock_reading
        if n != last and (batch_idx == 0 or n < _CLOCK_EVERY or n % _CLOCK_EVERY == 0):
            since_start = (self.spent() - max(self.spent_before, self.before_steps)) / max(limit, 1e-9)
            clock = torch.tensor([now, since_start / max(1, n)], device=trainer.strategy.root_device)
            fraction, per_batch = trainer.strategy.broadcast(clock, 0).tolist()
            last, self._clock_reading = n, (n, fraction, per_batch)
        return fraction + (n - last) * per_batch
