"""Classify images: decode them while the model computes, keep their order, use constant memory.

Notes:
- All backends share one code path: preprocessing with NumPy and Pillow, softmax with float64 NumPy.  Only the logits
  differ, by rounding.
- A backend that computes several small batches at once (ONNX Runtime on a CPU) gets each batch from a thread that also
  decodes it: processors wait neither for each other nor for a decoder, and activations stay in their caches.  Measured
  on 2 cores: a ViT-S/16 takes 98 ms of a processor for each image, and 128 ms in batches of 32 (ViT-Ti/16: 28 and 36
  ms).
- For a backend that computes one batch after another, threads decode a bounded number of images ahead.  The first
  batches are small, so that the first results come early.
- Unusable inputs are in no batch, so they cannot change the result of another image.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vit.errors import VitError, printable
from vit.inference.description import Description
from vit.processors import count_cpus

if TYPE_CHECKING:
    from PIL import Image

    from vit.explain.maps import Explanation

    Input = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Prepared = tuple[str | None, np.ndarray | str]  # a path, and pixels or the reason why there are none

BATCH = 32
"""Default size of a batch, at most."""

NO_NUMBER = "the model gives no number for this image (its weights hold NaN or infinities)"


class Backend(Protocol):
    """Computes logits float32 (B, K) of images float32 (B, C, H, W).

    `threads` is the number of threads that should call `logits` at the same time, each with a small batch; 0 if one
    batch after the other is faster.
    """

    name: str
    device: str
    description: Description
    threads: int

    def ready(self) -> None:
        """Wait until the model is loaded.  Raises `VitError` when loading failed; `logits` does so as well."""

    def logits(self, images: np.ndarray) -> np.ndarray: ...

    def network(self) -> Any:
        """Load the torch module of the model, in evaluation mode.  Raises `VitError` when there are no weights."""


@dataclass(frozen=True)
class Result:
    """Holds the result for one input, or the reason why it could not be used.

    Attributes:
        path: the path as given; None for an image in memory.
        label, index, probability: the class with the highest probability.
        top: the classes with the highest probabilities, best first, each {"label", "index", "probability"}.
        error: why the input could not be used; the other attributes are then empty.
    """

    path: str | None
    label: str | None = None
    index: int | None = None
    probability: float | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert the result to a dictionary, as in `vit classify --format jsonl`."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {
            "path": self.path,
            "label": self.label,
            "index": self.index,
            "probability": self.probability,
            "top": self.top,
        }


@dataclass(frozen=True)
class InvalidInput:
    """Marks an input that cannot be opened; it becomes a row with this error."""

    path: str
    reason: str


class Flush:
    """Marks a pause in a stream of inputs: classify all earlier inputs now."""


class Classifier:
    """Classifies images with a trained model; `vit.load` makes it.

    Attributes:
        description: classes, preprocessing, temperature, history.
        backend: "onnx" or "torch".
        device: the device of the backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.description = backend.description
        self.backend = backend.name
        self.device = backend.device

    def __repr__(self) -> str:
        return (
            f"Classifier({len(self.description.class_names)} classes, backend={self.backend!r}, device={self.device!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_threads", "_network")}

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits (B, K) of normalised images float32 (B, C, H, W).  Raises `VitError` for another shape."""
        expected = (self.description.preprocessing.channels, *self.description.preprocessing.image_size)
        images = np.asarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != expected:
            shape = ", ".join(map(str, expected))
            raise VitError(f"the model takes images of shape (B, {shape}), not {images.shape}")
        if len(images) == 0:
            return np.empty((0, len(self.description.class_names)), np.float32)
        size = self._batch_per_thread()
        if not self._backend.threads or len(images) <= size:
            return self._backend.logits(images)
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return np.concatenate(list(self._threads.map(self._backend.logits, parts)))

    def explain(
        self,
        image: Input,
        *,
        method: str = "rollout",
        target: str | int | None = None,
        layer: int | None = None,
    ) -> Explanation:
        """Compute an attention map of an image.  Imports torch, with the ONNX backend too.

        Args:
            image: a path, encoded bytes, a Pillow image, or an array (H, W) or (H, W, C).
            method: one of `vit.explain.METHODS`.
            target: the class to explain, by name or number; None: the predicted one.
            layer: as for `vit.explain.explain`.

        Raises:
            VitError: if the image, method, class or layer is invalid, or an ONNX file has no weights.
        """
        from vit.data.decode import ImageError
        from vit.explain.maps import Explanation, Mapper, class_index

        d, path = self.description, _path(image)
        index = class_index(target, d.class_names)
        mapper = Mapper(
            self._network, d.preprocessing, method=method, target=index, layer=layer, temperature=d.temperature
        )
        pixels = self._prepare(image)
        if isinstance(pixels, str):
            raise ImageError(pixels, path and printable(path))
        (mapped,) = mapper.maps([pixels])
        if mapped is None:
            raise ImageError(NO_NUMBER, path and printable(path))
        label = d.class_names[mapped.index]
        return Explanation(mapped.values, label, mapped.index, mapped.probability, method, mapper.seen(pixels))

    @functools.cached_property
    def _network(self) -> Any:
        """Load the torch module, for attention maps."""
        return self._backend.network()

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Start the threads that share a batch of `logits`."""
        return ThreadPoolExecutor(self._backend.threads, thread_name_prefix="logits")

    def ready(self) -> None:
        """Wait until the model is loaded, after `vit.inference.loading.load` with `block=False`.

        Raises `VitError` when it cannot be loaded.
        """
        self._backend.ready()

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Compute probabilities float64 (B, K), softmax(logits / temperature), of normalised images (B, C, H, W)."""
        return softmax(self.logits(images), self.description.temperature)

    def classify(self, inputs: Iterable[Input], *, top_k: int = 5, batch_size: int | None = None) -> list[Result]:
        """Classify images: paths, encoded bytes, Pillow images, arrays (H, W) or (H, W, C); results in input order.

        A single path, image or array needs no list.  An image that cannot be used gives a result with `error`.  Raises
        `VitError` when `top_k` or `batch_size` is not a whole number above 0.
        """
        from PIL import Image

        if isinstance(inputs, str | os.PathLike | bytes | Image.Image) or (
            isinstance(inputs, np.ndarray) and inputs.ndim < 4
        ):
            inputs = [inputs]
        return list(self.stream(inputs, top_k=top_k, batch_size=batch_size))

    def stream(
        self, inputs: Iterable[Input | InvalidInput | Flush], *, top_k: int = 5, batch_size: int | None = None
    ) -> Iterator[Result]:
        """Classify as `classify` does, one result at a time, in constant memory for any number of inputs.

        `batch_size` is the number of images in a batch; None: chosen for the backend.  Inputs are read when needed, up
        to two batches ahead, or two for each computing thread.
        """
        for name, value in (("top_k", top_k), ("batch_size", 1 if batch_size is None else batch_size)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise VitError(f"{name}: expected a whole number, at least 1, not {value!r}")
        return self._stream(inputs, int(top_k), batch_size)

    def _stream(self, inputs: Iterable[Any], top_k: int, batch_size: int | None) -> Iterator[Result]:
        with contextlib.closing(self.classify_batches(inputs, top_k, batch_size)) as batches:
            for _, results in batches:
                yield from results

    def classify_batches(
        self, inputs: Iterable[Input | InvalidInput | Flush], top_k: int = 5, batch_size: int | None = None
    ) -> Generator[tuple[list[Prepared], list[Result]], None, None]:
        """Classify in batches, in order; yield the rows of `prepare_batches` and their results."""
        if self._backend.threads:
            yield from self._classify_in_threads(inputs, top_k, batch_size or self._batch_per_thread())
            return
        with contextlib.closing(self.prepare_batches(inputs, batch_size or BATCH)) as batches:
            for rows in batches:
                yield rows, self.classify_prepared(rows, top_k)

    def _batch_per_thread(self) -> int:
        """Compute the batch size for one thread: about 400 patches keep a processor busy and stay in its caches."""
        architecture = self.description.architecture
        sides = zip(architecture["image_size"], architecture["patch_size"], strict=True)
        return min(BATCH, max(1, 400 // math.prod(max(1, image // patch) for image, patch in sides)))

    def _classify_in_threads(
        self, inputs: Iterable[Any], top_k: int, batch_size: int
    ) -> Generator[tuple[list[Prepared], list[Result]], None, None]:
        def work(items: list[Any]) -> tuple[list[Prepared], list[Result]]:
            rows = [(_path(item), self._prepare(item)) for item in items]
            return rows, self.classify_prepared(rows, top_k)

        threads = self._backend.threads
        waiting: deque[Future[tuple[list[Prepared], list[Result]]]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="classify")
        items: list[Any] = []
        try:
            for item in inputs:
                pause = isinstance(item, Flush)
                if not pause:
                    items.append(item)
                if items and (pause or len(items) >= batch_size):
                    waiting.append(pool.submit(work, items))
                    items = []
                while waiting and (pause or waiting[0].done() or len(waiting) >= 2 * threads):
                    yield waiting.popleft().result()
            if items:
                waiting.append(pool.submit(work, items))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def prepare_batches(
        self, inputs: Iterable[Input | InvalidInput | Flush], batch_size: int = BATCH
    ) -> Generator[list[Prepared], None, None]:
        """Yield the inputs in batches, in order, decoded ahead by threads.

        Each row is the path (None for an image in memory) with the resized image uint8 (H, W, C) before normalisation,
        or with the reason why there is none.
        """
        workers = count_cpus()
        size = min(batch_size, workers)
        waiting: deque[tuple[str | None, Future[np.ndarray | str]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            for item in inputs:
                if isinstance(item, Flush):
                    while waiting:
                        yield _take_results(waiting, batch_size)
                    continue
                waiting.append((_path(item), pool.submit(self._prepare, item)))
                if len(waiting) >= size + batch_size:
                    yield _take_results(waiting, size)
                    size = min(batch_size, 2 * size)
            while waiting:
                yield _take_results(waiting, size)
                size = min(batch_size, 2 * size)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def classify_prepared(self, rows: Sequence[Prepared], top_k: int = 5) -> list[Result]:
        """Classify rows of `prepare_batches`.  Raises `VitError` if the model cannot be loaded, even without images."""
        self.ready()
        images = [pixels for _, pixels in rows if not isinstance(pixels, str)]
        logits = iter(self.logits(self.description.preprocessing.normalise(np.stack(images))) if images else ())
        return [
            Result(path, error=pixels) if isinstance(pixels, str) else self._result(path, next(logits), top_k)
            for path, pixels in rows
        ]

    def _prepare(self, item: Any) -> np.ndarray | str:
        """Decode and resize an input to uint8 (H, W, C), or return the reason why it cannot be used."""
        if isinstance(item, InvalidInput):
            return item.reason
        # imported here, so that a thread loads Pillow while the session is built
        from vit.data.decode import ImageError, decode

        preprocessing = self.description.preprocessing
        try:
            image = decode(item, channels=preprocessing.channels, target=preprocessing.resize_target)
            return preprocessing.resize(image)
        except ImageError as error:
            return error.reason
        except MemoryError:
            return "too large for the memory of this machine"
        except Exception as error:  # one bad input must never stop the others
            return f"cannot be used: {type(error).__name__}: {error}"

    def _result(self, path: str | None, logits: np.ndarray, top_k: int) -> Result:
        if not np.isfinite(logits).all():
            return Result(path, error=NO_NUMBER)
        probabilities = softmax(logits, self.description.temperature)
        names = self.description.class_names
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        top = [{"label": names[i], "index": int(i), "probability": float(probabilities[i])} for i in best]
        return Result(path, top=top, **top[0])


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Compute softmax(logits / temperature) over the last axis, in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _take_results(waiting: deque[tuple[str | None, Future[np.ndarray | str]]], size: int) -> list[Prepared]:
    rows = [waiting.popleft() for _ in range(min(size, len(waiting)))]
    return [(path, future.result()) for path, future in rows]


def _path(item: Any) -> str | None:
    if isinstance(item, InvalidInput):
        return item.path
    return os.fsdecode(item) if isinstance(item, str | os.PathLike) else None
