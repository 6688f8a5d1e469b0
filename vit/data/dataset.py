"""An opened data set: three splits of labelled images, and one class map.

Notable:
- A split does not depend on where its images are: in an array, in files, in Parquet, or generated when they are read.
  Each of those is an `Images` with two methods.
- `Split.array` gives all of it as uint8; of data that is already such an array, without copying.
- A subset shares its parent's images.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vit.data.decode import ImageError, decode
from vit.data.parallel import for_each
from vit.data.preprocess import Preprocessing
from vit.data.scan import file_content, file_fingerprint, name_fingerprint

SPLITS = ("train", "val", "test")


class Images(Protocol):
    """Reads the images of a data set, wherever they are."""

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        """Decode image `i` as `vit.data.decode.decode` does; raises `ImageError`."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image `i`: its path, or "digits/17"."""
        ...


@runtime_checkable
class FileBacked(Protocol):
    """Images in files, whose changes can be noticed."""

    def fingerprints(self, rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two fingerprints of each image of `rows`, uint64 (N,): of its name, and of its file as it is now.

        The second is of path, size and time of change, and 0 for a file that cannot be opened.
        """
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Holds images as one uint8 array (N, H, W, C)."""

    pixels: np.ndarray
    label: str

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        return decode(self.pixels[i], channels=channels)

    def name(self, i: int) -> str:
        return f"{self.label}/{i}"

    def content(self, i: int) -> str:
        """Return the checksum by which `vit.data.run_splits` recognises the image."""
        return f"{zlib.crc32(self.pixels[i].tobytes()):08x}"


class FileImages:
    """Reads images from files.

    The paths are kept as one block of bytes: exact for names in any encoding, and a million of them neither weigh
    on the garbage collector nor get copied, page by page, into every worker process.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def name(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(self._bytes[start : int(self._ends[i])])

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        return decode(self.name(i), channels=channels, target=target)

    def content(self, i: int) -> str:
        """Return the checksum by which `vit.data.run_splits` recognises the image."""
        return file_content(self.name(i))

    def stamp(self, i: int) -> str:
        """Return size and time of change; while both are the same, the file counts as unchanged."""
        try:
            status = os.stat(self.name(i))
        except OSError:
            return ""
        return f"{status.st_size}-{status.st_mtime_ns}"

    def fingerprints(self, rows: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
        paths = [self.name(int(i)) for i in rows]
        names = np.fromiter((name_fingerprint(os.path.abspath(path)) for path in paths), np.uint64, len(paths))
        return names, np.fromiter((file_fingerprint(path, channels) for path in paths), np.uint64, len(paths))


@dataclass(frozen=True)
class ListImages:
    """Holds images of several sizes, each uint8 (H, W, C); None for one that could not be read."""

    pixels: list[np.ndarray | None]

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        pixels = self.pixels[i]
        if pixels is None:
            raise ImageError("could not be read")
        return decode(pixels, channels=channels)

    def name(self, i: int) -> str:
        return f"data/{i}"


@dataclass(frozen=True)
class HubImages:
    """Reads a column of encoded images of a Hugging Face data set that does not decode them itself."""

    rows: Any
    column: str

    def source(self, i: int) -> bytes | str:
        """Return the bytes of the file, or its path. Raises `ImageError` where there is neither."""
        value = self.rows[i][self.column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise ImageError("no image in this row")
        return value

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        return decode(self.source(i), channels=channels, target=target)

    def name(self, i: int) -> str:
        return f"data/{i}"


class JoinedImages:
    """Joins the images of several splits, one after the other."""

    def __init__(self, parts: Sequence[tuple[str, Images, int]]) -> None:
        """Join `parts`: the name of each split, its images, and how many they are."""
        self._parts = parts
        self._ends = np.cumsum([count for _, _, count in parts])

    def _find(self, i: int) -> tuple[str, Images, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        split, images, count = self._parts[k]
        return split, images, i - int(self._ends[k]) + count

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        _, images, row = self._find(i)
        return images.read(row, channels, target)

    def name(self, i: int) -> str:
        split, images, row = self._find(i)
        name = images.name(row)
        return f"{split}/{row}" if name.startswith("data/") else name


@dataclass(eq=False)
class Split:
    """Holds one split of a data set: N labelled images.

    Attributes:
        labels: int64 (N,), indices into the data set's class names.
        images: where the images are; image i of the split is image `rows[i]` there.
        channels: what images are decoded to (1: "L", 3: "RGB").
        native_size: (H, W) when all images share one size, else None.
        sizes: int32 (N, 2), (H, W) of each image, where known.
        boxes: float32 (N, objects, 4), x0 y0 x1 y1 in pixels of the original image, where known.
        object_labels: int64 (N, objects), the class of each box; -1 for an object of no class, or no object.
        stores: its opened stores of decoded images on the disk, by `StorageSpec` (`vit.data.loaders`).
    """

    labels: np.ndarray
    images: Images
    channels: int
    rows: np.ndarray | None = None
    native_size: tuple[int, int] | None = None
    sizes: np.ndarray | None = None
    boxes: np.ndarray | None = None
    object_labels: np.ndarray | None = None
    _decoded: tuple[Any, np.ndarray] | None = field(default=None, init=False, repr=False)
    stores: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.labels = np.ascontiguousarray(self.labels, dtype=np.int64)
        if self.rows is None:
            self.rows = np.arange(len(self.labels), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # a worker process gets the images, not a second copy of them decoded
        return {**self.__dict__, "_decoded": None, "stores": {}}

    def image(self, i: int, target: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
        """Decode image `i` in its original size (a JPEG may be smaller, but not smaller than twice `target`).

        Returns a Pillow image, or an array uint8 (H, W, C) where channels is neither 1 nor 3. Raises `ImageError`.
        """
        assert self.rows is not None
        return self.images.read(int(self.rows[i]), self.channels, target)

    def resized(self, i: int, preprocessing: Preprocessing) -> np.ndarray:
        """Decode image `i` and apply `preprocessing.resize`: uint8 (H, W, C). Raises `ImageError`."""
        return preprocessing.resize(self.image(i, preprocessing.resize_target))

    def name(self, i: int) -> str:
        """Return the path of image `i`, or a name such as "digits/17"."""
        assert self.rows is not None
        return self.images.name(int(self.rows[i]))

    def array(self, preprocessing: Preprocessing, *, keep: bool = False) -> np.ndarray:
        """Decode all images and apply `preprocessing.resize`: uint8 (N, H, W, C).

        Decodes in threads, under a progress bar. The result may be a view of the data set itself: do not write to it.
        `keep`: keep the result for the next call, which will ask for the same.
        Raises `ImageError` naming the image.
        """
        height, width = preprocessing.image_size
        channels = preprocessing.channels
        if isinstance(self.images, ArrayImages):
            pixels = self.images.pixels
            if preprocessing.leaves_unchanged((pixels.shape[1], pixels.shape[2])) and pixels.shape[3] in (1, channels):
                selected = _select_rows(pixels, self.rows)
                # a grey image has three equal channels; no decoder is needed to say so
                return selected if pixels.shape[3] == channels else np.repeat(selected, channels, axis=3)
        geometry = preprocessing.geometry
        decoded, self._decoded = self._decoded, None
        if decoded is not None and decoded[0] == geometry:
            self._decoded = decoded if keep else None
            return decoded[1]
        out = np.empty((len(self), height, width, channels), dtype=np.uint8)

        def decode_one(i: int) -> None:
            try:
                out[i] = self.resized(i, preprocessing)
            except ImageError as error:
                raise ImageError(error.reason, error.name or self.name(i)) from error

        for_each(decode_one, range(len(self)), len(self), "Reading images")
        if keep:
            self._decoded = (geometry, out)
        return out

    def subset(self, indices: Sequence[int] | np.ndarray) -> Split:
        """Return the split of the images at `indices`, in that order."""
        assert self.rows is not None
        indices = np.asarray(indices, dtype=np.int64)
        return Split(
            labels=self.labels[indices],
            images=self.images,
            channels=self.channels,
            rows=self.rows[indices],
            native_size=self.native_size,
            sizes=None if self.sizes is None else self.sizes[indices],
            boxes=None if self.boxes is None else self.boxes[indices],
            object_labels=None if self.object_labels is None else self.object_labels[indices],
        )


@dataclass
class ImageData:
    """Holds an opened data set.

    Attributes:
        name: its name in the catalogue.
        class_names: the one class map; label k means class_names[k] in every split.
        splits: "train", "val", "test"; the last two may be empty, none is ever absent.
        bad_files: (path, reason) of every file left out of every split.
        passed_over: how many of its files and folders are no images of a class, by kind.
        source: plain JSON; `DataConfig.from_dict(source)` reopens the same data.
        channels: what images are decoded to.
    """

    name: str
    class_names: list[str]
    splits: dict[str, Split]
    bad_files: list[tuple[str, str]] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    channels: int = 3

    def counts(self) -> dict[str, np.ndarray]:
        """Count the images of each class, by split: int64 (K,)."""
        k = len(self.class_names)
        return {name: np.bincount(split.labels, minlength=k) for name, split in self.splits.items()}


def _select_rows(pixels: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """Return `pixels[rows]`, as a view where the rows are consecutive."""
    if rows is None:
        return pixels
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return pixels[int(rows[0]) : int(rows[-1]) + 1]
    return pixels[rows]
