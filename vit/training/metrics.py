"""Measure throughput and training metrics, and read them from the device now and then.

Notable: only this module reads the training module's sums.  The progress line and TensorBoard read them here, so the
device is synchronised once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L

_READ_EVERY = 2.0  # between readings where steps are slow


class Throughput(L.Callback):
    """Count training images and seconds of training, without validation and checkpoints.

    Attributes:
        images: training images of all processes so far, including those before a resume.
        resumed_images: training images before the resume.
        seconds: wall-clock seconds in training steps, including the wait for data.
    """

    def __init__(self) -> None:
        self.images = self.resumed_images = 0
        self.seconds = 0.0
        self._running_since: float | None = None

    @property
    def state_key(self) -> str:
        return "Pace"  # the name in existing checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images = self.resumed_images = int(state_dict["images"])
        self.seconds = float(state_dict["seconds"])

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @staticmethod
    def wait_seconds(module: Any) -> float:
        """Return the seconds that this process has waited for batches so far."""
        return float(module.loader.wait_seconds)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._running_since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch.labels) * trainer.world_size
        self._add_elapsed(keep_running=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._add_elapsed(keep_running=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._running_since = None

    def _add_elapsed(self, keep_running: bool) -> None:
        now = time.perf_counter()
        if self._running_since is not None:
            self.seconds += now - self._running_since
        self._running_since = now if keep_running else None


@dataclass(frozen=True)
class StepMetrics:
    """Hold means over the steps since the previous reading.

    Attributes:
        step: number of optimiser steps.
        loss, top1, top5: metrics of this process's augmented training images.
        images_per_second: throughput of all processes, without validation.
        wait_fraction: fraction of the time that this process waited for data.
    """

    step: int
    loss: float
    top1: float
    top5: float
    images_per_second: float
    wait_fraction: float


class TrainMetrics(L.Callback):
    """Read the training module's sums at every `every`-th step, or every two seconds if steps are slow.

    In the trainer's callbacks it stands after `throughput` and before its readers.  Raises `TrainingFailed` on every
    process if a loss was not finite.

    Attributes:
        logged: the metrics at the last multiple of `every`, or at the last step of training; None before the first.
        latest: the newest metrics, which cover the steps since `logged`.
    """

    def __init__(self, every: int, throughput: Throughput) -> None:
        self.throughput, self.every = throughput, max(1, every)
        self.logged: StepMetrics | None = None
        self.latest: StepMetrics | None = None
        self._step = 0
        self._read = 0.0
        self._totals = [0.0] * 4  # loss, top-1 and top-5 times images, images
        self._last_totals = (0, 0.0, 0.0)  # images, seconds, wait seconds at `logged`

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._read = time.monotonic()
        self._last_totals = (self.throughput.images, self.throughput.seconds, self.throughput.wait_seconds(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are being accumulated
            return
        self._step = step
        due = step % self.every == 0
        if due or time.monotonic() - self._read >= _READ_EVERY:
            self._read_metrics(pl_module, log=due)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.logged is None or self.logged.step != self._step:
            self._read_metrics(pl_module, log=True)

    def _read_metrics(self, module: Any, log: bool) -> None:
        sums = module.read_sums()
        self._read = time.monotonic()
        n = sums["images"]
        for i, key in enumerate(("loss", "top1", "top5")):
            self._totals[i] += sums[key] * n
        self._totals[3] += n
        if not self._totals[3]:
            return
        loss, top1, top5 = (total / self._totals[3] for total in self._totals[:3])
        totals = (self.throughput.images, self.throughput.seconds, self.throughput.wait_seconds(module))
        images, seconds, waited = (a - b for a, b in zip(totals, self._last_totals, strict=True))
        seconds = max(seconds, 1e-9)
        self.latest = StepMetrics(self._step, loss, top1, top5, images / seconds, min(1.0, max(0.0, waited / seconds)))
        if log:
            self.logged, self._totals, self._last_totals = self.latest, [0.0] * 4, totals
