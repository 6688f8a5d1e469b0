"""Which loader a split gets: resident on the device, or streamed from files.

Notable:
- `data.resident=auto` keeps a split on the device where all its images share one size and it takes at most 2 GiB;
  anything else streams. The log says which was taken and why.
- Both kinds yield the same `Batch`es in the same order and draw the same random numbers. One thing differs: resident
  images have the model's size already, so a random-resized crop is cut from those; streamed ones are cut from the
  original.
"""

from __future__ import annotations

import logging

import torch

from vit.data.augment_config import AugmentConfig
from vit.data.batches import Batch, EvalLoader, TrainLoader
from vit.data.catalogue import DataConfig
from vit.data.dataset import Split
from vit.data.preprocess import Preprocessing
from vit.data.resident import ResidentEvalLoader, ResidentTrainLoader, resident_bytes, resident_tensors
from vit.data.streaming import StreamingEvalLoader, StreamingTrainLoader
from vit.errors import VitError

__all__ = ["Batch", "EvalLoader", "TrainLoader", "eval_loader", "train_loader"]

log = logging.getLogger("vit")

RESIDENT_LIMIT = 2 * 2**30  # bytes


def train_loader(
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig,
    augment: AugmentConfig,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> TrainLoader:
    """Make the loader of a training split.

    Args:
        seed: the run's, for the order of images and for crops taken while decoding.
        rank, world_size: this process and how many there are; it gets its part of every global batch.
        device: where batches are wanted.

    Raises:
        VitError: an empty split, a batch size that the processes cannot share, or too little memory.
    """
    paired = augment.mixes
    if _resident(split, preprocessing, config, logging.INFO):
        images, labels = resident_tensors(split, preprocessing, device)
        return ResidentTrainLoader(
            images, labels, config.batch_size, seed=seed, rank=rank, world_size=world_size, paired=paired
        )
    return StreamingTrainLoader(
        split,
        preprocessing,
        config.batch_size,
        augment,
        workers=config.workers,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def eval_loader(
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> EvalLoader:
    """Make the loader of a split to evaluate on; see `EvalLoader` for what processes get. An empty split is fine."""
    if _resident(split, preprocessing, config):
        images, labels = resident_tensors(split, preprocessing, device)
        return ResidentEvalLoader(images, labels, config.eval_batch_size, rank=rank, world_size=world_size)
    return StreamingEvalLoader(
        split,
        preprocessing,
        config.eval_batch_size,
        workers=config.workers,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def _resident(split: Split, preprocessing: Preprocessing, config: DataConfig, level: int = logging.DEBUG) -> bool:
    wanted = str(config.resident).lower()
    if wanted not in ("auto", "true", "false"):
        raise VitError(f"data.resident: {config.resident!r}; choose from auto, true, false")
    size = resident_bytes(split, preprocessing)
    suits = split.native_size is not None and size <= RESIDENT_LIMIT
    taken = suits if wanted == "auto" else wanted == "true"
    log.log(
        level,
        "%d images %s (data.resident=%s, %.0f MiB at %dx%d)",
        len(split),
        "held on the device" if taken else "streamed",
        wanted,
        size / 2**20,
        *preprocessing.image_size,
    )
    return taken
