"""Decoded images on the disk (`vit.data.store`): read without decoding, crops cut from uint8.

Notable:
- Threads read and resize the next batches while the model computes: the kernels release Python's lock, the images are
  in memory that all share, and nothing is sent from one process to another.
- To a GPU only the bytes of the crops themselves are copied, and a batch is resized there at once.
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
from vit.data.batches import Batch, to_device
from vit.data.store import Store
from vit.data.streaming import RandomCrop

_AHEAD = 2  # batches that are prepared while one is used
_IMAGES_PER_TASK = 32  # images that a thread reads at a time

Job = tuple[Sequence[Tensor], Callable[..., Batch], list[Callable[[], None]]]
"""Tensors on the host, the function that makes a batch of them on the device, and the tasks that fill them."""


class StoredImages:
    """Reads the images of a store in threads: a `vit.data.batches.Source`.

    Args:
        store: the opened store.
        crop: random-resized crops to cut from images that are stored whole; None for images as they are stored.
        threads: how many read; 0 reads each batch when it is asked for.
        device: where batches are wanted.
        resize_on_device: copy crops as they are and resize them there; None for "unless it is a CPU".
    """

    def __init__(
        self,
        store: Store,
        crop: RandomCrop | None = None,
        *,
        threads: int,
        device: torch.device | str = "cpu",
        resize_on_device: bool | None = None,
    ) -> None:
        self._store, self._crop, self._threads = store, crop, threads
        self._device = torch.device(device)
        self.index_device = torch.device("cpu")
        self._resize_on_device = self._device.type != "cpu" if resize_on_device is None else resize_on_device
        self._labels = torch.tensor(np.asarray(store.split.labels), dtype=torch.int64)
        preprocessing = store.spec.preprocessing
        self._size, self._channels = preprocessing.image_size, preprocessing.channels
        self._interpolation = preprocessing.interpolation

    def __len__(self) -> int:
        return len(self._store)

    def batches(self, epoch: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Read the batch of each (index, valid) in `parts`."""
        make = self._whole if self._crop is None else self._packed_crops if self._resize_on_device else self._crops
        jobs = (make(epoch, index, valid) for index, valid in parts)
        return to_device(_ahead(jobs, self._threads), self._device)

    def close(self) -> None:
        """Do nothing: threads end with the pass that started them."""

    def _whole(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        images = self._empty(len(index), self._channels, *self._size)
        indices = index.tolist()
        out = images.numpy()

        def read(k: int) -> None:
            out[k] = np.moveaxis(self._store.read(indices[k]).numpy(), -1, 0)

        return (images, self._labels[index], index, valid), Batch, _tasks(len(index), read)

    def _crops(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        images = self._empty(len(index), self._channels, *self._size)
        indices, boxes = self._boxes(epoch, index)
        out = images.numpy()

        def read(k: int) -> None:
            left, top, right, bottom = boxes[k]
            crop = self._store.read(indices[k])[top:bottom, left:right]
            # copied by NumPy: torch would start threads of its own for it
            out[k] = crops.resize(crop, self._size, self._interpolation).numpy()

        return (images, self._labels[index], index, valid), Batch, _tasks(len(index), read)

    def _packed_crops(self, epoch: int, index: Tensor, valid: Tensor) -> Job:
        indices, boxes = self._boxes(epoch, index)
        corner = torch.tensor(boxes)
        width, height = (corner[:, 2:] - corner[:, :2]).unbind(1)
        ends = (height * width * self._channels).cumsum(0)
        flat = self._empty(int(ends[-1]))
        shapes = torch.stack([ends - height * width * self._channels, height, width], dim=1)
        largest = int(height.max()), int(width.max())
        out, starts, stops = flat.numpy(), shapes[:, 0].tolist(), ends.tolist()

        def read(k: int) -> None:
            left, top, right, bottom = boxes[k]
            crop = self._store.read(indices[k]).numpy()[top:bottom, left:right]
            out[starts[k] : stops[k]].reshape(crop.shape)[:] = crop

        def finish(flat: Tensor, shapes: Tensor, *rest: Tensor) -> Batch:
            images = crops.resize_all(flat, shapes, largest, self._channels, self._size, self._interpolation)
            return Batch(images, *rest)

        return (flat, shapes, self._labels[index], index, valid), finish, _tasks(len(index), read)

    def _boxes(self, epoch: int, index: Tensor) -> tuple[list[int], list[list[int]]]:
        assert self._crop is not None
        indices = index.tolist()
        return indices, self._crop.boxes(epoch, indices, self._store.stored_sizes(indices))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _tasks(count: int, read: Callable[[int], None]) -> list[Callable[[], None]]:
    """Divide `read(0)` to `read(count - 1)` into tasks for threads."""

    def run(first: int) -> None:
        for k in range(first, min(first + _IMAGES_PER_TASK, count)):
            read(k)

    return [functools.partial(run, first) for first in range(0, count, _IMAGES_PER_TASK)]


def _ahead(jobs: Iterator[Job], threads: int) -> Iterator[tuple[Sequence[Tensor], Callable[..., Batch]]]:
    """Do jobs in order, a few ahead of the one asked for; without threads each when it is asked for."""
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
