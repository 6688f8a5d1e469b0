"""Write checkpoints atomically, with a description of the model, and choose the best one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vit.files import atomic_write, explain_failed_write
from vit.inference.description import Description


def save_checkpoint(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of plain containers and tensors; on a full disk an existing file stays unchanged.

    Raises:
        CannotWrite: the file cannot be written.
    """
    with atomic_write(path) as part:
        try:
            torch.save(checkpoint, part)
        except RuntimeError as error:  # torch's writer reports a full disk as this
            raise explain_failed_write(part, path, str(error).splitlines()[0]) from error


def update_description(path: str | os.PathLike[str], description: Description) -> None:
    """Put a new description (temperature, metrics) into a checkpoint."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["vit"] = checkpoint["vit"] | description.to_dict()
    save_checkpoint(path, checkpoint)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints with the function `save_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(path, checkpoint)


def ranking_key(metrics: Mapping[str, float], monitor: str) -> tuple[float, float]:
    """Return a sort key for validation metrics, larger is better: `monitor`, then the other metric.

    Ties in accuracy go to the lower loss, ties in loss to the higher accuracy.  NaN is the worst value.
    """
    values = [metrics.get("val/top1", math.nan), -metrics.get("val/loss", math.nan)]
    first, second = (-math.inf if math.isnan(value) else value for value in values)
    return (second, first) if monitor == "val/loss" else (first, second)


class Checkpoints(Checkpoint):
    """Write `last.ckpt` after each validation and `best.ckpt` after the best one; stop early.

    Ties go to the earlier checkpoint.  Without validation data both files are the latest.  The state holds no path, so
    a run folder can be moved.

    Args:
        folder: folder of the two files.
        monitor: metric to compare, "val/top1" or "val/loss"; None: there is no validation data.
        patience: stop after this many validations in a row without a better `monitor`; None: never.

    Attributes:
        best: metrics of `best.ckpt`; empty before there is one.
        since: validations since `monitor` last improved.
    """

    def __init__(self, folder: Path, monitor: str | None, patience: int | None = None) -> None:
        self.folder, self.monitor, self.patience = folder, monitor, patience
        self.best: dict[str, float] = {}
        self.since = 0

    @property
    def state_key(self) -> str:
        return f"Checkpoints({self.monitor})"

    def state_dict(self) -> dict[str, Any]:
        return {"best_model_score": self.best.get(self.monitor or ""), "best": dict(self.best), "since": self.since}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for key, state in checkpoint["callbacks"].items():
            if key.startswith("Checkpoints("):  # the monitor may have changed
                self.best, self.since = dict(state["best"]), state["since"]
            elif key.startswith("ModelCheckpoint") and state["monitor"] == self.monitor is not None:  # version 0.1
                self.best = {self.monitor: float(state["best_model_score"])}
            elif key.startswith("EarlyStopping"):
                self.since = state["wait_count"]
        if not trainer.strategy.broadcast((self.folder / "best.ckpt").is_file()):
            self.best = {}
        if self._patience_exhausted():
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None:
            return
        metrics = {key: float(trainer.callback_metrics[key]) for key in ("val/top1", "val/loss")}
        current, previous = ranking_key(metrics, self.monitor), ranking_key({**metrics, **self.best}, self.monitor)
        # all processes must take part in saving
        better, improved = trainer.strategy.broadcast(
            (not self.best or current > previous, not self.best or current[0] > previous[0])
        )
        self.since = 0 if improved else self.since + 1
        if better:
            self.best = metrics
        trainer.should_stop = trainer.should_stop or self._patience_exhausted()
        self._save(trainer, better)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None:
            self._save(trainer, True)

    def _patience_exhausted(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def _save(self, trainer: L.Trainer, best: bool) -> None:
        for name in ("best", "last") if best else ("last",):
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")
