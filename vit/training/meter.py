"""What training shows of itself while it runs, read off the device now and then.

Notable: the one place that takes the training module's sums.  Whatever shows them (progress line, TensorBoard) reads
them here, so the device is waited for once, however many look.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L

from vit.training.pace import Pace

_SECONDS = 2.0  # between readings where steps are slow: rare enough to cost nothing, often enough to watch


@dataclass(frozen=True)
class Reading:
    """Means over the steps since the reading before.

    Attributes:
        step: optimiser steps done.
        loss, top1, top5: of augmented training images, this process's.
        images_per_second: of all processes, validation apart.
        wait_share: share of the time that this process waited for data.
    """

    step: int
    loss: float
    top1: float
    top5: float
    images_per_second: float
    wait_share: float


class Meter(L.Callback):
    """Read the training module's sums at every `every`-th step, and every two seconds where steps are slower.

    Goes after `pace` in the trainer's callbacks and before whatever reads it.  Raises `TrainingFailed` when a loss was
    not finite, on every process.

    Attributes:
        logged: the reading of the last `every`-th step, or of the last step of all; None before the first.
        latest: the newest one, which may stand in between and then covers the steps since `logged`.
    """

    def __init__(self, every: int, pace: Pace) -> None:
        self.pace, self.every = pace, max(1, every)
        self.logged: Reading | None = None
        self.latest: Reading | None = None
        self._step = 0
        self._read = 0.0
        self._totals = [0.0] * 4  # loss, top-1 and top-5 times images, images
        self._mark = (0, 0.0, 0.0)  # images, seconds, seconds of waiting, at the last logged reading

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._read = time.monotonic()
        self._mark = (self.pace.images, self.pace.seconds, self.pace.waiting(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are being accumulated
            return
        self._step = step
        due = step % self.every == 0
        if due or time.monotonic() - self._read >= _SECONDS:
            self._take(pl_module, log=due)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.logged is None or self.logged.step != self._step:
            self._take(pl_module, log=True)

    def _take(self, module: Any, log: bool) -> None:
        sums = module.take_sums()
        self._read = time.monotonic()
        n = sums["images"]
        for i, key in enumerate(("loss", "top1", "top5")):
            self._totals[i] += sums[key] * n
        self._totals[3] += n
        if not self._totals[3]:
            return
        loss, top1, top5 = (total / self._totals[3] for total in self._totals[:3])
        now = (self.pace.images, self.pace.seconds, self.pace.waiting(module))
        images, seconds, waited = (a - b for a, b in zip(now, self._mark, strict=True))
        seconds = max(seconds, 1e-9)
        self.latest = Reading(self._step, loss, top1, top5, images / seconds, min(1.0, max(0.0, waited / seconds)))
        if log:
            self.logged, self._totals, self._mark = self.latest, [0.0] * 4, now
