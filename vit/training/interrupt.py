"""Ctrl-C, and a cluster's SIGTERM: finish the step, write a checkpoint of it, and say how to go on.

Notable:
- Nothing is validated first: who sends SIGTERM may wait for seconds only, and a validation that an unbroken run does
  not have could choose another best checkpoint.
- A validation that is stopped is begun anew by the run that goes on.
- Several processes agree about once a second whether to stop, so all leave after the same step, whichever of them got
  the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

_AGREE_SECONDS = 1.0
_STARTED = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class Stopped(Exception):
    """Training was asked to end, and its checkpoint is written."""


class Interrupt(L.Callback):
    """End training after the current step on the first SIGINT or SIGTERM; a second one stops at once.

    A context manager: inside it both signals are answered.  Belongs at the end of the callbacks, so that the others
    have seen the step that is the last.  Raises `Stopped` out of `Trainer.fit`.

    Args
        checkpoint: the file to write, `last.ckpt`.
        validates: whether there is validation data.
        leader: whether this is the first process.

    Attributes
        signal: the signal that ended the run, None when none did.
    """

    def __init__(self, checkpoint: Path, *, validates: bool = True, leader: bool = True) -> None:
        self.checkpoint, self.validates, self.leader = checkpoint, validates, leader
        self.signal: int | None = None
        self._raises = self._agreed = self._mid_validation = self._saved = False
        self._previous: dict[int, Any] = {}
        self._batches, self._every, self._since = 0, 1, time.monotonic()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.leader:  # the others end now, and must not be ended before
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """In the body a signal raises `KeyboardInterrupt`, also one that came before."""
        self._raises = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, frame: Any) -> None:
        again, self.signal = self.signal is not None, number
        if not self.leader:
            return
        if again or self._raises:
            raise KeyboardInterrupt
        # not by logging: the signal may have come in the middle of a message
        with contextlib.suppress(OSError):
            os.write(2, b"stopping after this step; a checkpoint follows (press Ctrl-C again to stop at once)\n")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's answer to SIGTERM ends the other processes in the middle of a step, and its processes ask one
        # another before each step whether it came; what it does on SLURM's signal to requeue stays
        trainer._signal_connector._sigterm_notifier_fn = lambda *args: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = batch_idx + 1 >= trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # the gradients of half a step are in no checkpoint
        if not self._agree(trainer):
            return
        if not last and not trainer.should_stop:
            self._leave(trainer)
        elif not self.validates or (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            trainer.should_stop = True  # the end of this epoch writes the checkpoint; else a step of the next one does

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._agree(trainer):
            self._leave(trainer, mid_validation=True)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._agree(trainer):
            self._leave(trainer, mid_validation=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._mid_validation:  # begun, and no batch done: the run that goes on begins it anew
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress |= {"total": dict(_STARTED), "current": dict(_STARTED), "is_last_batch": False}

    def _leave(self, trainer: L.Trainer, *, mid_validation: bool = False) -> None:
        # a budget that ends in the middle of an epoch: a run that goes on from there would train one more step, so the
        # last validation is finished, with a checkpoint before it for whoever does not wait
        ending = mid_validation and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not self._saved:
            self._mid_validation = mid_validation
            trainer.save_checkpoint(self.checkpoint)
            self._mid_validation, self._saved = False, True
        if not ending:
            raise Stopped

    def _agree(self, trainer: L.Trainer) -> bool:
        """Whether to stop here: the same answer in every process."""
        if self._agreed or trainer.world_size == 1:
            return self.signal is not None
        self._batches += 1
        if self._batches < self._every:
            return False
        pace = (time.monotonic() - self._since) / self._batches
        every = min(1000, max(1, int(_AGREE_SECONDS / max(pace, 1e-6))))
        ours = torch.tensor([float(self.signal or 0), -float(every)], device=trainer.strategy.root_device)
        number, every = (int(value) for value in trainer.strategy.reduce(ours, reduce_op="max").tolist())
        self._batches, self._every, self._since = 0, -every, time.monotonic()
        if number:
            self._agreed, self.signal = True, number
        return bool(number)
