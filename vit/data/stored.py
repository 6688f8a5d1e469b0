"""Loaders for decoded images on the disk (`vit.data.store`): nothing is decoded, crops are cut from uint8.

Notable:
- Threads read and resize the next batches while the model computes: the kernels let go of Python's lock, the images are
  in memory that all share, and nothing is sent from one process to another.
- On a GPU only the bytes of the crops themselves travel, and a batch is resized there at once.
- The boxes are those that streaming would draw for images of the stored sizes, by (seed, epoch, index). Without random
  crops the batches are streaming's, bit for bit.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vit.data import crops
from vit.data.augment_config import AugmentConfig
from vit.data.batches import Batch, EvalLoader, TrainLoader, to_device
from vit.data.store import Store
from vit.data.streaming import RandomCrop, worker_count

_AHEAD = 2  # batches that are prepared while one is used
_TOGETHER = 32  # images a thread takes at a time

Job = tuple[Sequence[Tensor], Callable[..., Batch], list[Callable[[], None]]]
"""Tensors on the host, what makes a batch of them on the device, and what has to be done first, in any order."""


class _Reader:
    """Reads the images of given keys in threads and brings them to the device, in the keys' order.

    `packed`: crops travel as they are and are resized on the device; None: where that is no CPU.
    """

    def __init__(
        self,
        store: Store,
        crop: RandomCrop | None,
        threads: int,
        device: torch.device | str,
        packed: bool | None = None,
    ) -> None:
        self._store, self._crop, self._threads = store, crop, threads
        self._device = torch.device(device)
        self._packed = self._device.type != "cpu" if packed is None else packed
        self._labels = torch.tensor(np.asarray(store.split.labels), dtype=torch.int64)
        preprocessing = store.recipe.preprocessing
        self._size, self._channels = preprocessing.image_size, preprocessing.channels
        self._interpolation = preprocessing.interpolation

    def __call__(self, epoch: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Read the batches of (index, valid) in `parts`."""
        make = self._whole if self._crop is None else self._packed_crops if self._packed else self._crops
        jobs = (make(epoch, index, valid) for index, valid in parts)
        return to_device(_ahead(jobs, self._threads), self._device)

    def _whole(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        images = self._empty(len(index), self._channels, *self._size)
        places = index.tolist()
        out = images.numpy()

        def read(k: int) -> None:
            out[k] = np.moveaxis(self._store.read(places[k]).numpy(), -1, 0)

        return (images, self._labels[index], index, valid), Batch, _shared(len(index), read)

    def _crops(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        images = self._empty(len(index), self._channels, *self._size)
        places, boxes = self._boxes(epoch, index)
        out = images.numpy()

        def read(k: int) -> None:
            left, top, right, bottom = boxes[k]
            crop = self._store.read(places[k])[top:bottom, left:right]
            # copied by NumPy: torch would start threads of its own for it
            out[k] = crops.resize(crop, self._size, self._interpolation).numpy()

        return (images, self._labels[index], index, valid), Batch, _shared(len(index), read)

    def _packed_crops(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        places, boxes = self._boxes(epoch, index)
        corner = torch.tensor(boxes)
        width, height = (corner[:, 2:] - corner[:, :2]).unbind(1)
        ends = (height * width * self._channels).cumsum(0)
        flat = self._empty(int(ends[-1]))
        shapes = torch.stack([ends - height * width * self._channels, height, width], dim=1)
        most = int(height.max()), int(width.max())
        out, starts, stops = flat.numpy(), shapes[:, 0].tolist(), ends.tolist()

        def read(k: int) -> None:
            left, top, right, bottom = boxes[k]
            crop = self._store.read(places[k]).numpy()[top:bottom, left:right]
            out[starts[k] : stops[k]].reshape(crop.shape)[:] = crop

        def finish(flat: Tensor, shapes: Tensor, *rest: Tensor) -> Batch:
            images = crops.resize_all(flat, shapes, most, self._channels, self._size, self._interpolation)
            return Batch(images, *rest)

        return (flat, shapes, self._labels[index], index, valid), finish, _shared(len(index), read)

    def _boxes(self, epoch: int, index: Tensor) -> tuple[list[int], list[list[int]]]:
        assert self._crop is not None
        places = index.tolist()
        return places, self._crop.boxes(epoch, places, self._store.sizes_of(places))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _shared(count: int, read: Callable[[int], None]) -> list[Callable[[], None]]:
    """`read(0)` to `read(count - 1)`, in parts for threads to share."""

    def run(first: int) -> None:
        for k in range(first, min(first + _TOGETHER, count)):
            read(k)

    return [functools.partial(run, first) for first in range(0, count, _TOGETHER)]


def _ahead(jobs: Iterator[Job], threads: int) -> Iterator[tuple[Sequence[Tensor], Callable[..., Batch]]]:
    """Do jobs in order, some ahead of what is asked for; without threads each when it is asked for."""
    if threads == 0:
        for tensors, finish, parts in jobs:
            for part in parts:
                part()
            yield tensors, finish
        return
    # for one pass only: no thread is there when other code forks
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    waiting: deque[tuple[Sequence[Tensor], Callable[..., Batch], list[Future[None]]]] = deque()
    try:
        for tensors, finish, parts in jobs:
            waiting.append((tensors, finish, [pool.submit(part) for part in parts]))
            if len(waiting) > _AHEAD:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(
    tensors: Sequence[Tensor], finish: Callable[..., Batch], parts: list[Future[None]]
) -> tuple[Sequence[Tensor], Callable[..., Batch]]:
    for part in parts:
        part.result()
    return tensors, finish


class StoredTrainLoader(TrainLoader):
    """Shuffled batches of stored images: random crops of them where they are stored whole, else as they are.

    Args:
        workers: how many threads read; "auto" for one a core, 8 at most; 0: none, batches are made when asked for.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        augment: AugmentConfig,
        *,
        seed: int,
        workers: int | str = "auto",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        packed: bool | None = None,
    ) -> None:
        super().__init__(len(store), batch_size, seed=seed, rank=rank, world_size=world_size, paired=augment.mixes)
        crop = RandomCrop(seed, augment.crop_scale, augment.crop_ratio) if store.recipe.side is not None else None
        self.cropped = crop is not None
        self._read = _Reader(store, crop, worker_count(workers, None, world_size), device, packed)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self._read(epoch, self._parts(epoch, start))


class StoredEvalLoader(EvalLoader):
    """Stored images in order, as preprocessing makes them."""

    def __init__(
        self,
        store: Store,
        batch_size: int,
        *,
        workers: int | str = "auto",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(len(store), batch_size, rank=rank, world_size=world_size)
        self._read = _Reader(store, None, worker_count(workers, None, world_size), device)

    def _batches(self) -> Iterator[Batch]:
        return self._read(0, self._parts())
