"""Handwritten digits and Fashion-MNIST: data sets small enough to be an array from the start.

Fashion-MNIST's files are read here, not through torchvision: they are two arrays behind a header of sixteen bytes,
and torchvision takes two seconds to import.  Its downloader is called only when there are no files.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit.data.dataset import ArrayImages, ImageData, Split
from vit.data.splits import stratified
from vit.errors import VitError

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts them


def array_split(pixels: np.ndarray, labels: np.ndarray, label: str, channels: int) -> Split:
    """Make a split whose images are `pixels`, uint8 (N, H, W, C)."""
    return Split(labels, ArrayImages(pixels, label), channels, native_size=(pixels.shape[1], pixels.shape[2]))


def with_validation(name: str, class_names: Sequence[str], train: Split, test: Split, config: DataConfig) -> ImageData:
    """Cut validation out of the training images of a data set that has a test split of its own."""
    train_rows, val = stratified(train.labels, (config.val_fraction,), config.split_seed)
    splits = {"train": train.subset(train_rows), "val": train.subset(val), "test": test}
    return ImageData(name, list(class_names), splits, channels=config.channels)


def digits(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open scikit-learn's digits: values 0 to 16 become uint8 by `round(value * 255 / 16)`; no official split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, :, :, None]
    whole = array_split(pixels, bunch.target, "digits", config.channels)
    train, val, test = stratified(whole.labels, (config.val_fraction, config.test_fraction), config.split_seed)
    splits = {"train": whole.subset(train), "val": whole.subset(val), "test": whole.subset(test)}
    return ImageData("digits", [str(digit) for digit in range(10)], splits, channels=config.channels)


def fashion_mnist(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Open Fashion-MNIST, from files in torchvision's or Debian's layout, or downloaded."""
    from vit.data.torchvision_sets import fetch, root_of

    root = root_of(config)
    candidates = [root, root / "raw", root / "FashionMNIST" / "raw"]
    if config.root is None:
        candidates.append(DEBIAN_FASHION)
    folder = next((path for path in candidates if all(_idx_path(path, name) for name in FASHION_FILES)), None)
    if folder is None:
        fetch("FashionMNIST", root, config, [f"FashionMNIST/raw/{name}.gz" for name in FASHION_FILES])
        folder = root / "FashionMNIST" / "raw"
    arrays = [_read_idx(_idx_path(folder, name) or folder / name) for name in FASHION_FILES]
    for images, labels, name in ((arrays[0], arrays[1], "train"), (arrays[2], arrays[3], "test")):
        if images.ndim != 3 or labels.shape != images.shape[:1] or (labels.size and labels.max() > 9):
            raise VitError(f"{folder}: the {name} files are not Fashion-MNIST's (images {images.shape})")
    train = array_split(arrays[0][:, :, :, None], arrays[1], "fashion_mnist/train", config.channels)
    test = array_split(arrays[2][:, :, :, None], arrays[3], "fashion_mnist/test", config.channels)
    return with_validation("fashion_mnist", FASHION_CLASSES, train, test, config)


def _idx_path(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if os.path.isfile(candidate):
            return candidate
    return None


def _read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes: two zeros, type 8, the number of dimensions, each as a big-endian int32, the data."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise VitError(f"cannot read {path}: {error}; remove it to have it downloaded again") from error
    ndim = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = [int(n) for n in np.frombuffer(raw, ">i4", ndim, 4)] if len(raw) >= 4 + 4 * ndim else []
    if not shape or len(raw) - 4 - 4 * ndim != math.prod(shape):
        raise VitError(f"{path} is not a whole idx file; remove it to have it downloaded again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
