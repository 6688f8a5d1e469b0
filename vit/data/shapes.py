"""Generates images of coloured shapes on noise: the class is the kind of one shape, and boxes say where it is.

Ground truth for attention: a map that is right points into the box.

Notable:
- Image i of a split is a function of (split_seed, split, i) and the sizes asked for.  No other image, no number of
  images, and no library's random generator takes part: the draws are a counter through a 64-bit mixing function.
- Everything about an image but its pixels (position, size, turn, colour, boxes) is computed at once for all images
  when the data set is opened; pixels are drawn when they are read, thousands a second on one core.
- With `clutter`, the class is set by one object among others of kinds that are never a class, so an explanation has
  to choose.  With `objects=2` two classes are in the picture, and the larger one names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vit.data.counter_rng import keys, uniform
from vit.data.dataset import ImageData, Split
from vit.data.decode import decode
from vit.errors import VitError, did_you_mean

if TYPE_CHECKING:
    from vit.data.catalogue import DataConfig

_TRIES = 48  # positions drawn for an object; the first that touches no earlier object is taken
_SECOND = 0.6  # side of the second object, as a fraction of the first's
_SMOOTH = 4  # shapes are drawn this much larger and averaged down: soft edges
_TURN = 15.0  # degrees, either way
_SIZE = 0.12  # sides vary by this fraction, either way
_FULLEST = 0.6  # objects cover at most this much of the image, or they would not fit beside each other


def _ngon(corners: int, turn: float = 0.0) -> np.ndarray:
    angle = np.deg2rad(turn) + np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def _star() -> np.ndarray:
    points = _ngon(10)
    points[1::2] *= 0.42
    return points


def _block(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


# Outlines in the square from -1 to 1, x to the right, y down.  A second outline is a hole.
KINDS: dict[str, list[np.ndarray]] = {
    "circle": [_ngon(48)],
    "square": [_block((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))],
    "triangle": [_block((0, -0.95), (1, 0.85), (-1, 0.85))],
    "cross": [
        _block(
            (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
            (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
        )
    ],
    "star": [_star()],
    "ring": [_ngon(48), 0.55 * _ngon(48)],
    "hourglass": [_block((-0.9, -1), (0.9, -1), (0, 0), (0.9, 1), (-0.9, 1), (0, 0))],
    "arrow": [_block((0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0))],
}  # fmt: skip
CLASS_KINDS = tuple(KINDS)[:6]  # the classes, unless data.kinds says otherwise

DISTRACTORS: dict[str, list[np.ndarray]] = {
    "bar": [_block((-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1))],
    "ell": [_block((-0.8, -1), (-0.2, -1), (-0.2, 0.4), (0.8, 0.4), (0.8, 1), (-0.8, 1))],
    "tee": [_block((-1, -0.9), (1, -0.9), (1, -0.3), (0.3, -0.3), (0.3, 1), (-0.3, 1), (-0.3, -0.3), (-1, -0.3))],
    "chevron": [_block((-1, 0.3), (0, -0.7), (1, 0.3), (1, 0.9), (0, -0.1), (-1, 0.9))],
    "stairs": [
        _block(
            (-0.9, 0.9), (-0.9, 0.3), (-0.3, 0.3), (-0.3, -0.3), (0.3, -0.3), (0.3, -0.9), (0.9, -0.9), (0.9, 0.9),
        )
    ],
    "halfmoon": [np.concatenate([_ngon(48)[:25], 0.45 * _ngon(48)[24::-1]])],
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Describes each image of a split; of its M objects, object 0 names the class and lies on top.

    Attributes:
        kinds: int64 (N, M), which outline; class kinds first, distractors after them.
        centres, sides, turns: float64 (N, M, 2) x and y in pixels, (N, M) pixels, (N, M) degrees.
        colours: uint8 (N, M, C).
        boxes: float32 (N, M, 4), x0 y0 x1 y1: the outline's exact bounds, within the image.
        keys: uint64 (N,), what each image's noise is drawn from.
    """

    kinds: np.ndarray
    centres: np.ndarray
    sides: np.ndarray
    turns: np.ndarray
    colours: np.ndarray
    boxes: np.ndarray
    keys: np.ndarray


