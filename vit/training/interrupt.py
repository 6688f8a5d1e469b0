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

    A context manager: inside it both signals are answered, and before and after training they raise
    `KeyboardInterrupt`.  Over several processes the first decides for all, asked every 20 steps, so that none waits for
    one that left; the others ignore both signals until they end.

    Args
        leader: whether this is the first process.

    Attributes
        signal: the signal that ended the run, None when none did.
    """

    def __init__(self, leader: bool = True) -> None:
        self.leader = leader
        self.signal: int | None = None
        self._training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.leader:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.leader:
            return
        again, self.signal = self.signal is not None, number
        if again or not self._training:
            raise KeyboardInterrupt
        log.warning("stopping after this step; a checkpoint follows (press Ctrl-C again to stop at once)")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        wanted = self.signal is not None
        if trainer.world_size > 1:
            if batch_idx % _SHARE_EVERY:
                return
            wanted = bool(trainer.strategy.broadcast(wanted, 0))
        if wanted:
            stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = False
