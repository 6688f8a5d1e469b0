"""Preprocessing: resizes, crops and normalises a decoded image, with the same numbers as timm's evaluation path.

Notable:
- `center`, `squash` and `border` round, crop and pad as `timm.data.create_transform` does (which in turn follows
  torchvision on Pillow images), so a pretrained model sees what it was trained on.
- `resize` stays in uint8, so a data set can be held at a quarter of the size and normalised on the device.
- Plain JSON types in and out: this object travels inside every saved model.

NumPy and Pillow only, and Pillow when there is an image: what a model says of itself is read without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.errors import VitError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
"""Pillow's filters (`PIL.Image.Resampling`)."""
CROP_MODES = ("center", "squash", "border")

# An image this much longer than wide is cut before it is enlarged: a 1 x 30,000 strip must not become 224 x 6,720,000.
_LONGEST = 32


# A description comes from a file that someone else may have made: numbers must not be able to fill the memory.
_MOST_CHANNELS = 1024
_MOST_PIXELS = 65_535


@dataclass(frozen=True)
class Preprocessing:
    """Turns a decoded image into the model's input.

    Attributes:
        image_size: (H, W) of the model's input.
        channels: C of the model's input.
        mean, std: per channel, of values in [0, 1].
        interpolation: a Pillow filter, antialiased when shrinking.
        crop_pct: the image is resized to image_size / crop_pct, and the centre kept.
        crop_mode: `center` brings the shorter side to size (the rest is cut off); `squash` both sides (the aspect
            ratio is lost); `border` the longer side (the rest is filled with the mean colour).
    """

    image_size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "image_size", _pair(self.image_size))
        if not _whole(self.channels) or not 1 <= self.channels <= _MOST_CHANNELS:
            raise VitError(f"channels: expected a whole number from 1 to {_MOST_CHANNELS}, got {self.channels!r}")
        for key in ("mean", "std"):
            values = getattr(self, key)
            # nothing given: centre [0, 1] on zero, as most ViTs are trained
            values = (0.5,) * self.channels if values is None or len(_listed(key, values)) == 0 else tuple(values)
            if len(values) == 1:
                values = values * self.channels
            if len(values) != self.channels:
                raise VitError(f"{key}: expected {self.channels} numbers, one a channel, got {len(values)}")
            if not all(_number(value) for value in values):
                raise VitError(f"{key}: expected numbers, got {list(values)!r}")
            if key == "std" and min(values) <= 0:
                raise VitError(f"std: expected numbers above 0, got {list(values)!r}")
            set_(self, key, tuple(float(value) for value in values))
        if self.interpolation not in INTERPOLATIONS:
            raise VitError(
                f"interpolation={self.interpolation!r}: {did_you_mean(str(self.interpolation), INTERPOLATIONS)}"
            )
        if self.crop_mode not in CROP_MODES:
            raise VitError(f"crop_mode={self.crop_mode!r}: {did_you_mean(str(self.crop_mode), CROP_MODES)}")
        if not _number(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise VitError(f"crop_pct: expected a number above 0 and up to 1, got {self.crop_pct!r}")
        set_(self, "crop_pct", float(self.crop_pct))

    @property
    def resize_target(self) -> tuple[int, int]:
        """Return (H, W) before the crop, the `target` for `decode`."""
        height, width = self.image_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    @property
    def geometry(self) -> dict[str, Any]:
        """Return all that `resize` depends on, as plain JSON types."""
        geometry = {key: value for key, value in self.to_dict().items() if key not in ("mean", "std")}
        return geometry | {"fill": list(self.mean)} if self.crop_mode == "border" else geometry

    def leaves_unchanged(self, size: tuple[int, int]) -> bool:
        """Say whether `resize` returns an image of `size` (H, W) unchanged."""
        return size == self.image_size == self.resize_target

    def resize(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Resize and crop: uint8 (H, W, C).  The result may share memory with the input and may be read-only.

        Raises `vit.data.decode.ImageError` when the image cannot have `channels` channels.
        """
        if (
            isinstance(image, np.ndarray)
            and image.dtype == np.uint8
            and image.ndim == 3
            and image.shape[2] == self.channels
            and self.leaves_unchanged((image.shape[0], image.shape[1]))
        ):
            return image
        from PIL import Image

        from vit.data.decode import decode

        pixels = decode(image, channels=self.channels)
        if isinstance(pixels, np.ndarray):
            if self.leaves_unchanged((pixels.shape[0], pixels.shape[1])):
                return pixels
            # Pillow resizes one band as it would several
            bands = [self._fit(Image.fromarray(pixels[:, :, c]), (c,)) for c in range(self.channels)]
            return np.stack([np.asarray(band) for band in bands], axis=2)
        fitted = np.asarray(self._fit(pixels, tuple(range(self.channels))))
        return fitted[:, :, None] if fitted.ndim == 2 else fitted

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """Compute `(value / 255 - mean) / std`: (..., H, W, C) uint8 -> (..., C, H, W) float32."""
        scale = 1.0 / (255.0 * np.asarray(self.std))
        shift = -np.asarray(self.mean) / np.asarray(self.std)
        moved = np.moveaxis(images, -1, -3)
        out = np.empty(moved.shape, dtype=np.float32)
        np.multiply(moved, scale.astype(np.float32)[:, None, None], out=out)
        out += shift.astype(np.float32)[:, None, None]
        return out

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Make the model's input of one image: float32 (C, H, W)."""
        return self.normalise(self.resize(image))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {
            "image_size": list(self.image_size),
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """Invert `to_dict`. Raises `VitError` for anything that is not such a dictionary."""
        if not isinstance(values, Mapping):
            raise VitError(f"preprocessing: expected a dictionary, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise VitError(f"preprocessing: unknown key {key!r}; {did_you_mean(str(key), known)}")
        if "image_size" not in values:
            raise VitError("preprocessing: 'image_size' is missing")
        try:
            return cls(**values)
        except VitError as error:
            raise VitError(f"preprocessing: {error}") from error

    def _fit(self, image: Image.Image, bands: tuple[int, ...]) -> Image.Image:
        """Resize and crop an image whose bands are the input's `bands`."""
        height, width = self.image_size
        target_h, target_w = self.resize_target
        if self.crop_mode == "squash":
            return _crop(self._scale(image, target_w, target_h), width, height)
        if self.crop_mode == "border":
            ratio = max(image.height / target_h, image.width / target_w)
            image = self._scale(image, round(image.width / ratio) or 1, round(image.height / ratio) or 1)
            fill = tuple(min(max(round(255 * self.mean[band]), 0), 255) for band in bands)
            return _pad(image, width, height, fill)
        image = _trim(image, _LONGEST * target_w / target_h, _LONGEST * target_h / target_w)
        if target_h == target_w:
            short, long = sorted(image.size)
            long = int(target_h * long / short)
            scaled = (target_w, long) if image.width <= image.height else (long, target_h)
        else:
            ratio = min(image.height / target_h, image.width / target_w)
            scaled = (round(image.width / ratio), round(image.height / ratio))
        return _crop(self._scale(image, *scaled), width, height)

    def _scale(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        from PIL.Image import Resampling

        return image.resize((width, height), Resampling[self.interpolation.upper()])


def scaled(image: Image.Image | np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize all of a decoded image to `size` (H, W), whatever its proportions: uint8 (H, W, C)."""
    from PIL import Image

    height, width = size
    kind = Image.Resampling[interpolation.upper()]
    if isinstance(image, np.ndarray):
        # Pillow resizes one band as it would several
        bands = [Image.fromarray(image[:, :, c]).resize((width, height), kind) for c in range(image.shape[2])]
        return np.stack([np.asarray(band) for band in bands], axis=2)
    pixels = np.asarray(image if image.size == (width, height) else image.resize((width, height), kind))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    left, top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
    if image.width < width or image.height < height:
        from PIL import Image

        canvas = Image.new(
            image.mode, (max(width, image.width), max(height, image.height)), fill if len(fill) > 1 else fill[0]
        )
        canvas.paste(image, (left, top))
        image = canvas
    return _crop(image, width, height)


def _trim(image: Image.Image, widest: float, tallest: float) -> Image.Image:
    """Cut the ends, which the centre crop drops anyway, off a strip wider or taller than these aspect ratios."""
    width = min(image.width, max(1, math.ceil(image.height * widest)))
    height = min(image.height, max(1, math.ceil(image.width * tallest)))
    return _crop(image, width, height)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(float(value))


def _listed(key: str, values: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise VitError(f"{key}: expected a list of numbers, got {values!r}")
    return values


def _pair(value: object) -> tuple[int, int]:
    sides = (value, value) if _whole(value) else value
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 2
        or not all(_whole(s) and 0 < s <= _MOST_PIXELS for s in sides)
    ):
        raise VitError(f"image_size: expected pixels or [height, width], got {value!r}")
    return int(sides[0]), int(sides[1])
