"""Images in, labels out: decoding overlapped with compute, order kept, memory constant, a broken file a row.

Notable
- One code path for every backend: preprocessing is NumPy and Pillow, softmax is float64 NumPy, so only the logits
  differ, and those by rounding.
- A backend that computes several small batches at once (ONNX Runtime on a CPU) gets each from a thread that decodes it
  as well: processors wait neither for each other nor for a decoder, and what is computed stays in their caches.
  Measured on 2 cores: a ViT-S/16 takes 98 ms of a processor an image so, and 128 ms in batches of 32 (ViT-Ti/16: 28
  and 36 ms).
- For one that computes batch after batch, a bounded window of images is decoded ahead by threads; the first batches are
  small, so that the first answers come early and compute does not wait for a full batch.
- What cannot be used takes part in no batch, so it cannot shift or change a neighbour's result.

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
from vit.processors import available

if TYPE_CHECKING:
    from PIL import Image

    from vit.explain.maps import Explanation

    Input = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Prepared = tuple[str | None, np.ndarray | str]  # a path, and pixels or why there are none

BATCH = 32
"""Images computed together, at most, unless somebody asks for more."""

NO_NUMBER = "the model gives no number for this image (its weights hold NaN or infinities)"


class Backend(Protocol):
    """What computes logits: float32 (B, C, H, W) -> float32 (B, K).

    `threads` is how many threads should call `logits` at the same time, each with a small batch; 0 where one batch
    after the other is better.
    """

    name: str
    device: str
    description: Description
    threads: int

    def ready(self) -> None:
        """Wait for what is prepared in the background.  Raises `VitError` when it failed; `logits` does so as well."""

    def logits(self, images: np.ndarray) -> np.ndarray: ...

    def network(self) -> Any:
        """The torch module of the same model, in evaluation mode.  Raises `VitError` where its weights are not here."""


@dataclass(frozen=True)
class Result:
    """The answer for one input, or why there is none.

    Attributes
        path: as it was given; None for an image that was handed over in memory.
        label, index, probability: of the likeliest class.
        top: the likeliest classes, best first, each {"label", "index", "probability"}.
        error: why the input could not be used; then the others are empty.
    """

    path: str | None
    label: str | None = None
    index: int | None = None
    probability: float | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `vit classify --format jsonl` writes it."""
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
    """An input known to be of no use before it is opened; it becomes a row with this error."""

    path: str
    reason: str


class Flush:
    """In a stream of inputs: no more for now, so answer those that came."""


class Classifier:
    """A trained model as a thing to call; made by `vit.load`.

    Attributes
        description: classes, preprocessing, temperature, history.
        backend, device: "onnx" or "torch", and where it computes.
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
        """Normalised images float32 (B, C, H, W) -> logits float32 (B, K).  Raises `VitError` for another shape."""
        expected = (self.description.preprocessing.channels, *self.description.preprocessing.image_size)
        images = np.asarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != expected:
            wanted = ", ".join(map(str, expected))
            raise VitError(f"the model takes images of shape (B, {wanted}), not {images.shape}")
        if len(images) == 0:
            return np.empty((0, len(self.description.class_names)), np.float32)
        few = self._batch_per_thread()
        if not self._backend.threads or len(images) <= few:
            return self._backend.logits(images)
        parts = [images[start : start + few] for start in range(0, len(images), few)]
        return np.concatenate(list(self._threads.map(self._backend.logits, parts)))

    def explain(
        self,
        image: Input,
        *,
        method: str = "rollout",
        target: str | int | None = None,
        layer: int | None = None,
    ) -> Explanation:
        """Map what the model attends to in an image.  Imports torch, with the ONNX backend too.

        Arguments
            image: a path, encoded bytes, a Pillow image, or an array (H, W) or (H, W, C).
            method: one of `vit.explain.METHODS`.
            target: the class to explain, by name or number; None: the predicted one.
            layer: as for `vit.explain.explain`.

        Raises `VitError` for an image, method, class or layer that cannot be, and for an ONNX file without weights.
        """
        from vit.data.decode import ImageError
        from vit.explain.maps import Explanation, Mapper, class_index

        d, where = self.description, _path(image)
        index = class_index(target, d.class_names)
        mapper = Mapper(
            self._network, d.preprocessing, method=method, target=index, layer=layer, temperature=d.temperature
        )
        pixels = self._prepare(image)
        if isinstance(pixels, str):
            raise ImageError(pixels, where and printable(where))
        (mapped,) = mapper.maps([pixels])
        if mapped is None:
            raise ImageError(NO_NUMBER, where and printable(where))
        label = d.class_names[mapped.index]
        return Explanation(mapped.values, label, mapped.index, mapped.probability, method, mapper.seen(pixels))

    @functools.cached_property
    def _network(self) -> Any:
        """The torch module, for what a session does not give away."""
        return self._backend.network()

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Those that share a batch handed to `logits`."""
        return ThreadPoolExecutor(self._backend.threads, thread_name_prefix="logits")

    def ready(self) -> None:
        """Wait until the model is loaded, where `vit.inference.loading.load` did not.

        Raises `VitError` when it cannot be.
        """
        self._backend.ready()

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Normalised images float32 (B, C, H, W) -> probabilities float64 (B, K), softmax(logits / temperature)."""
        return softmax(self.logits(images), self.description.temperature)

    def classify(self, inputs: Iterable[Input], *, top_k: int = 5, batch_size: int | None = None) -> list[Result]:
        """Label images: paths, encoded bytes, Pillow images, arrays (H, W) or (H, W, C).  Results in input order.

        A single path, image or array may be given without a list.  An image that cannot be used gives a result with
        `error`.  Raises `VitError` when `top_k` or `batch_size` is not a whole number above 0.
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
        """As `classify`, one result at a time, in constant memory however many inputs there are.

        `batch_size` is how many images are computed together; None for what suits the backend.  Inputs are taken as
        they are needed, up to two batches ahead, or two a thread where threads compute.
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
        """The inputs in batches, in their order, as `prepare_batches` gives them, with their results."""
        if self._backend.threads:
            yield from self._classify_in_threads(inputs, top_k, batch_size or self._batch_per_thread())
            return
        with contextlib.closing(self.prepare_batches(inputs, batch_size or BATCH)) as batches:
            for rows in batches:
                yield rows, self.classify_prepared(rows, top_k)

    def _batch_per_thread(self) -> int:
        """Images in a batch for one thread: some 400 patches keep a processor busy without leaving its caches."""
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
        """The inputs in batches, in their order, decoded ahead by threads.

        Each is its path (None for an image in memory) with the model's input before normalisation, uint8 (H, W, C),
        or with the reason why there is none.
        """
        workers = available()
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
        """The model's input before normalisation, uint8 (H, W, C), or why there is none."""
        if isinstance(item, InvalidInput):
            return item.reason
        # here, so that a thread loads Pillow while the session is built
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
    """exp(z) / sum exp(z) over the last axis, with z = logits / temperature, in float64."""
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
