"""Real images for a model: what an exported file is compared with torch on, and what its integers are fitted to.

From the data set that the model was trained on, opened again by its description where it still is, or from images
that a person names.  Which images are taken depends on nothing but their order and number.  Imports no torch, but some
data sets do.
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
from vit.processors import available

COMPARED = 8
"""Images that an exported file is compared with torch on, at most."""
CALIBRATION, MEASURED = 128, 512
"""Images to fit integers to, and to measure what that costs, at most."""
LEAST = 16
"""Images that it takes for that at least: half of them to fit, half to measure."""
_ROOM = 1 << 30
"""Bytes that either may take."""
_UNKNOWN = 2000
"""Files of a data set that are looked at to open it again, at most: some seconds; those that training saw are known."""


@dataclass(frozen=True)
class Sample:
    """Images as a model takes them.

    Attributes
        images: normalised, float32 (N, C, H, W).
        labels: int64 (N,), the class of each; None where it is not known.
        origin: where they are from, in words.
    """

    images: np.ndarray
    labels: np.ndarray | None
    origin: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Sample:
        return replace(self, images=self.images[rows], labels=None if self.labels is None else self.labels[rows])


def to_compare(description: Description, sources: Sequence[str] | None = None) -> Sample:
    """Images to compare an exported file with torch on: of `sources`, or without any of the model's own data.

    Raises `VitError` when none can be used, or that data is not here.
    """
    if sources is not None:
        return from_sources(sources, description.preprocessing, COMPARED)
    return of_data(open_own(description), description.preprocessing)


def of_data(data: ImageData, preprocessing: Preprocessing) -> Sample:
    """Images to compare an exported file with torch on, of data that is open already."""
    return from_split(data, _first(data, "test", "val", "train"), preprocessing, COMPARED)


def to_quantise(description: Description, sources: Sequence[str] | None = None) -> tuple[Sample, Sample]:
    """Images to fit integers to, and others to measure on.

    The former are of `sources` or the training split.  The latter are of the test split, or where the model's own data
    is not here of `sources`.  Large images are fewer.  Raises `VitError` when there are fewer than `LEAST` images, or
    none that can be used.
    """
    preprocessing = description.preprocessing
    height, width = preprocessing.image_size
    room = max(LEAST, _ROOM // (4 * preprocessing.channels * height * width))
    to_fit, to_measure = min(CALIBRATION, room), min(MEASURED, room)
    given = None if sources is None else from_sources(sources, preprocessing, to_fit + to_measure)
    try:
        data = open_own(description)
    except VitError as error:
        if given is None:
            raise VitError(f"integers are fitted to real images: name some with --calibration ({error})") from None
        half = min(to_fit, len(given) // 2)
        fitted, measured = given[:half], given[half : half + to_measure]
    else:
        ours, held_out = _first(data, "train", "val", "test"), _first(data, "test", "val", "train")
        fitted = given[:to_fit] if given is not None else from_split(data, ours, preprocessing, to_fit)
        skip = to_fit if given is None and ours == held_out else 0
        measured = from_split(data, held_out, preprocessing, to_measure, skip)
    if min(len(fitted), len(measured)) < LEAST // 2:
        raise VitError(
            f"integers are fitted to and measured on at least {LEAST // 2} images each, not {len(fitted)} and "
            f"{len(measured)}: name more with --calibration"
        )
    return fitted, measured


def _first(data: ImageData, *names: str) -> str:
    return next(name for name in names if len(data.splits[name]))


def open_own(description: Description) -> ImageData:
    """The data set that the model was trained on.  Nothing is downloaded.

    Raises `VitError` when the description names none, it is not here, or it would take more than seconds to find out
    which of its images can be read, and so which are in what split.
    """
    if not description.data.get("name"):
        raise VitError("the model does not say which data it was trained on")
    known = {key: value for key, value in description.data.items() if value is not None}
    log = logging.getLogger("vit")
    level = log.level
    log.setLevel(logging.ERROR)  # what is missing in the data was said when it was trained on
    try:
        config = DataConfig.from_dict({**known, "download": False})
        return open_data(config, description.class_names, scan_limit=_UNKNOWN)
    finally:
        log.setLevel(level)


def from_split(data: ImageData, name: str, preprocessing: Preprocessing, count: int, skip: int = 0) -> Sample:
    """At most `count` images of the split `name`, drawn without order, leaving out the first `skip` that are drawn.

    Raises `VitError` when none of them can be read.
    """
    split = data.splits[name]
    rows = shuffled(len(split), 0, 0)[skip : skip + count]
    read = _read([(split, int(row)) for row in rows], preprocessing)
    taken = [(pixels, split.labels[row]) for pixels, row in zip(read, rows, strict=True) if pixels is not None]
    if not taken:
        raise VitError(f"no image of {data.name} ({name}) can be read")
    images = preprocessing.normalise(np.stack([pixels for pixels, _ in taken]))
    return Sample(images, np.array([label for _, label in taken]), f"{data.name}, {name} split")


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
    """Each image as uint8 (H, W, C), None for one that cannot be used."""

    def one(item: str | tuple[Split, int]) -> np.ndarray | None:
        try:
            if isinstance(item, str):
                image = decode(item, channels=preprocessing.channels, target=preprocessing.resize_target)
                return preprocessing.resize(image)
            split, row = item
            return split.resized(row, preprocessing)
        except ImageError:
            return None

    with ThreadPoolExecutor(available(), thread_name_prefix="decode") as pool:
        return list(pool.map(one, items))
