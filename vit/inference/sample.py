"""Load real images for an exported file: for its comparison with torch, and for the calibration of int8.

The images come from the model's training data, opened again with its description, or from sources that a user names.
The choice of images depends only on their order and number.  Imports no torch, but some data sets do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from vit.data.catalogue import DataConfig, open_data
from vit.data.counter_rng import shuffled
from vit.data.dataset import ImageData, Split
from vit.data.decode import ImageError, decode
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.description import Description
from vit.processors import count_cpus

COMPARED = 8
"""Largest number of images for the comparison of an exported file with torch."""
CALIBRATION, MEASURED = 128, 512
"""Largest number of images to calibrate int8 with, and to measure it on."""
MIN_IMAGES = 16
"""Smallest number of images for both: half to calibrate, half to measure."""
_MAX_BYTES = 1 << 30
"""Largest size of either sample in memory."""
_SCAN_LIMIT = 2000
"""Largest number of unknown files that are read to open a data set again, which takes seconds."""


@dataclass(frozen=True)
class Sample:
    """Holds normalised images.

    Attributes:
        images: normalised images, float32 (N, C, H, W).
        labels: int64 (N,), the true classes; None if unknown.
        origin: the source of the images, as text.
    """

    images: np.ndarray
    labels: np.ndarray | None
    origin: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Sample:
        return replace(self, images=self.images[rows], labels=None if self.labels is None else self.labels[rows])


def to_compare(description: Description, sources: Sequence[str] | None = None) -> Sample:
    """Load images for the comparison with torch: from `sources`, or from the training data for None.

    Raises `VitError` when no image can be used, or the training data is not available.
    """
    if sources is not None:
        return from_sources(sources, description.preprocessing, COMPARED)
    return of_data(open_training_data(description), description.preprocessing)


def of_data(data: ImageData, preprocessing: Preprocessing) -> Sample:
    """Load images for the comparison with torch from open data."""
    return from_split(data, _first_split(data, "test", "val", "train"), preprocessing, COMPARED)


def to_quantise(description: Description, sources: Sequence[str] | None = None) -> tuple[Sample, Sample]:
    """Load images to calibrate int8 with, and others to measure it on.

    Calibration images come from `sources` or the training split.  The others come from the test split, or from
    `sources` if the training data is not available.  The number is smaller for large images.  Raises `VitError` when
    there are fewer than `MIN_IMAGES` images, or none that can be used.
    """
    preprocessing = description.preprocessing
    height, width = preprocessing.image_size
    limit = max(MIN_IMAGES, _MAX_BYTES // (4 * preprocessing.channels * height * width))
    to_fit, to_measure = min(CALIBRATION, limit), min(MEASURED, limit)
    named = None if sources is None else from_sources(sources, preprocessing, to_fit + to_measure)
    try:
        data = open_training_data(description)
    except VitError as error:
        if named is None:
            raise VitError(f"integers are fitted to real images: name some with --calibration ({error})") from None
        half = min(to_fit, len(named) // 2)
        calibration, measured = named[:half], named[half : half + to_measure]
    else:
        train, test = _first_split(data, "train", "val", "test"), _first_split(data, "test", "val", "train")
        calibration = named[:to_fit] if named is not None else from_split(data, train, preprocessing, to_fit)
        skip = to_fit if named is None and train == test else 0
        measured = from_split(data, test, preprocessing, to_measure, skip)
    if min(len(calibration), len(measured)) < MIN_IMAGES // 2:
        raise VitError(
            f"integers are fitted to and measured on at least {MIN_IMAGES // 2} images each, not "
            f"{len(calibration)} and {len(measured)}: name more with --calibration"
        )
    return calibration, measured


def _first_split(data: ImageData, *names: str) -> str:
    return next(name for name in names if len(data.splits[name]))


def open_training_data(description: Description) -> ImageData:
    """Open the data set that the model was trained on, without downloads.

    Raises `VitError` when the description names none, it is not available, or it would take more than seconds to check
    which images can be read, which decides the splits.
    """
    if not description.data.get("name"):
        raise VitError("the model does not say which data it was trained on")
    known = {key: value for key, value in description.data.items() if value is not None}
    log = logging.getLogger("vit")
    level = log.level
    log.setLevel(logging.ERROR)  # training has already reported missing files
    try:
        config = DataConfig.from_dict({**known, "download": False})
        return open_data(config, description.class_names, scan_limit=_SCAN_LIMIT)
    finally:
        log.setLevel(level)


def from_split(data: ImageData, name: str, preprocessing: Preprocessing, count: int, skip: int = 0) -> Sample:
    """Read at most `count` images of the split `name` in a random order, without the first `skip`.

    Raises `VitError` when none of them can be read.
    """
    split = data.splits[name]
    rows = shuffled(len(split), 0, 0)[skip : skip + count]
    read = _read([(split, int(row)) for row in rows], preprocessing)
    usable = [(pixels, split.labels[row]) for pixels, row in zip(read, rows, strict=True) if pixels is not None]
    if not usable:
        raise VitError(f"no image of {data.name} ({name}) can be read")
    images = preprocessing.normalise(np.stack([pixels for pixels, _ in usable]))
    return Sample(images, np.array([label for _, label in usable]), f"{data.name}, {name} split")


def from_sources(sources: Sequence[str], preprocessing: Preprocessing, count: int) -> Sample:
    """Read at most `count` images of `sources` (see `vit.inference.sources.expand_sources`), in a random order.

    Raises `VitError` when none of them can be used.
    """
    from vit.inference.sources import expand_sources

    found = [item for item in expand_sources(sources, channels=preprocessing.channels) if isinstance(item, str)]
    read = _read([found[row] for row in shuffled(len(found), 0, 0)[:count]], preprocessing)
    usable = [pixels for pixels in read if pixels is not None]
    if not usable:
        raise VitError(f"none of the {len(read)} images for calibration can be used")
    return Sample(preprocessing.normalise(np.stack(usable)), None, "the images that were named")


def _read(items: Sequence[str | tuple[Split, int]], preprocessing: Preprocessing) -> list[np.ndarray | None]:
    """Read each image as uint8 (H, W, C); None for an image that cannot be used."""

    def read_one(item: str | tuple[Split, int]) -> np.ndarray | None:
        try:
            if isinstance(item, str):
                image = decode(item, channels=preprocessing.channels, target=preprocessing.resize_target)
                return preprocessing.resize(image)
            split, row = item
            return split.resized(row, preprocessing)
        except ImageError:
            return None

    with ThreadPoolExecutor(count_cpus(), thread_name_prefix="decode") as pool:
        return list(pool.map(read_one, items))
