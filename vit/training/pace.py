"""How fast training goes, and what it waits for."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L


class Pace(L.Callback):
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