class ShapeImages:
    """Draws images from their scenes when they are read."""

    def __init__(self, scene: Scene, outlines: list[list[np.ndarray]], size: tuple[int, int], label: str) -> None:
        self._scene, self._outlines, self._size, self._label = scene, outlines, size, label

    def name(self, i: int) -> str:
        return f"{self._label}/{i}"

    def read(self, i: int, channels: int, target: tuple[int, int] | None) -> Image.Image | np.ndarray:
        return decode(self.draw(i), channels=channels)

    def draw(self, i: int) -> Image.Image | np.ndarray:
        """Draw image `i`: a Pillow image for one or three channels, else uint8 (H, W, C)."""
        scene = self._scene
        height, width = self._size
        channels = scene.colours.shape[2]
        count = height * width * channels
        # raw bits of a named bit generator: their values are the same in every release of NumPy
        bits = np.random.Philox(key=int(scene.keys[i])).random_raw(-(-count // 8)).astype("<u8")
        # 64..191: the brightest and darkest belong to the shapes
        noise = (bits.view(np.uint8)[:count] >> 1) + np.uint8(64)
        if channels == 3:
            layers = [Image.fromarray(noise.reshape(height, width, 3))]
        else:
            layers = [Image.fromarray(band) for band in noise.reshape(channels, height, width)]
        # the last object lies at the bottom: nothing covers the one that names the class
        for m in reversed(range(scene.kinds.shape[1])):
            mask, corner = self._mask(i, m)
            colour = scene.colours[i, m].tolist()
            for layer, fill in zip(layers, [tuple(colour)] if channels == 3 else colour, strict=True):
                layer.paste(fill, corner, mask)
        return layers[0] if len(layers) == 1 else np.stack([np.asarray(layer) for layer in layers], axis=2)

    def _mask(self, i: int, m: int) -> tuple[Image.Image, tuple[int, int]]:
        """Draw the coverage mask of object `m`; return it and its upper left corner in the image."""
        scene = self._scene
        x0, y0, x1, y1 = scene.boxes[i, m].tolist()
        left, top = math.floor(x0), math.floor(y0)
        mask = Image.new("L", ((math.ceil(x1) - left) * _SMOOTH, (math.ceil(y1) - top) * _SMOOTH))
        pen = ImageDraw.Draw(mask)
        turn = math.radians(scene.turns[i, m])
        half = scene.sides[i, m] / 2 * _SMOOTH
        cos, sin = half * math.cos(turn), half * math.sin(turn)
        # Pillow's polygons have their corners in the middle of pixels
        across = (scene.centres[i, m, 0] - left) * _SMOOTH - 0.5
        down = (scene.centres[i, m, 1] - top) * _SMOOTH - 0.5
        for hole, outline in enumerate(self._outlines[scene.kinds[i, m]]):
            x, y = outline.T
            points = np.stack([x * cos - y * sin + across, x * sin + y * cos + down], axis=1)
            pen.polygon(points.ravel().tolist(), fill=0 if hole else 255)
        return mask.reduce(_SMOOTH), (left, top)


def shapes(config: DataConfig, class_names: list[str] | None, scan_limit: int | None = None) -> ImageData:
    """Generate the data set: `data.train_images`, `val_images`, `test_images` of `data.image_size`."""
    classes = list(config.kinds or CLASS_KINDS)
    for kind in classes:
        if kind not in KINDS:
            raise VitError(f"data.kinds: no shape {kind!r}; {did_you_mean(kind, KINDS)}")
    if len(set(classes)) != len(classes):
        raise VitError(f"data.kinds names a shape twice: {', '.join(classes)}")
    if config.objects > len(classes):
        raise VitError(f"data.objects={config.objects} needs that many kinds, data.kinds has {len(classes)}")
    if config.clutter > len(DISTRACTORS):
        raise VitError(f"data.clutter={config.clutter}: there are {len(DISTRACTORS)} kinds to draw it from")
    if min(config.size) < 8:
        raise VitError(f"data.image_size={config.image_size}: shapes need at least 8 pixels a side")
    covered = config.object_scale * (config.clutter + (1 + _SECOND**2 if config.objects == 2 else 1))
    if covered > _FULLEST:
        raise VitError(
            f"data.object_scale={config.object_scale:g}: {config.objects + config.clutter} objects would cover "
            f"{covered:.0%} of the image; at most {config.object_scale * _FULLEST / covered:.2g} leaves room"
        )
    counts = {"train": config.train_images, "val": config.val_images, "test": config.test_images}
    splits = {name: _split(config, classes, k, name, count) for k, (name, count) in enumerate(counts.items())}
    return ImageData("shapes", classes, splits, channels=config.channels)


def _split(config: DataConfig, classes: list[str], number: int, name: str, count: int) -> Split:
    index = np.arange(count)
    labels = index % len(classes)
    key = keys(config.split_seed, number, index)
    height, width = config.size
    m = config.objects + config.clutter

    kinds = np.empty((count, m), dtype=np.int64)
    kinds[:, 0] = labels
    if config.objects == 2:  # any class but the first object's
        step = 1 + (uniform(key, 1, 1)[:, 0] * (len(classes) - 1)).astype(np.int64)
        kinds[:, 1] = (labels + step) % len(classes)
    others = np.argsort(uniform(key, 2, len(DISTRACTORS)), axis=1)[:, : config.clutter]
    kinds[:, config.objects :] = len(classes) + others

    side = np.sqrt(config.object_scale * height * width)
    sides = side * (1 + _SIZE * (2 * uniform(key, 3, m) - 1))
    if config.objects == 2:
        sides[:, 1] = sides[:, 0] * _SECOND
    sides = sides.clip(4.0, min(height, width) - 1.0)
    turns = _TURN * (2 * uniform(key, 4, m) - 1)
    outlines = [*(KINDS[kind] for kind in classes), *DISTRACTORS.values()]
    bounds = _bounds(outlines, kinds, sides, turns)
    centres = _draw_centres(key, bounds, height, width)
    boxes = bounds + np.concatenate([centres, centres], axis=2)
    scene = Scene(kinds, centres, sides, turns, _colours(key, m, config.channels), boxes.astype(np.float32), key)
    return Split(
        labels,
        ShapeImages(scene, outlines, config.size, f"shapes/{name}"),
        config.channels,
        native_size=config.size,
        boxes=scene.boxes,
        object_labels=np.where(kinds < len(classes), kinds, -1),
    )


def _bounds(outlines: list[list[np.ndarray]], kinds: np.ndarray, sides: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Compute x0 y0 x1 y1 of every outline about its own centre: float64 (N, M, 4)."""
    out = np.empty((*kinds.shape, 4))
    for kind, (outer, *_) in enumerate(outlines):
        here = kinds == kind
        angle = np.deg2rad(turns[here])[:, None]
        half = sides[here][:, None] / 2
        x = half * (outer[:, 0] * np.cos(angle) - outer[:, 1] * np.sin(angle))
        y = half * (outer[:, 0] * np.sin(angle) + outer[:, 1] * np.cos(angle))
        out[here] = np.stack([x.min(axis=1), y.min(axis=1), x.max(axis=1), y.max(axis=1)], axis=1)
    return out


def _draw_centres(key: np.ndarray, bounds: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw centres, float64 (N, M, 2): objects lie inside the image and, as far as there is room, apart."""
    count, m, _ = bounds.shape
    size = np.array([width, height], dtype=np.float64)
    low, high = -bounds[:, :, :2], size - bounds[:, :, 2:]
    high = np.maximum(low, high)
    centres = np.empty((count, m, 2))
    for j in range(m):
        drawn = uniform(key, 16 + j, 2 * _TRIES).reshape(count, _TRIES, 2)
        tries = low[:, None, j] + drawn * (high - low)[:, None, j]
        overlap = np.zeros((count, _TRIES))
        for k in range(j):
            a0, a1 = tries + bounds[:, None, j, :2], tries + bounds[:, None, j, 2:]
            b0, b1 = (centres[:, None, k] + bounds[:, None, k, at : at + 2] for at in (0, 2))
            overlap += (np.minimum(a1, b1) - np.maximum(a0, b0)).clip(min=0).prod(axis=2)
        # argmin gives the first of equals: the first free position, or the one that covers least
        centres[:, j] = tries[np.arange(count), overlap.argmin(axis=1)]
    return centres


def _colours(key: np.ndarray, m: int, channels: int) -> np.ndarray:
    """Draw colours, uint8 (N, M, C): a pure hue for three channels; else near white or near black, unlike the noise."""
    draws = uniform(key, 5, m)
    if channels == 3:
        # hue to RGB at full saturation and value
        hue = 6 * draws[:, :, None] + np.array([0.0, 4.0, 2.0])
        return np.rint(255 * (np.abs(hue % 6 - 3) - 1).clip(0, 1)).astype(np.uint8)
    light = np.where(draws < 0.5, 60 * draws, 255 - 60 * (1 - draws))
    return np.repeat(np.rint(light).astype(np.uint8)[:, :, None], channels, axis=2)
