"""Images that stay in their files: worker processes decode them while the model computes.

Notable:
- A worker is asked for (epoch, indices) and keeps no state, so any number of workers gives the same batches.
- A random-resized crop is cut from the original while decoding, with the numbers that `BatchAugment` would have drawn;
  the rest of the augmentation is applied to whole batches on the device, as for resident images.
- A file that became unreadable since it was scanned stops the run with its name. No other image takes its place.
- Workers are started with the first batch, kept from epoch to epoch, and ignore Ctrl-C. Batches come through shared
  memory, or a pipe where there is too little of it; to a GPU through pinned memory and on a stream of their own.
- A worker that dies, or a batch that does not come, ends the run with one line (`workers_watched`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vit.data import regions
from vit.data.augment_config import AugmentConfig
from vit.data.batches import Batch, to_device
from vit.data.dataset import Split
from vit.data.decode import ImageError
from vit.data.preprocess import Preprocessing, scaled
from vit.data.random import Stream, uniform
from vit.errors import VitError
from vit.processors import count_cpus

_MOST_WORKERS = 8
_BOXES_PER_CALL = 8  # images whose crops are drawn in one call, which costs as much as for one
_FEW_IMAGES = 256  # so many are decoded before worker processes have started
_TIMEOUT = 600  # seconds to wait for a batch

log = logging.getLogger("vit")

Key = tuple[int, list[int]]  # epoch, and indices in the split


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Draws random-resized crops, each a function of (seed, epoch, index).

    Attributes:
        seed: the run's.
        scale, ratio: `augment.crop_scale` and `augment.crop_ratio`.
    """

    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]

    @classmethod
    def of(cls, config: AugmentConfig, seed: int) -> RandomCrop | None:
        """Make the crop that `config` asks for; None where it asks for none."""
        return cls(seed, config.crop_scale, config.crop_ratio) if config.random_resized_crop else None

    def boxes(self, epoch: int, indices: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Draw left, top, right, bottom for each image, whose (H, W) is in `sizes`."""
        numbers = uniform(self.seed, epoch, torch.tensor(indices), Stream.CROP, regions.NUMBERS)
        height, width = torch.tensor(sizes, dtype=torch.float32).unbind(1)
        box = regions.crop_boxes(numbers, height, width, self.scale, self.ratio)
        box[:, 2:] += box[:, :2]
        return box.int().tolist()


class DecodedImages(Dataset[tuple[Tensor | np.ndarray, str]]):
    """Decodes batches of images, each asked for as (epoch, indices). Holds no state and can be pickled."""

    def __init__(self, split: Split, preprocessing: Preprocessing, crop: RandomCrop | None) -> None:
        self.split, self.preprocessing, self.crop = split, preprocessing, crop

    def __getitem__(self, key: Key) -> tuple[Tensor | np.ndarray, str]:
        """Return uint8 (B, C, H, W) and an empty string; or nothing, and which file is unreadable and why.

        A worker without enough shared memory returns an array, which is sent through the pipe; all others a tensor.
        """
        images, failure = self._decode(*key)
        if get_worker_info() is None:
            return torch.from_numpy(images), failure
        try:
            # not left to the sending thread: it would print the error, and the batch would never come
            return torch.from_numpy(images).share_memory_(), failure
        except RuntimeError:
            return images, failure

    def _decode(self, epoch: int, indices: list[int]) -> tuple[np.ndarray, str]:
        (height, width), channels = self.preprocessing.image_size, self.preprocessing.channels
        out = np.empty((len(indices), channels, height, width), dtype=np.uint8)
        i = 0
        try:
            if self.crop is None:
                for row, i in enumerate(indices):
                    out[row] = np.moveaxis(self.split.resized(i, self.preprocessing), -1, 0)
                return out, ""
            for first in range(0, len(indices), _BOXES_PER_CALL):
                part, images = indices[first : first + _BOXES_PER_CALL], []
                for i in part:
                    images.append(self._decoded(i))
                boxes = self.crop.boxes(epoch, part, [_size(image) for image in images])
                for row, (image, box) in enumerate(zip(images, boxes, strict=True), start=first):
                    out[row] = np.moveaxis(self._cut(image, box), -1, 0)
        except ImageError as error:
            # as a value: an exception would come through the worker's pipe as a traceback in a string
            return np.empty(0, np.uint8), f"{self.split.name(i)}: {error.reason}"
        return out, ""

    def _decoded(self, i: int) -> Image.Image | np.ndarray:
        assert self.crop is not None
        # a decoder may shrink while it decodes, but the smallest crop must not have to be enlarged for it
        zoom = self.crop.scale[0] ** -0.5
        height, width = self.preprocessing.image_size
        return self.split.image(i, (round(height * zoom), round(width * zoom)))

    def _cut(self, image: Image.Image | np.ndarray, box: list[int]) -> np.ndarray:
        left, top, right, bottom = box
        if isinstance(image, np.ndarray):
            part: Image.Image | np.ndarray = image[top:bottom, left:right]
        else:
            part = image.crop((left, top, right, bottom))
        return scaled(part, self.preprocessing.image_size, self.preprocessing.interpolation)


class _Keys:
    """Gives a DataLoader the keys of its next pass, set before each pass."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class StreamedImages:
    """Decodes the images of a split in worker processes: a `vit.data.batches.Source`.

    One pass at a time; a new pass may start before the last one has ended.

    Args:
        split, preprocessing: the images, and how to bring them to the model's size.
        crop: random-resized crops to cut while decoding; None for whole images.
        workers: how many processes decode; 0 decodes in this one.
        device: where batches are wanted.
        context: how workers start (`multiprocessing`'s "fork", "spawn", "forkserver"); None for the platform's way.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        crop: RandomCrop | None = None,
        *,
        workers: int,
        device: torch.device | str = "cpu",
        context: str | None = None,
    ) -> None:
        self._images = DecodedImages(split, preprocessing, crop)
        self._workers, self._context = workers, context
        self._labels = torch.tensor(np.asarray(split.labels), dtype=torch.int64)
        self._device = torch.device(device)
        self.index_device = torch.device("cpu")
        self._keys = _Keys()
        self._loader: DataLoader[tuple[Tensor | np.ndarray, str]] | None = None
        self._shares_memory = True

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, epoch: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Fetch the batch of each (index, valid) in `parts` from the workers."""
        wanted = list(parts)
        self._keys.keys = [(epoch, index.tolist()) for index, _ in wanted]
        if self._loader is None:
            self._loader = DataLoader(
                self._images,
                sampler=self._keys,
                batch_size=None,
                collate_fn=_identity,
                timeout=_TIMEOUT if self._workers else 0,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                pin_memory=self._device.type == "cuda",
                multiprocessing_context=self._context if self._workers else None,
                worker_init_fn=_ignore_interrupts,
            )
        with _delay_interrupts(self._context) if self._workers else contextlib.nullcontext():
            fetched: Iterator[tuple[Tensor | np.ndarray, str]] = iter(self._loader)
        if self._workers:
            fetched = _received(fetched)
        on_host = (
            (Batch(self._checked(images, failure), self._labels[index], index, valid), Batch)
            for (images, failure), (index, valid) in zip(fetched, wanted, strict=True)
        )
        return to_device(on_host, self._device)

    def close(self) -> None:
        """Stop the workers. `batches` starts new ones."""
        # Not left to the garbage collector: an exception's traceback may keep the iterator alive, and collected at a
        # bad moment it waits ten seconds for its workers. Lightning stops a DataLoader's workers in the same way.
        iterator = self._loader._iterator if self._loader is not None else None
        if iterator is not None and self._workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._loader = None

    def _checked(self, images: Tensor | np.ndarray, failure: str) -> Tensor:
        if failure:
            self.close()
            raise VitError(f"{failure} (it could be read when the data was scanned)")
        if isinstance(images, Tensor):
            return images
        if self._shares_memory:
            log.warning(
                "shared memory (/dev/shm) has no room for the batches ahead: they come through pipes, which takes "
                "longer (a container gets more with --shm-size)"
            )
            self._shares_memory = False
        return torch.from_numpy(images)


@contextlib.contextmanager
def workers_watched() -> Iterator[None]:
    """Turn torch's error about a dead worker, which may be raised anywhere in this process, into a `VitError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not reason.startswith(("DataLoader worker", "DataLoader timed out")):
            raise
        raise VitError(
            f"data.workers: {reason.removeprefix('DataLoader ').rstrip('. ')}: where memory is short the system kills "
            "a process that decodes images; try data.workers=0, and in a container more --memory and --shm-size"
        ) from error


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass on what workers send; raise torch's own `RuntimeError` for one that dies while it sends."""
    try:
        yield from batches
    except (EOFError, OSError) as error:
        time.sleep(2)  # torch's handler of the signal that it died raises here, and says what it died of
        raise RuntimeError("DataLoader worker ended while it sent a batch") from error


def _identity(batch: Any) -> Any:
    return batch  # torch would make tensors of arrays


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C in a terminal reaches every process; the main one decides, and may still want to evaluate
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _delay_interrupts(context: str | None) -> Iterator[None]:
    """Delay Ctrl-C inside, so that it cannot reach a worker started here before `_ignore_interrupts` has run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_context(context).get_start_method() != "fork":
        resource_tracker.ensure_running()  # started inside, it would let signals through when it is
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes started here inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return (H, W)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])


def worker_count(workers: int | str, samples: int | None, world_size: int) -> int:
    """Count the worker processes for `samples` images. Raises `VitError` for a value of `data.workers` that cannot be.

    "auto" divides this machine's cores among its processes. `samples` is None for threads, which pay off for a few
    images, too.
    """
    if workers != "auto":
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise VitError(f"data.workers: {workers!r} is neither auto nor a whole number of at least 0")
        return workers
    if samples is not None and samples < _FEW_IMAGES:
        return 0
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = int(here) if here.isdecimal() and int(here) else world_size
    return max(1, min(count_cpus() // processes, _MOST_WORKERS))
