"""The catalogue of data sets, and the one function that opens them.

Notable:
- `CATALOGUE` is the whole list: a line each, with its default sizes and the function that opens it, imported when
  it is used.
- `DataConfig` is every key of `data.*`, checked before anything is read.
- `open_data` does what all data sets have in common: the class map, the debug cap, the record of where it came from.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from unicodedata import normalize

import numpy as np

from vit.data.assemble import quote_names
from vit.data.counter_rng import shuffled
from vit.data.dataset import SPLITS, ImageData, Split
from vit.data.filetype import UNDECODED
from vit.data.memory import NAME as MEMORY
from vit.data.memory import Gathered, open_gathered
from vit.data.parallel import for_each
from vit.data.preprocess import CROP_MODES, INTERPOLATIONS, Preprocessing
from vit.data.run_splits import restore_splits
from vit.data.splits import stratified_sample
from vit.data.walk import describe
from vit.errors import VitError, did_you_mean
from vit.options import convert, list_keys, option, unknown_key_message

log = logging.getLogger("vit")

_EXACT_BYTES = 2 * 2**30
_SAMPLE = 4096


@dataclass(frozen=True)
class Entry:
    """Describes one data set of the catalogue."""

    summary: str
    opener: str  # "module:function" under vit.data, called with (config, class_names, scan_limit)
    image_size: int
    channels: int
    patch_size: int
    batch_size: int


# name: summary, opener, image size, channels, patch size, batch size
CATALOGUE: dict[str, Entry] = {
    "digits": Entry("1,797 handwritten digits, 8x8 grey; ships with scikit-learn", "small_sets:digits", 16, 1, 4, 128),
    "fashion_mnist": Entry("70,000 garments in 10 classes, 28x28 grey", "small_sets:fashion_mnist", 28, 1, 4, 128),
    "cifar10": Entry("60,000 pictures in 10 classes, 32x32", "torchvision_sets:cifar10", 32, 3, 4, 128),
    "cifar100": Entry("60,000 pictures in 100 classes, 32x32", "torchvision_sets:cifar100", 32, 3, 4, 128),
    "stl10": Entry("13,000 pictures in 10 classes, 96x96", "torchvision_sets:stl10", 96, 3, 8, 128),
    "flowers102": Entry("8,189 photographs of 102 flowers", "torchvision_sets:flowers102", 224, 3, 16, 64),
    "oxford_pets": Entry("7,349 photographs of 37 breeds", "torchvision_sets:oxford_pets", 224, 3, 16, 64),
    "food101": Entry("101,000 photographs of 101 dishes", "torchvision_sets:food101", 224, 3, 16, 128),
    "imagenet": Entry("ImageNet-1k, from its train and val folders", "imagenet:imagenet", 224, 3, 16, 1024),
    "folder": Entry("your own images, one folder a class", "folder:folder", 224, 3, 16, 64),
    "parquet": Entry("images in Parquet files, as on the Hugging Face hub", "parquet:parquet", 224, 3, 16, 64),
    "shapes": Entry("generated: coloured shapes on noise, with their boxes", "shapes:shapes", 64, 3, 8, 128),
}

ENTRIES = {**CATALOGUE, MEMORY: Entry("images given from Python (vit.train)", "", 224, 3, 16, 64)}


@dataclass(frozen=True)
class DataConfig:
    """Holds every key of `data.*`.

    0 (or None) for a size means the data set's own, from the catalogue; it is filled in on construction.
    Raises `VitError`, naming the key, for a value that cannot be.
    """

    name: str = option("digits", "of the data set", choices=tuple(ENTRIES))
    root: str | None = option(None, "folder of the files; null: the cache folder, where downloads go", path=True)
    image_size: int | tuple[int, int] = option(0, "pixels, or [height, width], of the model's input", ge=0)
    channels: int = option(0, "of the model's input: 1 grey, 3 colour", ge=0)
    patch_size: int | tuple[int, int] = option(0, "pixels; what the model's patch_size follows", ge=0)
    batch_size: int = option(0, "images a step, over all processes", ge=0)
    eval_batch_size: int = option(0, "images at a time where nothing is learned; 0: at least 256", ge=0)
    val_fraction: float = option(0.1, "share held out of train, where there is no official validation", ge=0, le=1)
    test_fraction: float = option(0.2, "share held out of all, where there is no official test", ge=0, le=1)
    split_seed: int = option(0, "which images are held out; does not move with the run's seed", ge=0)
    max_bad_fraction: float = option(0.01, "a larger share of unreadable images stops the run", ge=0, le=1)
    resident: str | bool = option("auto", "all images on the training device as uint8", choices=("auto",))
    workers: str | int = option("auto", "processes that decode images that are not resident", choices=("auto",), ge=0)
    cache: bool = option(False, "keep images decoded on the disk: each is decoded once, training reads them from there")
    cache_side: int | None = option(
        None, "their shorter side, for random crops; null: 8/7 of image_size; smaller images stay as they are", ge=1
    )
    cache_folder: str | None = option(None, "where they are kept; null: images in the cache folder", path=True)
    mean: tuple[float, ...] | None = option(None, "per channel, of values in 0..1; null: measured on train")
    std: tuple[float, ...] | None = option(None, "per channel, of values in 0..1; null: measured on train", gt=0)
    interpolation: str = option("bicubic", "how images are resized", choices=INTERPOLATIONS)
    crop_pct: float = option(1.0, "images are resized to image_size / crop_pct, and the centre kept", gt=0, le=1)
    crop_mode: str = option("center", "fit the shorter side, both sides, or the longer side", choices=CROP_MODES)
    download: bool = option(True, "fetch what is not there")
    max_images: int | None = option(None, "at most this many a split, stratified, to try things; null: all", ge=1)
    objects: int = option(1, "shapes: objects of a class; of two, the larger names the image", ge=1, le=2)
    object_scale: float = option(0.1, "shapes: share of the image that an object takes", gt=0, le=1)
    clutter: int = option(0, "shapes: objects of kinds that are no class", ge=0)
    train_images: int = option(10_000, "shapes: how many to train on", ge=1)
    val_images: int = option(1_000, "shapes: how many to validate on", ge=0)
    test_images: int = option(2_000, "shapes: how many to test on", ge=0)
    kinds: tuple[str, ...] | None = option(None, "shapes: which are the classes; null: the first six")
    image_column: str | None = option(None, "parquet: column of the images; null: found")
    label_column: str | None = option(None, "parquet: column of the labels; null: found")
    content: str | None = option(None, "memory: fingerprint of the images given from Python, which a run stores")

    def __post_init__(self) -> None:
        entry = ENTRIES.get(self.name) if isinstance(self.name, str) else None
        if entry is None:
            raise VitError(f"data.name={self.name!r}: no such data set; {did_you_mean(str(self.name), CATALOGUE)}")
        given = {key.name: getattr(self, key.name) for key in list_keys(DataConfig)}
        for name in ("image_size", "channels", "patch_size", "batch_size"):
            given[name] = given[name] or getattr(entry, name)
        given["eval_batch_size"] = given["eval_batch_size"] or max(given["batch_size"], 256)
        if isinstance(self.root, os.PathLike):
            given["root"] = os.fspath(self.root)
        for key in list_keys(DataConfig):
            object.__setattr__(self, key.name, convert(f"data.{key.name}", given[key.name], key.type, key.rule))
        if min(self.size) < 1:
            raise VitError(f"data.image_size: expected pixels or [height, width], got {self.image_size!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.channels):
                raise VitError(f"data.{name}: expected {self.channels} numbers, one a channel, got {len(values)}")

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of the model's input."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> DataConfig:
        """Invert `to_dict`. Raises `VitError` for an unknown key or a value that cannot be."""
        if not isinstance(values, Mapping):
            raise VitError(f"data: expected a dictionary, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise VitError(unknown_key_message(f"data.{key}", [f"data.{name}" for name in known]))
        return cls(**values)


def open_data(
    config: DataConfig,
    class_names: Sequence[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    given: Gathered | None = None,
    scan_limit: int | None = None,
) -> ImageData:
    """Open the data set that `config` describes.

    Args:
        config: which data set, and how to split it.
        class_names: the classes of an already trained model.  The data's classes are then matched to them by name:
            labels index this list, classes that the data lacks are reported, and a class that the model does not
            know is refused.
        splits: the file that says which image is in which split, of the run that `class_names` are of.
        given: the images themselves, where they come from Python (`vit.data.memory`).
        scan_limit: refuse a data set of which more images than this would have to be decoded to open it; None for
            any number.

    Raises:
        VitError: files that are missing or unreadable, a layout that is not understood, fewer than two classes, or
            classes that do not match; the message says what was expected and where.
    """
    data = _opened(config, None if class_names is None else list(class_names), given, scan_limit)
    if class_names is not None:
        data = match_classes(data, list(class_names))
    elif len(data.class_names) < 2:
        only = f" ({data.class_names[0]!r})" if data.class_names else ""
        raise VitError(f"data={config.name} has one class only{only}: a classifier needs at least two")
    data.source = config.to_dict()
    if config.root is not None:
        data.source["root"] = os.path.abspath(config.root)
    if splits is not None:
        data = restore_splits(splits, data)
    elif config.max_images is not None:
        for name, split in data.splits.items():
            data.splits[name] = split.subset(stratified_sample(split.labels, config.max_images, config.split_seed))
    if not any(len(split) for split in data.splits.values()):
        raise VitError(f"data={config.name} holds no images")
    _report(data)
    return data


def _opened(
    config: DataConfig, class_names: list[str] | None, given: Gathered | None, scan_limit: int | None
) -> ImageData:
    if config.name == MEMORY:
        return open_gathered(given, config, class_names)
    if given is not None:
        raise VitError(f"that run was trained on data={config.name}, not on images from Python: leave the data out")
    module, function = ENTRIES[config.name].opener.split(":")
    return getattr(importlib.import_module(f"vit.data.{module}"), function)(config, class_names, scan_limit)


def match_classes(data: ImageData, class_names: list[str]) -> ImageData:
    """Relabel `data` by the position of its class names in `class_names`.  Raises `VitError` where one is not there."""
    if data.class_names == class_names:
        return data
    present = np.sum(list(data.counts().values()), axis=0)
    # an accent may be a letter's own or one behind it: names of either kind are the same
    named = [normalize("NFC", name) for name in data.class_names]
    modelled = [normalize("NFC", name) for name in class_names]
    used = [name for k, name in enumerate(named) if present[k]]
    unknown = [name for name in used if name not in modelled]
    if unknown:
        missing = [name for name in modelled if name not in used]
        raise VitError(
            f"the classes of data={data.name} do not match the model's: the model does not know {quote_names(unknown)}"
            + (f"; the data does not have {quote_names(missing)}" if missing else "")
        )
    twice = [name for name in used if modelled.count(name) > 1]
    if twice:
        raise VitError(
            f"the model has several classes called {quote_names(twice)}: data={data.name} cannot be matched by name"
        )
    position = {name: k for k, name in enumerate(modelled)}
    table = np.array([position.get(name, -1) for name in named], dtype=np.int64)
    for split in data.splits.values():
        split.labels = table[split.labels]
        if split.object_labels is not None:
            split.object_labels = np.where(split.object_labels >= 0, table[split.object_labels.clip(min=0)], -1)
    data.class_names = class_names
    return data


def _report(data: ImageData) -> None:
    """Log the sizes of splits and classes, and the files passed over."""
    counts = data.counts()
    for name in SPLITS:
        absent = [data.class_names[k] for k in np.flatnonzero(counts[name] == 0)]
        if len(data.splits[name]) and absent:
            log.warning("%s: no %s images of %s; labels are not affected", data.name, name, quote_names(absent))
    sizes = ", ".join(f"{len(data.splits[name]):,} {name}" for name in SPLITS)
    log.info("%s: %s images in %d classes", data.name, sizes, len(data.class_names))
    log.info("%s: %s", data.name, _class_sizes(data.class_names, np.sum(list(counts.values()), axis=0)))
    if data.passed_over:
        lost = any(kind in UNDECODED for kind in data.passed_over)
        log.log(logging.WARNING if lost else logging.INFO, "passed over: %s", describe(data.passed_over))


def _class_sizes(names: Sequence[str], counts: np.ndarray, limit: int = 10) -> str:
    """Format the classes with their numbers of images; of many, the first ones, the smallest and the largest."""
    if len(names) <= limit:
        order, words = list(range(len(names))), [""] * len(names)
    else:
        order = [*range(limit - 3), int(counts.argmin()), int(counts.argmax())]
        words = [""] * (limit - 3) + ["..., fewest: ", "most: "]
    return ", ".join(f"{word}{names[k]!r} {counts[k]:,}" for k, word in zip(order, words, strict=True))


def statistics(split: Split, preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the per-channel mean and standard deviation of a split's preprocessed pixels, as fractions of 255.

    Exact where all images share one size and take at most 2 GiB (such data is resident in training), and for up to
    4,096 images; else over 4,096 images drawn with a fixed seed.  A constant channel gets a deviation of 1/255, so
    that dividing by it is harmless.  Raises `VitError` for an empty split or an image that cannot be read.
    """
    if not len(split):
        raise VitError("the mean and standard deviation of no images cannot be measured; set data.mean and data.std")
    height, width = preprocessing.image_size
    channels = preprocessing.channels
    total = np.zeros(channels, dtype=np.int64)
    squares = np.zeros(channels, dtype=np.int64)
    lock = threading.Lock()

    def add(pixels: np.ndarray) -> None:
        pixels = pixels.reshape(-1, channels)
        # integers: no rounding, whatever the order
        first, second = pixels.sum(axis=0, dtype=np.int64), np.einsum("nc,nc->c", pixels, pixels, dtype=np.int64)
        with lock:
            np.add(total, first, out=total)
            np.add(squares, second, out=squares)

    if split.native_size is not None and len(split) * height * width * channels <= _EXACT_BYTES:
        whole = split.array(preprocessing, keep=True)  # the loader will want it, too
        for start in range(0, len(whole), 256):
            add(whole[start : start + 256])
    else:
        if len(split) > _SAMPLE:
            split = split.subset(np.sort(shuffled(len(split), 0, 0)[:_SAMPLE]))
        for_each(lambda i: add(split.resized(i, preprocessing)), range(len(split)), len(split), "Measuring colours")
    count = len(split) * height * width
    mean = [int(t) / count for t in total]
    # integers up to here: the difference of two large squares loses nothing
    variance = [(int(s) * count - int(t) ** 2) / count**2 for s, t in zip(squares, total, strict=True)]
    std = [max(math.sqrt(v), 1.0) for v in variance]
    return tuple(m / 255.0 for m in mean), tuple(s / 255.0 for s in std)


def preprocessing_for(config: DataConfig, data: ImageData) -> Preprocessing:
    """Make the preprocessing that `config` asks for; measure mean and deviation on the training split if not given."""
    mean, std = config.mean, config.std
    given = Preprocessing(
        image_size=config.size,
        channels=config.channels,
        mean=mean or (),
        std=std or (),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )
    if mean is not None and std is not None:
        return given
    measured = statistics(data.splits["train"], given)
    return replace(given, mean=mean or measured[0], std=std or measured[1])
