"""Stop training on Ctrl-C or SIGTERM: finish the step and write a checkpoint.

Notable:
- There is no validation first: a cluster may wait only seconds after SIGTERM, and an extra validation could choose
  another best checkpoint.
- An interrupted validation starts again in the resumed run.
- Several processes agree about once a second whether to stop, so all stop after the same step.
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
_UNSTARTED_BATCH = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class Stopped(Exception):
    """Training was interrupted, and its checkpoint is written."""


class Interrupt(L.Callback):
    """End training after the current step on the first SIGINT or SIGTERM; a second one stops at once.

    A context manager that handles both signals.  It must be the last callback, so that the others have processed the
    last step.  Raises `Stopped` out of `Trainer.fit`.

    Args:
        checkpoint: the file to write, `last.ckpt`.
        validates: whether there is validation data.
        is_leader: whether this is the first process.

    Attributes:
        signal: the signal that ended the run, or None.
    """

    def __init__(self, checkpoint: Path, *, validates: bool = True, is_leader: bool = True) -> None:
        self.checkpoint, self.validates, self.is_leader = checkpoint, validates, is_leader
        self.signal: int | None = None
        self._raises = self._stop_agreed = self._mid_validation = self._saved = False
        self._previous: dict[int, Any] = {}
        self._batches, self._every, self._since = 0, 1, time.monotonic()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.is_leader:  # other processes keep the handlers until they exit
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raise_on_signal(self) -> Iterator[None]:
        """Raise `KeyboardInterrupt` for a signal in the body, or for one that came before."""
        self._raises = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, frame: Any) -> None:
        repeated, self.signal = self.signal is not None, number
        if not self.is_leader:
            return
        if repeated or self._raises:
            raise KeyboardInterrupt
        # not with logging: the signal may have come during a log call
        with contextlib.suppress(OSError):
            os.write(2, b"stopping after this step; a checkpoint follows (press Ctrl-C again to stop at once)\n")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's SIGTERM handler ends other processes in the middle of a step, and synchronises before each step;
        # its handler of SLURM's requeue signal stays
        trainer._signal_connector._sigterm_notifier_fn = lambda *args: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = batch_idx + 1 >= trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # a checkpoint does not hold accumulated gradients
        if not self._should_stop(trainer):
            return
        if not last and not trainer.should_stop:
            self._save_and_stop(trainer)
        elif not self.validates or (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            trainer.should_stop = (
                True  # the checkpoint is written at the end of this epoch; else after a step of the next
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._should_stop(trainer):
            self._save_and_stop(trainer, mid_validation=True)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self._should_stop(trainer):
            self._save_and_stop(trainer, mid_validation=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._mid_validation:  # the resumed run starts the validation again
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress |= {"total": dict(_UNSTARTED_BATCH), "current": dict(_UNSTARTED_BATCH), "is_last_batch": False}

    def _save_and_stop(self, trainer: L.Trainer, *, mid_validation: bool = False) -> None:
        # if a budget ends in the middle of an epoch, a resumed run would train one more step; so finish the last
        # validation, with a checkpoint before it
        ending = mid_validation and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not self._saved:
            self._mid_validation = mid_validation
            trainer.save_checkpoint(self.checkpoint)
            self._mid_validation, self._saved = False, True
        if not ending:
            raise Stopped

    def _should_stop(self, trainer: L.Trainer) -> bool:
        """Return whether to stop here; the result is the same in every process."""
        if self._stop_agreed or trainer.world_size == 1:
            return self.signal is not None
        self._batches += 1
        if self._batches < self._every:
            return False
        seconds_per_batch = (time.monotonic() - self._since) / self._batches
        every = min(1000, max(1, int(_AGREE_SECONDS / max(seconds_per_batch, 1e-6))))
        request = torch.tensor([float(self.signal or 0), -float(every)], device=trainer.strategy.root_device)
        number, every = (int(value) for value in trainer.strategy.reduce(request, reduce_op="max").tolist())
        self._batches, self._every, self._since = 0, -every, time.monotonic()
        if number:
            self._stop_agreed, self.signal = True, number
        return bool(number)
