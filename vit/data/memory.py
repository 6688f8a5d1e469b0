"""Images given from Python: arrays, (path, label) pairs, a torch or Hugging Face data set, or a dict of splits of them.

Notable:
- `gather` brings what was given into one form, checks it, and names the settings that suit it; from there on it is
  split, and matched to a model's classes, as a folder is (`vit.data.assemble`).
- An item of a torch data set is read once, as the set gives it, and held as uint8.  Files, and the encoded images of a
  Hugging Face data set, are decoded whenever they are needed.
- `Gathered.content` is a fingerprint of images and labels in their order.  A run stores it, so that going on, and an
  evaluation, know whether they are given the same images again.

Imports neither torch nor `datasets`: an object of theirs is known by what it can do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.data.arrays import as_numpy, as_uint8, channels_last, is_array, to_pixels
from vit.data.assemble import assemble
from vit.data.dataset import SPLITS, ArrayImages, FileImages, HubImages, ImageData, Images, JoinedImages, ListImages
from vit.data.decode import ImageError, measure
from vit.data.folder import split_of
from vit.data.labels import name_labels, names_of
from vit.data.parallel import for_each, progress
from vit.data.parquet import find_columns, total_memory
from vit.data.scan import file_content, scan_files
from vit.errors import VitError
from vit.options import format_value

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

log = logging.getLogger("vit")

NAME = "memory"
"""The name of such data, in place of one of the catalogue."""

EXPECTED = (
    "the name of a data set, a folder, a list of (path, label), (images, labels) with an array of images, a torch "
    "Dataset of (image, label), a Hugging Face Dataset, or a dict with one of these for each of train, val and test"
)


@dataclass(frozen=True)
class Gathered:
    """Holds images given from Python, in the order train, val, test.

    Attributes:
        images: where they are.
        labels: the class name of each, by split.
        class_names: the class map.
        numbered: whether the labels were whole numbers without names.
        sizes: int32 (N, 2), (H, W) of each; 0 for one that cannot be read.
        reasons: why it cannot be read, by index.
        channels: of the images, as they were given.
        held: whether pixels are held in memory, which every worker process would get a copy of.
        content: the fingerprint.
    """

    images: Images
    labels: dict[str, list[str]]
    class_names: list[str]
    numbered: bool
    sizes: np.ndarray
    reasons: dict[int, str]
    channels: int
    held: bool
    content: str

    def settings(self) -> dict[str, Any]:
        """Keys of `data.*` that suit the images: their own size where it is one and small, else that of photographs."""
        good = np.unique(self.sizes[self.sizes[:, 0] > 0], axis=0)
        chosen: dict[str, Any] = {"name": NAME, "image_size": 224, "patch_size": 16, "batch_size": 64}
        if len(good) == 1 and good.max() <= 128:
            side = int(good.max())
            patch = 2 if side <= 12 else 4 if side <= 48 else 8
            size = [-(-int(length) // patch) * patch for length in good[0]]
            chosen |= {"image_size": size[0] if size[0] == size[1] else size, "patch_size": patch, "batch_size": 128}
        channels = {4: 3}.get(self.channels, self.channels)  # transparency is laid over white
        return {**chosen, "channels": channels, **({"workers": 0} if self.held else {}), "content": self.content}


@dataclass
class _Part:
    """Holds one split, as it was given."""

    images: Images
    labels: list[Any]
    names: list[str] | None
    sizes: np.ndarray
    reasons: dict[int, str]
    digest: bytes
    channels: int = 3
    held: bool = False


def gather(data: Any, *, image_column: str | None = None, label_column: str | None = None) -> Gathered:
    """Check the given data, and convert it to one form.

    Args:
        data: see `EXPECTED`; arrays of images are (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floating point from
            0 to 1.  Labels are texts or whole numbers.
        image_column, label_column: of a Hugging Face data set; None: found.

    Raises:
        VitError: what is none of these, is empty, has labels that are missing or of two kinds, or images of a shape,
            type or range that is not understood.
    """
    columns = SimpleNamespace(image_column=image_column, label_column=label_column)
    parts: dict[str, _Part] = {}
    for split, part in _splits(data).items():
        where = "the data" if split is None else f"the {split} split of the data"
        found = _part(part, where, columns)
        if not found.labels:
            raise VitError(f"{where} is empty: expected at least one image")
        missing = [_is_missing(label, found.names) for label in found.labels]
        if all(missing) and split not in (None, "train"):
            log.warning("%s has no labels; it is not used", where)
            continue
        if any(missing):
            raise VitError(f"{where}: image {missing.index(True)} has no label")
        parts[split or "train"] = found
    parts = {split: parts[split] for split in SPLITS if split in parts}
    if not parts:
        raise VitError(f"there is no data: expected {EXPECTED}")
    labels, class_names, numbered = name_labels({split: (part.labels, part.names) for split, part in parts.items()})
    digest = hashlib.blake2b(digest_size=16)
    for split, part in parts.items():
        digest.update(repr((split, labels[split])).encode("utf-8", "surrogateescape"))
        digest.update(part.digest)
    several = list(parts.values())
    starts = np.cumsum([0, *(len(part.labels) for part in several)])
    return Gathered(
        images=_join(parts),
        labels=labels,
        class_names=class_names,
        numbered=numbered,
        sizes=np.concatenate([part.sizes for part in several]),
        reasons={
            int(start) + i: why for start, part in zip(starts, several, strict=False) for i, why in part.reasons.items()
        },
        channels=max(part.channels for part in several),
        held=any(part.held for part in several),
        content=digest.hexdigest(),
    )


def open_gathered(given: Gathered | None, config: DataConfig, class_names: list[str] | None) -> ImageData:
    """Open images that were given; see `vit.data.catalogue.open_data`.

    Raises `VitError` where none were given, or others than `config.content` says.
    """
    if given is None:
        raise VitError(
            "the images of data=memory were given from Python and are stored nowhere, so they have to be given again: "
            "vit.evaluate(MODEL, data=...), or vit.train(DATA, 'resume=RUN')"
        )
    if config.content not in (None, given.content):
        raise VitError(
            "these are not the images and labels that the run was trained on: give the same ones, in the same order, "
            "or train anew without resume="
        )
    log.info(
        "images from Python: data.image_size=%s data.patch_size=%s",
        format_value(config.image_size),
        format_value(config.patch_size),
    )
    labels = given.labels
    if class_names is not None and given.numbered and not {*given.class_names} <= {*class_names}:
        numbers = {name: int(name) for name in given.class_names}
        if wrong := [name for name, k in numbers.items() if not 0 <= k < len(class_names)]:
            raise VitError(f"label {wrong[0]}: the model has {len(class_names)} classes, 0 to {len(class_names) - 1}")
        labels = {split: [class_names[numbers[name]] for name in names] for split, names in labels.items()}
    return assemble(
        NAME,
        given.images,
        labels,
        given.sizes,
        given.reasons,
        config,
        where="the data",
        known_classes=given.class_names if labels is given.labels else class_names,
        trained=class_names is not None,
    )


def _splits(data: Any) -> dict[str | None, Any]:
    """What was given for each split; under None what is to be split."""
    if not isinstance(data, Mapping):
        return {None: data}
    found: dict[str | None, Any] = {}
    for name, part in data.items():
        split = split_of(str(name))
        if split in found:
            raise VitError(f"the data has two splits called {split}: keep one of them")
        if split is None:
            log.warning("the split %r of the data is neither train, val nor test; it is not used", name)
        else:
            found[split] = part
    if not found:
        raise VitError(f"a dict of splits has the keys train, val and test, not {', '.join(map(repr, data)) or 'none'}")
    return found


def _part(data: Any, where: str, columns: Any) -> _Part:
    hub = sys.modules.get("datasets")
    if hub is not None and isinstance(data, hub.Dataset):
        return _hub(data, hub, where, columns)
    if hub is not None and isinstance(data, hub.IterableDataset):
        raise VitError(f"{where} is a stream, which has no length: load the data set without streaming=True")
    if isinstance(data, tuple) and len(data) == 2:
        images, labels = data
        if is_array(images):
            return _array(images, _as_list(labels, where), where)
        if isinstance(images, list | tuple) or hasattr(images, "tolist"):
            images, labels = list(images), _as_list(labels, where)
            _same_length(images, labels, where)
            return _pairs(zip(images, labels, strict=True), where)
    if isinstance(data, list | tuple):
        return _pairs(_items(data, where), where)
    if hasattr(data, "iloc"):
        raise VitError(f"{where} is a table: expected pairs, such as list(zip(table['path'], table['label']))")
    if is_array(data):
        raise VitError(f"{where} is an array without labels: expected (images, labels)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes):
        return _pairs(_items(data, where), where, names=names_of(data))
    raise VitError(f"a {type(data).__name__} is no data to train on: expected {EXPECTED}")


def _items(data: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """Yield the items of a data set, under a progress bar."""
    with progress("Reading images", len(data)) as advance:
        for i in range(len(data)):
            try:
                item = data[i]
            except (OSError, ValueError, IndexError, KeyError) as error:
                raise VitError(f"item {i} of {where} cannot be read: {type(error).__name__}: {error}") from error
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise VitError(f"item {i} of {where} is a {type(item).__name__}: expected (image, label)")
            yield item[0], item[1]
            advance(1)


def _pairs(pairs: Iterable[tuple[Any, Any]], where: str, names: list[str] | None = None) -> _Part:
    paths: list[str] = []
    held: list[np.ndarray | None] = []
    labels: list[Any] = []
    reasons: dict[int, str] = {}
    weight, most = 0, (total_memory() or sys.maxsize) // 2
    for i, (image, label) in enumerate(pairs):
        labels.append(label)
        if isinstance(image, str | os.PathLike):
            paths.append(os.path.abspath(os.path.expanduser(os.fsdecode(image))))
        else:
            try:
                pixels = to_pixels(image, f"image {i} of {where}")
                held.append(pixels)
                weight += pixels.nbytes
            except ImageError as error:
                held.append(None)
                reasons[i] = error.reason
        if paths and held:
            raise VitError(
                f"{where} mixes paths and images (image {i} is a {type(image).__name__}): give one of the two"
            )
        if weight > most:
            raise VitError(f"{where} takes more than half of this machine's memory: give its files, as (path, label)")
    if paths:
        sizes, reasons = scan_files(paths, 3, f"{NAME}\0{len(paths)}\0{paths[0]}")
        return _Part(FileImages(paths), labels, names, sizes, reasons, "\n".join(map(file_content, paths)).encode())
    shapes = {pixels.shape for pixels in held if pixels is not None}
    sizes = np.array([(0, 0) if pixels is None else pixels.shape[:2] for pixels in held], np.int32).reshape(-1, 2)
    found: Images = ListImages(held)
    if len(shapes) == 1 and not reasons:
        found = ArrayImages(np.stack([pixels for pixels in held if pixels is not None]), "data")
    digest = _digest(*(b"" if pixels is None else pixels for pixels in held))
    channels = max((shape[2] for shape in shapes), default=3)
    return _Part(found, labels, names, sizes, reasons, digest, channels, held=True)


def _array(images: Any, labels: list[Any], where: str) -> _Part:
    pixels = as_uint8(channels_last(as_numpy(images, where), where), where)
    _same_length(pixels, labels, where)
    sizes = np.full((len(pixels), 2), pixels.shape[1:3], np.int32)
    return _Part(ArrayImages(pixels, "data"), labels, None, sizes, {}, _digest(pixels), pixels.shape[3], held=True)


def _hub(data: Any, hub: Any, where: str, columns: Any) -> _Part:
    found = find_columns(data.features.arrow_schema, columns, where)
    column = found.image.split(".")[0]
    plain = data.with_format(None)
    if isinstance(data.features[column], hub.Image):
        plain = plain.cast_column(column, hub.Image(decode=False))
    images = HubImages(plain.select_columns([column]), column)
    sizes = np.zeros((len(data), 2), np.int32)
    digests: list[bytes] = [b""] * len(data)
    reasons: dict[int, str] = {}

    def read_one(i: int) -> None:
        try:
            source = images.source(i)
            digests[i] = _digest(source) if isinstance(source, bytes) else file_content(source).encode()
            sizes[i] = measure(source, channels=3)
        except ImageError as error:
            reasons[i] = error.reason

    for_each(read_one, range(len(data)), len(data), "Checking images")
    names = None if found.names is None else list(found.names)
    return _Part(images, list(plain[found.label]), names, sizes, dict(sorted(reasons.items())), b"".join(digests))


def _is_missing(label: Any, names: Sequence[str] | None) -> bool:
    """Say whether a label is missing; where classes have names, -1 means that."""
    return label is None or (names is not None and np.ndim(label) == 0 and bool(label == -1))


def _as_list(labels: Any, where: str) -> list[Any]:
    if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
        raise VitError(f"{where}: expected a label for each image, not a {type(labels).__name__}")
    return list(labels)


def _same_length(images: Any, labels: Sequence[Any], where: str) -> None:
    if len(images) != len(labels):
        raise VitError(f"{where}: {len(images)} images and {len(labels)} labels: expected one for each")


def _join(parts: Mapping[str, _Part]) -> Images:
    several = [(split, part.images, len(part.labels)) for split, part in parts.items()]
    if len(several) == 1:
        return several[0][1]
    arrays = [images.pixels for _, images, _ in several if isinstance(images, ArrayImages)]
    if len(arrays) == len(several) and len({array.shape[1:] for array in arrays}) == 1:
        return ArrayImages(np.concatenate(arrays), "data")
    return JoinedImages(several)


def _digest(*values: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(repr(value.shape if isinstance(value, np.ndarray) else len(value)).encode())
        digest.update(np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else value)
    return digest.digest()
