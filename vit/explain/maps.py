"""Maps of many images: computed in batches that fit the memory, written as pictures and arrays.

`Mapper` is one choice of method, class and layer for one model; `save_overlay` and `save_map` write what it gives,
each file whole or not at all; an `Explanation` is what `Classifier.explain` gives of one image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from vit.data.preprocess import Preprocessing
from vit.errors import VitError, did_you_mean
from vit.explain.attention_tab import measure, summarise
from vit.explain.methods import METHODS, Trace, check_method, trace
from vit.explain.record import find, resolve_layer
from vit.explain.render import OPACITY, enlarge, overlay, panel, picture
from vit.files import atomic_write
from vit.map_methods import BY_CLASS

_MEMORY = 1 << 30  # bytes of attention held at once, about
_MARK = ("Software", "vit explain")


@dataclass(frozen=True)
class Mapped:
    """A map and what it is of.

    Attributes:
        values: float32 (rows, columns) of patches, at least 0, sum 1.
        index, probability: the class: the one that was asked for, or the predicted one.
    """

    values: np.ndarray
    index: int
    probability: float


def class_index(label: str | int | None, names: Sequence[str]) -> int | None:
    """Return the class that `label` names, by its name or, where no class is called so, by its number; None for None.

    A whole number is always the number.  Raises `VitError` where there is no such class, or several of that name.
    """
    if label is None:
        return None
    if isinstance(label, str):
        found = [index for index, name in enumerate(names) if name == label]
    else:
        found, label = [], str(label)
    if len(found) > 1:
        listed = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise VitError(f"target: {len(found)} classes are called {label!r}: give the number ({listed})")
    if found:
        return found[0]
    if label.isascii() and label.isdecimal() and len(label) < 9 and int(label) < len(names):
        return int(label)
    hint = f"numbers go from 0 to {len(names) - 1}" if label.isdecimal() else did_you_mean(label, names)
    raise VitError(f"target: no class {label!r}; {hint}")


@dataclass(frozen=True)
class Explanation:
    """What a model attends to in one image; shows itself as a picture in a notebook.

    Attributes:
        map: float32 (rows, columns) of the model's patch grid, at least 0, sum 1.
        label, index, probability: the class that was asked for, or the predicted one.
        method: the name of the map's method.
        image: what the model saw, uint8 (H, W, C), resized and cropped to whole patches.
    """

    map: np.ndarray
    label: str
    index: int
    probability: float
    method: str
    image: np.ndarray

    def overlay(self, opacity: float = OPACITY) -> Image.Image:
        """Lay the map over the image, in RGB; a small image is enlarged.  `opacity` of the map: from 0 to 1."""
        return overlay(enlarge(picture(self.image)), self.map, opacity)

    def __repr__(self) -> str:
        rows, columns = self.map.shape
        return f"Explanation({self.label!r} {self.probability:.1%}, {self.method}, {rows} x {columns} patches)"

    def _repr_png_(self) -> bytes:
        shown = panel(self.image, self.map, label=self.label, probability=self.probability, method=self.method)
        file = io.BytesIO()
        shown.save(file, "PNG")
        return file.getvalue()


class Mapper:
    """Maps by one method.

    Args:
        model: a `VisionTransformer`.
        preprocessing, temperature: as the model's description has them.
        method, target, layer: as for `vit.explain.explain`; `target` is one class for all images, or None.

    Raises `VitError` for a method or layer that does not exist.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocessing: Preprocessing,
        *,
        method: str = "rollout",
        target: int | None = None,
        layer: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_method(method)
        self.model, self.preprocessing, self.temperature = model, preprocessing, temperature
        self.method, self.target, self.layer = method, target, layer
        vit = find(model)
        if layer is not None:
            resolve_layer(layer, len(vit.blocks))
        self._covered = vit.covered
        tokens = vit.num_prefix_tokens + vit.grid[0] * vit.grid[1]
        heads = sum(getattr(block.attn, "heads", 1) for block in vit.blocks)
        self._bytes = 4 * heads * tokens**2
        self._device = next(model.parameters()).device
        self._drawn = 0

    def maps(self, images: Sequence[np.ndarray]) -> list[Mapped | None]:
        """Compute maps of prepared images, uint8 (H, W, C) each; None where the model gives no finite numbers.

        Raises `VitError` when the device has not enough memory.
        """
        copies = 6 if self.method in BY_CLASS else 1
        return [mapped for part in self._parts(images, copies) for mapped in self._maps(self._tensor(part))]

    def seen(self, image: np.ndarray) -> np.ndarray:
        """Cut a prepared image (H, W, C) to what lies in patches: a map says nothing about pixels left over."""
        return image[: self._covered[0], : self._covered[1]]

    def summaries(
        self, images: Sequence[np.ndarray], *, faithful: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], Trace, int]]:
        """Yield what the viewer shows of each image: its step and probe, the trace of its batch, and its index there.

        Where a class is asked for it takes the place of the true one.  `faithful` are the methods whose deletion and
        insertion is measured, on the predicted class.
        """
        for part in self._parts(images, 6):
            with _within_memory(self._device, len(part)):
                tensor = self._tensor(part)
                wanted = [self.target] * len(part)
                steps, probes, traced = summarise(self.model, tensor, wanted, temperature=self.temperature)
                if faithful:
                    maps = {method: METHODS[method](traced) for method in dict.fromkeys([*faithful, "random"])}
                    target, t = traced.target, self.temperature
                    measure(self.model, tensor, steps, maps, target, temperature=t, batch_size=32)
            for i in range(len(part)):
                yield steps[i], probes[i], traced, i

    def _maps(self, images: Tensor) -> list[Mapped | None]:
        with _within_memory(self._device, len(images)):
            traced = trace(self.model, images, self.target, methods=[self.method])
            if self.method == "random":  # a draw of its own for each image, wherever batches begin
                each = [replace(traced, logits=logits[None]) for logits in traced.logits]
                maps = torch.cat([METHODS["random"](one, seed=self._drawn + i) for i, one in enumerate(each)])
                self._drawn += len(images)
            else:
                maps = METHODS[self.method](traced, layer=self.layer)
            logits = traced.logits.cpu().double()
            probabilities = (logits / self.temperature).softmax(dim=1)
            values, targets = maps.cpu().numpy(), traced.target.tolist()
        finite = logits.isfinite().all(dim=1).tolist()
        return [
            Mapped(values[i], target, float(probabilities[i, target])) if finite[i] else None
            for i, target in enumerate(targets)
        ]

    def _parts(self, images: Sequence[np.ndarray], copies: int) -> Iterator[Sequence[np.ndarray]]:
        most = max(1, _MEMORY // (copies * self._bytes))
        for start in range(0, len(images), most):
            yield images[start : start + most]

    def _tensor(self, images: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(self.preprocessing.normalise(np.stack(images))).to(self._device)


@contextlib.contextmanager
def _within_memory(device: torch.device, count: int) -> Iterator[None]:
    """Full float32 on every device, as classification has it, and a line for a person where memory runs out."""
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    except torch.OutOfMemoryError:
        raise VitError(
            f"{device} has not enough memory for the attention of {count} images: lower the batch size"
        ) from None


def save_overlay(path: Path, pixels: np.ndarray, values: np.ndarray) -> None:
    """Write the map over what the model saw as a PNG; small images are enlarged.  Raises `VitError`."""
    info = PngImagePlugin.PngInfo()
    info.add_text(*_MARK)
    with atomic_write(path) as part:
        overlay(enlarge(picture(pixels)), values).save(part, "PNG", pnginfo=info)


def is_overlay(path: Path) -> bool:
    """Return whether the file is a picture that `save_overlay` wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(_MARK[0]) == _MARK[1]
    except Exception:  # whatever it is, it is not ours
        return False


def save_map(path: Path, mapped: Mapped, label: str, method: str) -> None:
    """Write the map as `.npz`: `map` (rows, columns), `label`, `probability`, `method`.  Raises `VitError`."""
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez(file, map=mapped.values, label=label, probability=mapped.probability, method=method)


def is_map(path: Path) -> bool:
    """Return whether the file is an array that `save_map` wrote."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return set(held.files) == {"map", "label", "probability", "method"}
    except Exception:  # whatever it is, it is not ours
        return False
