"""The images whose attention is shown while a model trains: the same ones from the first step to the last.

Notable: they are a function of the split alone, so a resumed run and runs with other seeds show the same images, and
two runs can be compared side by side.
"""

from __future__ import annotations

import base64
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit.data.dataset import ImageData, Split
from vit.data.decode import ImageError
from vit.data.preprocess import Preprocessing
from vit.training import pictures

log = logging.getLogger("vit")

_LARGEST = 256  # pixels of the longer side, as the tab gets an image
_TRIES = 4  # unreadable images are passed over, up to this many for each that is wanted


@dataclass(frozen=True)
class Probes:
    """Images to explain, n of them.

    Attributes
        images: uint8 (n, C, H, W), what the model gets before normalisation.
        labels: their classes.
        names: what to call them.
    """

    images: Tensor
    labels: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def described(self) -> list[dict[str, Any]]:
        """As the record of a run has them: name, label, and the image as PNG in base64."""
        pixels = [_png(pictures.to_rgb(image)) for image in self.images]
        found = zip(self.names, self.labels, pixels, strict=True)
        return [{"name": name, "label": label, "png": png} for name, label, png in found]


def choose_probes(data: ImageData, preprocessing: Preprocessing, count: int) -> Probes | None:
    """Up to `count` validation images (training images where there are none), as evenly over the classes as it goes.

    None where there are no images, or none that can be read.
    """
    split = data.splits["val"] if len(data.splits["val"]) else data.splits["train"]
    chosen: list[tuple[int, np.ndarray]] = []
    for i in stratified(split.labels, _TRIES * count).tolist():
        if len(chosen) == count:
            break
        try:
            chosen.append((i, split.resized(i, preprocessing)))
        except ImageError as error:
            log.debug("no probe: %s", error)
    if not chosen:
        return None
    chosen.sort(key=lambda pair: (int(split.labels[pair[0]]), pair[0]))
    pixels = np.stack([image for _, image in chosen])
    return Probes(
        images=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        labels=[int(split.labels[i]) for i, _ in chosen],
        names=[_name(split, i) for i, _ in chosen],
    )


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """The first `count` indices (or all) of an order that takes one image of every class, then a second, and so on.

    Which of a class comes first, and which class, looks random and never changes.
    """
    n = len(labels)
    order = np.lexsort((_mixed(np.arange(n)), labels))  # class by class
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    turn = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
    return order[np.lexsort((_mixed(labels[order]), turn))[:count]]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A number for each that looks random (Knuth's multiplicative hash)."""
    return numbers.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)


def _name(split: Split, i: int) -> str:
    # of a path the folder and the file: enough to find it, and the tab has little room
    return "/".join(split.name(i).replace("\\", "/").split("/")[-2:])


def _png(image: Image.Image) -> str:
    side = max(image.size)
    if side > _LARGEST:
        size = (max(1, round(image.width * _LARGEST / side)), max(1, round(image.height * _LARGEST / side)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
