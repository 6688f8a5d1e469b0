"""Ctrl-C, and a cluster's SIGTERM: finish the step, validate, write a checkpoint, and say how to go on."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import lightning.pytorch as L

from vit.training.schedule import stop

log = logging.getLogger("vit")
_SHARE_EVERY = 20


class Interrupt(L.Callback):
    """End training after the current step on the first SIGINT or SIGTERM; a second one stops at once.

    Over several processes the first decides for all, asked every 20 steps, so that none waits for one that left.

    Attributes
        signal: the signal that ended training, None when none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        self._leader = trainer.is_global_zero

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None and self._leader:
            raise KeyboardInterrupt
        self.signal = number
        if self._leader:
            log.warning("stopping after this step; a checkpoint follows (press Ctrl-C again to stop at once)")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        wanted = self.signal is not None
        if trainer.world_size > 1:
            if batch_idx % _SHARE_EVERY:
                return
            wanted = bool(trainer.strategy.broadcast(wanted, 0))
        if wanted:
            stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
