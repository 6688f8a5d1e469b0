"""Loaders for data sets that fit on the device: all images there as uint8, nothing done per image.

Notable:
- An epoch is one permutation, a batch one `index_select`: no workers, no copies from the host, no Python per image.
- uint8 is a quarter of the float32 that the model takes; 50,000 colour images of 32x32 are 150 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vit.data.batches import Batch, EvalLoader, TrainLoader
from vit.data.dataset import Split
from vit.data.preprocess import Preprocessing
from vit.errors import VitError


class ResidentTrainLoader(TrainLoader):
    """Shuffled batches of resident images."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        paired: bool = False,
    ) -> None:
        super().__init__(len(images), batch_size, seed=seed, rank=rank, world_size=world_size, paired=paired)
        self.images, self.labels = images, labels
        local = self.batch_size // world_size
        self._valid = torch.ones(local, dtype=torch.bool, device=images.device)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for index in self._order(epoch, self.images.device)[start:]:
            yield Batch(self.images.index_select(0, index), self.labels.index_select(0, index), index, self._valid)


class ResidentEvalLoader(EvalLoader):
    """Resident images in order."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(len(images), batch_size, rank=rank, world_size=world_size)
        self.images, self.labels = images, labels

    def _batches(self) -> Iterator[Batch]:
        device = self.images.device
        for index, valid in self._parts():
            index = index.to(device)
            yield Batch(self.images.index_select(0, index), self.labels.index_select(0, index), index, valid.to(device))


def resident_bytes(split: Split, preprocessing: Preprocessing) -> int:
    """What the split's images take as uint8, at the model's size."""
    height, width = preprocessing.image_size
    return len(split) * height * width * preprocessing.channels


def resident_tensors(split: Split, preprocessing: Preprocessing, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Put a whole split on the device: uint8 (N, C, H, W) and int64 (N,).

    Raises `VitError` when the device's free memory cannot hold it.
    """
    needed, free = resident_bytes(split, preprocessing), free_memory(device)
    # on a CPU the decoded array and the one with channels first exist together for a moment
    if free is not None and needed * (2 if torch.device(device).type == "cpu" else 1) > free:
        raise VitError(
            f"data.resident=true: the images need {needed / 2**30:.1f} GiB on {device}, where "
            f"{free / 2**30:.1f} GiB are free; data.resident=false streams them"
        )
    array = split.array(preprocessing)
    labels = torch.tensor(np.asarray(split.labels), dtype=torch.int64, device=device)
    images = _tensor(array).permute(0, 3, 1, 2)
    if torch.device(device).type == "cpu":
        return images.contiguous(), labels
    # channels move on the device, where that is quick
    return images.to(device).contiguous(), labels


def free_memory(device: torch.device | str) -> int | None:
    """Free bytes on the device, None where that cannot be known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor, copied where it is read-only (a tensor that may be written to must not lie on it)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
