"""Checkpoints: written whole or not at all, read as weights only, describing themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vit.errors import VitError
from vit.files import atomic_write
from vit.inference.description import Description


def save(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of plain containers and tensors; on a full disk the file of that name stays as it was.

    Raises `VitError`.
    """
    with atomic_write(path) as part:
        try:
            torch.save(checkpoint, part)
        except RuntimeError as error:  # torch's writer reports a full disk as this
            raise VitError(f"cannot write {os.fspath(path)}: {str(error).splitlines()[0]}") from error


def describe(path: str | os.PathLike[str], description: Description) -> None:
    """Put a new description (temperature, figures) into a checkpoint that `save` wrote."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["vit"] = checkpoint["vit"] | description.to_dict()
    save(path, checkpoint)


class WholeFiles(TorchCheckpointIO):
    """Lightning's file access through `save`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(path, checkpoint)


def checkpoint_callbacks(folder: Path, monitor: str | None) -> list[ModelCheckpoint]:
    """Keep `best.ckpt` by `monitor`, and `last.ckpt`; without validation data both are the latest.

    The last one is kept by a callback of its own: `save_last` beside a monitor leaves it as old as the best.
    """
    mode = "min" if monitor and monitor.endswith("loss") else "max"
    shared: dict[str, Any] = dict(dirpath=folder, auto_insert_metric_name=False, enable_version_counter=False)
    if monitor is None:
        return [ModelCheckpoint(filename="best", save_last=True, save_on_train_epoch_end=True, **shared)]
    best = ModelCheckpoint(filename="best", monitor=monitor, mode=mode, save_on_train_epoch_end=False, **shared)
    return [best, ModelCheckpoint(filename="last", save_on_train_epoch_end=False, **shared)]
