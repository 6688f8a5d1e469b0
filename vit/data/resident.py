"""Images that fit on the device: all of them there as uint8, no work per image.

Notable:
- An epoch is one permutation, a batch one `index_select`: no workers, no copies from the host, no Python per image.
- uint8 takes a quarter of the float32 that the model takes; 50,000 colour images of 32x32 are 150 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vit import processors
from vit.data.batches import Batch
from vit.data.dataset import Split
from vit.data.preprocess import Preprocessing
from vit.errors import VitError


class ResidentImages:
    """Holds the images and labels of a split on one device: a `vit.data.batches.Source`.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), on the same device.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.index_device = images.device

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, epoch: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Select the images of each batch."""
        for index, valid in parts:
            yield Batch(self.images.index_select(0, index), self.labels.index_select(0, index), index, valid)

    def close(self) -> None:
        """Do nothing: there are no workers."""

    @classmethod
    def load(cls, split: Split, preprocessing: Preprocessing, device: torch.device | str) -> ResidentImages:
        """Decode a whole split and put it on the device. Raises `VitError` when its free memory cannot hold it."""
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
        # channels move on the device, where that is quick
        return cls(images.to(device).contiguous(), labels)


def resident_bytes(split: Split, preprocessing: Preprocessing) -> int:
    """Compute the bytes that the split's images take as uint8, at the model's size."""
    height, width = preprocessing.image_size
    return len(split) * height * width * preprocessing.channels


def free_memory(device: torch.device | str) -> int | None:
    """Return the free bytes on the device, None where that cannot be known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu":
        return None
    return processors.free_memory()


def _tensor(array: np.ndarray) -> Tensor:
    """Wrap the array as a tensor; copy it where it is read-only, since a tensor may be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
