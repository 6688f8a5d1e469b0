"""Stores decoded images on the disk: each is decoded once, all are in one memory-mapped file of uint8.

Notable:
- A store is a folder: `pixels`, image after image, of any sizes; `index`, a record of 40 bytes an image; `about.json`,
  for people. The index is a journal: pixels are written to the disk before their record is, and only a record makes an
  image. So building, continuing after an interruption and updating are one operation: an image without a valid record
  for the present state of its file is decoded and appended.
- Nothing that a record points to is overwritten, so one process may write while others read. One at a time writes; the
  lock is the kernel's, which frees it however its holder ends.
- Every image has a checksum, compared when a process first reads it. One that is damaged is decoded again from its
  file and appended, and the log says so.
- Images of one data set share a store, whichever split they are in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import mmap
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit.data.dataset import FileBacked, Split
from vit.data.decode import ImageError, printable
from vit.data.journal import Index, record
from vit.data.parallel import for_each
from vit.data.preprocess import Preprocessing, scaled
from vit.data.scan import name_fingerprint
from vit.errors import VitError
from vit.files import atomic_write, hold_lock, write_json

log = logging.getLogger("vit")

_FORMAT = 1
_BINARY = getattr(os, "O_BINARY", 0)  # Windows changes line ends without it
_SEEKING = threading.Lock()
_COMMIT = 64 * 2**20  # bytes of pixels that an interruption may cost
_SPARE = 256 * 2**20  # bytes that a disk must have beside what is stored


@dataclasses.dataclass(frozen=True)
class StorageSpec:
    """Says what is stored of an image.

    Attributes:
        preprocessing: the model's.
        side: store the whole image, its shorter side reduced to this many pixels where it is longer; None: store the
            result of `Preprocessing.resize`, bit for bit.
    """

    preprocessing: Preprocessing
    side: int | None

    def describe(self) -> dict[str, Any]:
        """Return all that decides the stored pixels, as plain JSON types."""
        if self.side is None:
            return self.preprocessing.geometry
        p = self.preprocessing
        return {"side": self.side, "channels": p.channels, "interpolation": p.interpolation}

    def decode(self, split: Split, i: int) -> np.ndarray:
        """Decode image `i`: uint8 (H, W, C), contiguous. Raises `ImageError`."""
        if self.side is None:
            return np.ascontiguousarray(split.resized(i, self.preprocessing))
        image = split.image(i, (self.side, self.side))
        size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
        height, width = self.resized_sizes(np.array([size]))[0].tolist()
        return np.ascontiguousarray(scaled(image, (height, width), self.preprocessing.interpolation))

    def resized_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Compute the stored (H, W) of images of `sizes` (N, 2): int64 (N, 2)."""
        sizes = sizes.astype(np.int64)
        if self.side is None:
            return np.broadcast_to(np.array(self.preprocessing.image_size, np.int64), sizes.shape)
        short = sizes.min(axis=1, keepdims=True)
        return np.where(short > self.side, (sizes * self.side + short // 2) // short, sizes)

    def estimate_bytes(self, split: Split, indices: np.ndarray) -> int:
        """Estimate the bytes that these images take in the store; where sizes are not known, as for 4:3 images."""
        if split.sizes is None and self.side is not None:
            return len(indices) * self.side * (self.side * 4 // 3) * self.preprocessing.channels
        sizes = np.zeros((len(indices), 2), np.int64) if split.sizes is None else split.sizes[indices]
        return int(self.resized_sizes(sizes).prod(axis=1).sum()) * self.preprocessing.channels


class Store:
    """Reads the stored images of one split, from any number of threads.

    Made by `open_store`.
    """

    def __init__(self, folder: Path, split: Split, spec: StorageSpec, names: np.ndarray, states: np.ndarray) -> None:
        self.folder, self.split, self.spec = folder, split, spec
        self._names, self._states = names, states
        self._channels = spec.preprocessing.channels
        self._lock = threading.Lock()
        self._checked = np.zeros(len(split), dtype=bool)
        self._open()

    def __len__(self) -> int:
        return len(self.split)

    def stored_sizes(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return the stored (H, W) of the images at `indices`."""
        entries = self._entries[indices]
        return list(zip(entries["height"].tolist(), entries["width"].tolist(), strict=True))

    def read(self, i: int) -> Tensor:
        """Return image `i`, uint8 (H, W, C): a view of the file, which must not be written to.

        Raises `ImageError`, naming the file, where a damaged image cannot be decoded again.
        """
        if not self._checked[i]:
            self._check(i)
        return self._view(i)

    def _view(self, i: int) -> Tensor:
        entry, flat = self._entries[i], self._flat
        height, width, start = int(entry["height"]), int(entry["width"]), int(entry["start"])
        length = height * width * self._channels
        return flat[start : start + length].view(height, width, self._channels)

    def _check(self, i: int) -> None:
        if not self._is_intact(i):
            with self._lock:
                if not self._is_intact(i):  # no other thread was first
                    self._decode_again(i)
        self._checked[i] = True

    def _is_intact(self, i: int) -> bool:
        return zlib.crc32(self._view(i).numpy().data) == self._entries[i]["crc"]

    def _decode_again(self, i: int) -> None:
        folder, name = printable(self.folder), printable(self.split.name(i))
        log.warning("%s: the stored image of %s is damaged; it is decoded again", folder, name)
        with hold_lock(self.folder / "lock"):
            writer = _Writer(self.folder, self.split, self.spec, self._names, self._states)
            # another process may have started the store anew
            writer.add(np.union1d(writer.missing(), [i]))
            self._open()

    def _open(self) -> None:
        index = Index(self.folder, self._channels)
        entries = index.valid[index.find(self._names, self._states)]
        # one tensor over all of it, never written to; a view costs a microsecond and no copy
        with open(self.folder / "pixels", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(mapped, dtype=torch.uint8)
        # in this order: a thread that reads in between finds the old entries in the longer file
        self._flat, self._entries = flat, entries


def open_store(split: Split, spec: StorageSpec, root: Path, dataset: str) -> Store | None:
    """Open the store of a data set for the images of `split`, after decoding what it lacks.

    Args:
        root: the folder of all stores.
        dataset: a text that identifies the data set.

    Returns:
        The store; None where the images do not come from files, so that there is nothing to decode.

    Raises:
        VitError: a disk that is too small or a folder that cannot be written, before anything is; a file that cannot
            be read any more. What was stored until then is kept.
    """
    if not isinstance(split.images, FileBacked) or not len(split):
        return None
    about = {"format": _FORMAT, "data": dataset, "stored": spec.describe()}
    folder = root / f"{name_fingerprint(json.dumps(about, sort_keys=True)):016x}"
    assert split.rows is not None
    names, states = split.images.fingerprints(split.rows, split.channels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitError(f"data.cache_folder: cannot make {printable(folder)}: {error.strerror or error}") from error
    with hold_lock(folder / "lock"):
        writer = _Writer(folder, split, spec, names, states)
        missing = writer.missing()
        if len(missing):
            if not (folder / "about.json").exists():
                write_json(folder / "about.json", about)
            _build(writer, missing)
        else:
            log.info("%d decoded images in %s", len(split), printable(folder))
        return Store(folder, split, spec, names, states)


def _build(writer: _Writer, missing: np.ndarray) -> None:
    folder, total = printable(writer.folder), len(writer.names)
    needed = writer.spec.estimate_bytes(writer.split, missing)
    free = shutil.disk_usage(writer.folder).free
    if needed + _SPARE > free:
        raise VitError(
            f"data.cache=true: {len(missing)} decoded images need {_gib(needed)} in {folder}, where {_gib(free)} are "
            "free; data.cache_folder=FOLDER keeps them elsewhere, a smaller data.cache_side makes them smaller"
        )
    known = f", {total - len(missing)} are there" if len(missing) < total else ""
    log.info(
        "decoding %d images into %s: %s of %s free%s",
        len(missing),
        folder,
        _gib(needed),
        _gib(free),
        known,
    )
    began = time.monotonic()
    writer.add(missing)
    log.info("%d images decoded in %.0f s", len(missing), time.monotonic() - began)


class _Writer:
    """Adds images of a split to its store. The caller holds the store's lock."""

    def __init__(self, folder: Path, split: Split, spec: StorageSpec, names: np.ndarray, states: np.ndarray) -> None:
        self.folder, self.split, self.spec = folder, split, spec
        self.names, self.states = names, states
        self._read()

    def _read(self) -> None:
        self._index = Index(self.folder, self.spec.preprocessing.channels)

    def missing(self) -> np.ndarray:
        """Return the indices of the images that are not stored yet: int64.

        A store of which more than half is superseded is deleted and started anew.
        """
        index = self._index
        missing = np.flatnonzero(index.find(self.names, self.states) < 0)
        if not len(missing):
            return missing
        if index.damaged:
            shown = printable(self.folder)
            log.warning("%s: %d stored images are damaged; they are decoded again", shown, index.damaged)
        if 2 * index.superseded_bytes(self.names[missing]) <= index.end:
            return missing
        with _disk_errors(self.folder):
            # a process that reads them keeps its files open
            for name in ("index", "pixels"):
                (self.folder / name).unlink(missing_ok=True)
        self._read()
        return np.arange(len(self.names))

    def add(self, indices: np.ndarray) -> None:
        """Decode the images at `indices` and store them; after a failure, those stored before it remain.

        Raises `ImageError`, naming the file, or `VitError` for a disk that is full or cannot be written.
        """
        index, lock = self._index, threading.Lock()
        end, waiting, weight = index.end, [], 0
        if not index.clean:
            with atomic_write(self.folder / "index") as part:
                part.write_bytes(index.valid.tobytes())

        def commit(records: list[np.ndarray]) -> None:
            os.fsync(pixels)
            with lock:
                _write(journal, np.concatenate(records).tobytes())

        def decode_one(i: int) -> None:
            nonlocal end, waiting, weight
            try:
                image = self.spec.decode(self.split, i)
            except ImageError as error:
                name = error.name or printable(self.split.name(i))
                raise ImageError(f"{error.reason} (it could be read when the data was scanned)", name) from error
            with lock:
                start, end = end, end + image.nbytes
            _write(pixels, image.data.cast("B"), start)
            crc = zlib.crc32(image.data)
            entry = record(int(self.names[i]), int(self.states[i]), start, image.shape[:2], crc)
            full: list[np.ndarray] = []
            with lock:
                waiting.append(entry)
                weight += image.nbytes
                if weight >= _COMMIT:
                    full, waiting, weight = waiting, [], 0
            if full:
                commit(full)

        with _disk_errors(self.folder), contextlib.ExitStack() as files:
            pixels = os.open(self.folder / "pixels", os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            files.callback(os.close, pixels)
            journal = os.open(self.folder / "index", os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
            files.callback(os.close, journal)
            try:
                for_each(decode_one, (int(i) for i in indices), len(indices), "Decoding images")
            finally:
                if waiting:
                    commit(waiting)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a `VitError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; what is stored is kept: make room and start again, or set data.cache_folder=FOLDER" if full else ""
        raise VitError(f"cannot write {printable(folder)}: {error.strerror or error}{advice}") from error


def _write(file: int, data: Sequence[int] | memoryview | bytes, start: int | None = None) -> None:
    """Write all of `data`, at `start` or at the end."""
    if start is not None and not hasattr(os, "pwrite"):  # Windows
        with _SEEKING:
            os.lseek(file, start, os.SEEK_SET)
            return _write(file, data)
    rest = memoryview(data)  # type: ignore[arg-type]
    while len(rest):
        written = os.write(file, rest) if start is None else os.pwrite(file, rest, start)
        rest = rest[written:]
        start = None if start is None else start + written


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
