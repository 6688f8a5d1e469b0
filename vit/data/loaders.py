"""Makes the loader of a split, and chooses its source: resident, decoded on the disk, or streamed from files.

Notable:
- `data.resident=auto` keeps a split on the device where all its images share one size and it takes at most 2 GiB;
  anything else streams. The log says which was taken and why.
- `data.cache=true` decodes files once (`vit.data.store`). With random-resized crops, training then reads whole images
  somewhat larger than the model's; without them, and in validation, exactly what streaming would give.
- All sources yield the same `Batch`es in the same order and draw the same random numbers. One thing differs: a
  random-resized crop is cut from the resident image, which has the model's size already; from the stored image; in
  streaming, from the original.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vit.data.augment_config import AugmentConfig
from vit.data.batches import Batch, EvalLoader, Source, TrainLoader
from vit.data.catalogue import DataConfig
from vit.data.dataset import Split
from vit.data.preprocess import Preprocessing
from vit.data.resident import ResidentImages, resident_bytes
from vit.data.scan import cache_root
from vit.data.store import StorageSpec, Store, open_store
from vit.data.stored import StoredImages
from vit.data.streaming import RandomCrop, StreamedImages, worker_count
from vit.errors import VitError

__all__ = ["Batch", "EvalLoader", "TrainLoader", "crops_in_loader", "eval_loader", "store_images", "train_loader"]

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
    store = _store(split, preprocessing, config, crops=augment.random_resized_crop)
    resident = store is None and _resident(split, preprocessing, config, logging.INFO)
    crop = RandomCrop.of(augment, seed)
    source = _source(split, preprocessing, config, crop, store, resident, world_size, device)
    return TrainLoader(source, config.batch_size, seed=seed, rank=rank, world_size=world_size, paired=augment.mixes)


def crops_in_loader(split: Split, preprocessing: Preprocessing, config: DataConfig, augment: AugmentConfig) -> bool:
    """Say whether `train_loader` cuts random-resized crops, so that `BatchAugment` must not."""
    if not augment.random_resized_crop:
        return False
    return _store(split, preprocessing, config, crops=True) is not None or not _resident(split, preprocessing, config)


def eval_loader(
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    reused: bool = False,
) -> EvalLoader:
    """Make the loader of a split to evaluate on; see `EvalLoader` for what processes get. An empty split is fine.

    `reused`: it will be read many times, so that `data.cache` pays off; the batches are the same.
    """
    store = _store(split, preprocessing, config, crops=False) if reused else None
    resident = store is None and _resident(split, preprocessing, config)
    source = _source(split, preprocessing, config, None, store, resident, world_size, device)
    return EvalLoader(source, config.eval_batch_size, rank=rank, world_size=world_size)


def _source(
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig,
    crop: RandomCrop | None,
    store: Store | None,
    resident: bool,
    world_size: int,
    device: torch.device | str,
) -> Source:
    """Make the source of a split: its store, or resident, or streamed."""
    if store is not None:
        return StoredImages(store, crop, threads=worker_count(config.workers, None, world_size), device=device)
    if resident:
        return ResidentImages.load(split, preprocessing, device)
    workers = worker_count(config.workers, len(split), world_size)
    return StreamedImages(split, preprocessing, crop, workers=workers, device=device)


def store_images(
    splits: Mapping[str, Split], preprocessing: Preprocessing, config: DataConfig, augment: AugmentConfig
) -> None:
    """Decode the images of training and validation for `data.cache` now; the loaders made later find them.

    Call it before other processes are started, which would wait for the one that decodes. Without the key, do nothing.
    """
    _store(splits["train"], preprocessing, config, crops=augment.random_resized_crop)
    _store(splits["val"], preprocessing, config, crops=False)


def _store(split: Split, preprocessing: Preprocessing, config: DataConfig, *, crops: bool) -> Store | None:
    """Open the store of a split, of whole images for random crops; None where none is wanted, or there are no files."""
    if not config.cache:
        return None
    side = config.cache_side or -(-max(preprocessing.image_size) * 8 // 7)
    spec = StorageSpec(preprocessing, side if crops else None)
    if spec not in split.stores:
        root = Path(config.cache_folder) if config.cache_folder else cache_root() / "images"
        dataset = f"{config.name} {os.path.abspath(config.root or config.name)}"
        split.stores[spec] = open_store(split, spec, root, dataset)
        if split.stores[spec] is None and len(split):
            log.info("data.cache=true: %d images are in no files, there is nothing to decode", len(split))
    return split.stores[spec]


def _resident(split: Split, preprocessing: Preprocessing, config: DataConfig, level: int = logging.DEBUG) -> bool:
    """Say whether a split is held on the device."""
    wanted = str(config.resident).lower()
    if wanted not in ("auto", "true", "false"):
        raise VitError(f"data.resident: {config.resident!r}; choose from auto, true, false")
    size = resident_bytes(split, preprocessing)
    fits = split.native_size is not None and size <= RESIDENT_LIMIT
    resident = fits if wanted == "auto" else wanted == "true"
    log.log(
        level,
        "%d images %s (data.resident=%s, %.0f MiB at %dx%d)",
        len(split),
        "held on the device" if resident else "streamed",
        wanted,
        size / 2**20,
        *preprocessing.image_size,
    )
    return resident
