"""Checkpoints: written whole or not at all, read as weights only, describing themselves."""

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


def save(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of plain containers and tensors; on a full disk the file of that name stays as it was.

    Raises `CannotWrite`.
    """
    with atomic_write(path) as part:
        try:
            torch.save(checkpoint, part)
        except RuntimeError as error:  # torch's writer reports a full disk as this
            raise explain_failed_write(part, path, str(error).splitlines()[0]) from error


def describe(path: str | os.PathLike[str], description: Description) -> None:
    """Put a new description (temperature, figures) into a checkpoint that `save` wrote."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["vit"] = checkpoint["vit"] | description.to_dict()
    save(path, checkpoint)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's file access through `save`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(path, checkpoint)


def rank(figures: Mapping[str, float], monitor: str) -> tuple[float, float]:
    """What a validation is ordered by, larger being better: `monitor`, then of equal ones the other figure.

    Of equal accuracies the lower loss is better, of equal losses the higher accuracy.  NaN is worse than anything.
    """
    order = [figures.get("val/top1", math.nan), -figures.get("val/loss", math.nan)]
    first, second = (-math.inf if math.isnan(value) else value for value in order)
    return (second, first) if monitor == "val/loss" else (first, second)


class Checkpoints(Checkpoint):
    """Write `last.ckpt` after every validation, `best.ckpt` where it was the best so far, and stop when none is.

    Of two that are equal in both figures the earlier one stays.  Without validation data both files are the latest.
    No path is part of the state, so a run folder can be moved.

    Args
        folder: of the two files.
        monitor: what decides, "val/top1" or "val/loss"; None: there is no validation data.
        patience: stop after this many validations in a row without a better `monitor`; None: never.

    Attributes
        best: the figures of `best.ckpt`; empty before there is one.
        since: validations since `monitor` was better than before.
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
            if key.startswith("Checkpoints("):  # perhaps of another monitor
                self.best, self.since = dict(state["best"]), state["since"]
            elif key.startswith("ModelCheckpoint") and state["monitor"] == self.monitor is not None:  # version 0.1
                self.best = {self.monitor: float(state["best_model_score"])}
            elif key.startswith("EarlyStopping"):
                self.since = state["wait_count"]
        if not trainer.strategy.broadcast((self.folder / "best.ckpt").is_file()):
            self.best = {}
        if self._patient_enough():
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None:
            return
        figures = {key: float(trainer.callback_metrics[key]) for key in ("val/top1", "val/loss")}
        now, before = rank(figures, self.monitor), rank({**figures, **self.best}, self.monitor)
        # all processes take part in saving, or none
        better, gained = trainer.strategy.broadcast(
            (not self.best or now > before, not self.best or now[0] > before[0])
        )
        self.since = 0 if gained else self.since + 1
        if better:
            self.best = figures
        trainer.should_stop = trainer.should_stop or self._patient_enough()
        self._save(trainer, better)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None:
            self._save(trainer, True)

    def _patient_enough(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def _save(self, trainer: L.Trainer, best: bool) -> None:
        for name in ("best", "last") if best else ("last",):
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")
