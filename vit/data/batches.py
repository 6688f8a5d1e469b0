"""Batches: which images each one holds, in what order, and how far an epoch has come.

Notable:
- A loader decides the order; a `Source` delivers the images: `ResidentImages`, `StreamedImages` or `StoredImages`.
- The order of an epoch is a function of (seed, epoch), and a batch one of (order, position). A loader's whole state is
  the epoch and a position; after a resume the very next batch comes.
- A batch is cut over processes, not the data set: process r takes the r-th slice of every global batch, so any number
  of processes sees the same batches in the same order.
- Loaders are plain iterables with `state_dict` and `load_state_dict`, which Lightning saves and restores. Its sampler
  machinery leaves them alone, except that it calls `loader.sampler.set_epoch`; that is why `sampler` is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vit.data.random import permutation
from vit.errors import VitError

log = logging.getLogger("vit")


class Batch(NamedTuple):
    """A batch of images with their labels.

    Attributes:
        images: uint8 (B, C, H, W).
        labels: int64 (B,).
        index: int64 (B,), each image's index in its split.
        valid: bool (B,); false for repeats that fill up a last batch. Always true in training.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a batch for
    valid: Tensor


class Source(Protocol):
    """Delivers the images of a split in the order that a loader asks for.

    Attributes:
        index_device: where the indices in `parts` are wanted.
    """

    index_device: torch.device

    def __len__(self) -> int:
        """Count the images."""

    def batches(self, epoch: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Yield a batch for each (index, valid) in `parts`: int64 (B,) and bool (B,), in that order."""

    def close(self) -> None:
        """Stop worker processes, if there are any. `batches` starts new ones."""


class _Loader:
    """Passes batches on from a source, and measures how long its user waits for them."""

    wait_seconds: float = 0.0

    def __init__(self, source: Source) -> None:
        self.source, self.samples = source, len(source)

    def close(self) -> None:
        """Stop worker processes, if there are any. Iterating again starts new ones."""
        self.source.close()

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.wait_seconds += time.perf_counter() - started
            yield batch


class TrainLoader(_Loader):
    """Yields shuffled batches, every one full.

    Iterating yields the batches of the epoch that `set_epoch` chose: all of them, or after `load_state_dict` those that
    were still to come. `len()` is the number in a whole epoch either way.

    The last, partial batch is left out (another shuffle brings its images back), except that a data set smaller than a
    batch makes one batch of all of it. Over several processes that one is rounded down to equal parts.

    Args:
        source: delivers the images.
        batch_size: of a global batch, all processes together.
        seed: the run's; the order is a function of it and the epoch.
        rank, world_size: this process and how many there are; it gets its part of every global batch.
        paired: neighbours in a batch are mixed, so that no pair may be divided between two processes.

    Attributes:
        wait_seconds: how long the user of this loader has waited for batches so far.
        batch_size: of a global batch; smaller than asked for only where the data set is.

    Raises:
        VitError: no images, or a batch size that the processes cannot share.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        paired: bool = False,
    ) -> None:
        super().__init__(source)
        if self.samples < 1:
            raise VitError("the training split has no images")
        if self.samples < world_size:
            raise VitError(
                f"the training split has {self.samples} images, fewer than the {world_size} processes; train with 1"
            )
        self.seed = seed
        self.batch_size = _batch_size(self.samples, batch_size, world_size, paired)
        local = self.batch_size // world_size
        self._slice = slice(rank * local, (rank + 1) * local)
        self._epoch = 0
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        return max(1, self.samples // self.batch_size)

    @property
    def epoch(self) -> int:
        """Return the epoch that iterating yields."""
        return self._epoch

    @property
    def sampler(self) -> TrainLoader:
        """Return the loader itself, for Lightning to call `set_epoch` on."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. The epoch that a loaded state stands in keeps its position; any other starts afresh."""
        if epoch != self._epoch:
            self._epoch, self._position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the position in plain numbers: batches handed out, and what that count depends on."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` stood: the next iteration starts with the batch after the last handed out.

        With another batch size it continues at the same image, to the nearest whole batch; with another seed or
        number of images the order is another one, and the log says so.
        """
        try:
            epoch, position = int(state_dict["epoch"]), int(state_dict["position"])
            batch_size = int(state_dict["batch_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise VitError(f"the checkpoint's data position is unreadable: {error!r}") from error
        if batch_size != self.batch_size:
            position = position * batch_size // self.batch_size
        for key, own in (("samples", self.samples), ("seed", self.seed)):
            if state_dict.get(key) != own:
                log.warning("resuming with another order of images: %s was %s, is %s", key, state_dict.get(key), own)
        self._epoch, self._position, self._resumed = epoch, position, True

    def __iter__(self) -> Iterator[Batch]:
        # a generator: nothing below runs before the first batch is asked for, by when Lightning, which makes its
        # iterator first, has set the epoch
        if not self._resumed:
            self._position = 0
        self._resumed = False
        epoch, start = self._epoch, self._position
        for batch in self._timed(self.source.batches(epoch, self._parts(epoch, start))):
            if epoch == self._epoch:
                self._position += 1
            yield batch

    def _parts(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index, valid) of this process's part of each batch, from number `start` on."""
        device = self.source.index_device
        order = permutation(self.seed, epoch, self.samples, device)[: len(self) * self.batch_size]
        own = order.view(len(self), self.batch_size)[:, self._slice]
        valid = torch.ones(own.shape[1], dtype=torch.bool, device=device)
        for index in own[start:]:
            yield index, valid


class EvalLoader(_Loader):
    """Yields every image once, in order.

    Process r takes the r-th slice of every global batch. All processes get equally many batches of equal sizes: a last
    batch that does not divide is filled up by repeating its last image, marked `valid=False`. One process needs no
    filling, so there the last batch is just smaller.

    Args:
        source: delivers the images.
        batch_size: of a global batch, all processes together.
        rank, world_size: this process and how many there are.

    Attributes:
        wait_seconds: how long the user of this loader has waited for batches so far.
    """

    def __init__(self, source: Source, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(source)
        if batch_size < 1:
            raise VitError(f"data.eval_batch_size: {batch_size} is not at least 1")
        self._rank, self._world_size = rank, world_size
        self._global = -(-batch_size // world_size) * world_size

    def __len__(self) -> int:
        return -(-self.samples // self._global)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._timed(self.source.batches(0, self._parts()))

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index, valid) of this process's part of each batch."""
        for start in range(0, self.samples, self._global):
            size = min(self._global, self.samples - start)
            local = -(-size // self._world_size)
            first = start + self._rank * local
            index = torch.arange(first, first + local, device=self.source.index_device)
            yield index.clamp(max=self.samples - 1), index < self.samples


def to_device(
    batches: Iterator[tuple[Sequence[Tensor], Callable[..., Batch]]], device: torch.device
) -> Iterator[Batch]:
    """Copy tensors from the host to the device, and make batches of them there with the function beside them.

    To a GPU they go through pinned memory and on a stream of their own, so that copying overlaps with the computation
    of the batch before.
    """
    if device.type != "cuda":
        for tensors, finish in batches:
            yield finish(*(tensor.to(device) for tensor in tensors))
        return
    copying = torch.cuda.Stream(device)
    for tensors, finish in batches:
        with torch.cuda.stream(copying):
            batch = finish(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
        using = torch.cuda.current_stream(device)
        using.wait_stream(copying)
        for part in batch:
            part.record_stream(using)
        yield batch


def _batch_size(samples: int, batch_size: int, world_size: int, paired: bool) -> int:
    """Check the global batch size, and reduce it to what a small data set fills."""
    if batch_size < 1:
        raise VitError(f"data.batch_size: {batch_size} is not at least 1")
    # a pair that is mixed must lie in one process
    unit = world_size * (2 if paired and world_size > 1 else 1)
    if batch_size % unit:
        lower, upper = batch_size // unit * unit, (batch_size // unit + 1) * unit
        parts = "even parts, which mixup and cutmix need," if unit > world_size else "equal parts"
        fits = f"{lower} or {upper}" if lower else str(upper)
        raise VitError(
            f"data.batch_size: {batch_size} does not split into {parts} over {world_size} processes; {fits} would"
        )
    if samples >= batch_size:
        return batch_size
    if samples < unit:
        unit = world_size
    return samples // unit * unit
