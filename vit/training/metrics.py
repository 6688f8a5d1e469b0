"""What training shows of itself while it runs, read off the device now and then.

Notable: the one place that takes the training module's sums.  Whatever shows them (progress line, TensorBoard) reads
them here, so the device is waited for once, however many look.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L

_SECONDS = 2.0  # between readings where steps are slow: rare enough to cost nothing, often enough to watch


class Throughput(L.Callback):
    """Count images, seconds spent training (validation and checkpoints apart) and seconds waiting for data.

    Attributes
        images: training images of all processes so far, in earlier parts of a resumed run too.
        earlier: how many of them were in those.
        seconds: wall-clock seconds in training steps, waiting for data included.
    """

    def __init__(self) -> None:
        self.images = self.earlier = 0
        self.seconds = 0.0
        self._running: float | None = None

    @property
    def state_key(self) -> str:
        return "Pace"  # its name in checkpoints since the first of them

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images = self.earlier = int(state_dict["images"])
        self.seconds = float(state_dict["seconds"])

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @staticmethod
    def waiting(module: Any) -> float:
        """Seconds this process's loop has waited for batches so far."""
        return float(module.loader.wait_seconds)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._running = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch.labels) * trainer.world_size
        self._lap(keep_running=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._lap(keep_running=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._running = None

    def _lap(self, keep_running: bool) -> None:
        now = time.perf_counter()
        if self._running is not None:
            self.seconds += now - self._running
        self._running = now if keep_running else None


@dataclass(frozen=True)
class StepMetrics:
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


class TrainMetrics(L.Callback):
    """Read the training module's sums at every `every`-th step, and every two seconds where steps are slower.

    Goes after `throughput` in the trainer's callbacks and before whatever reads it.  Raises `TrainingFailed` when a
    loss was not finite, on every process.

    Attributes:
        logged: the reading of the last `every`-th step, or of the last step of all; None before the first.
        latest: the newest one, which may stand in between and then covers the steps since `logged`.
    """

    def __init__(self, every: int, throughput: Throughput) -> None:
        self.throughput, self.every = throughput, max(1, every)
        self.logged: StepMetrics | None = None
        self.latest: StepMetrics | None = None
        self._step = 0
        self._read = 0.0
        self._totals = [0.0] * 4  # loss, top-1 and top-5 times images, images
        self._mark = (0, 0.0, 0.0)  # images, seconds, seconds of waiting, at the last logged reading

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._read = time.monotonic()
        self._mark = (self.throughput.images, self.throughput.seconds, self.throughput.waiting(pl_module))

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
        now = (self.throughput.images, self.throughput.seconds, self.throughput.waiting(module))
        images, seconds, waited = (a - b for a, b in zip(now, self._mark, strict=True))
        seconds = max(seconds, 1e-9)
        self.latest = StepMetrics(self._step, loss, top1, top5, images / seconds, min(1.0, max(0.0, waited / seconds)))
        if log:
            self.logged, self._totals, self._mark = self.latest, [0.0] * 4, now
