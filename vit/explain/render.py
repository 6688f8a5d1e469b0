"""A map as a picture: over the image that the model saw, patch by patch, in colours that do not exaggerate.

Notable:
- a patch is one flat square, as it is to the model: smoothing would draw edges that no map has;
- black is 0, and the brightest colour is the map's largest value or three times its average, whichever is more.  A map
  that tells nothing apart looks like nothing, and its noise is not blown up to a finding;
- the Attention tab draws the same way (`vit/dashboard/static/maps.js`), so a map looks alike in both.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit.explain.colours import INFERNO

LEAST_TOP = 3.0
"""The brightest colour stands for at least this many times the average patch."""

OPACITY = 0.55
_SMALLEST = 224
_GAP, _LINE = 8, 16
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


def colour(values: np.ndarray) -> np.ndarray:
    """Turn a map (rows, columns), at least 0, into colours: uint8 (rows, columns, 3).

    Raises ValueError for anything else, and for numbers that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("expected a map (rows, columns) of finite numbers of at least 0")
    top = max(values.max(), LEAST_TOP * values.mean())
    return INFERNO[np.rint(255 * values / top).astype(np.uint8) if top > 0 else np.zeros(values.shape, np.uint8)]


def picture(pixels: np.ndarray) -> Image.Image:
    """Turn the model's input, uint8 (H, W, C), into RGB: the first three channels as colours, one or two in grey."""
    if pixels.shape[2] < 3:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0])).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def enlarge(image: Image.Image, least: int = _SMALLEST) -> Image.Image:
    """Enlarge a small image by a whole factor, so that its longer side has at least `least` pixels."""
    factor = -(-least // max(image.size))
    if factor <= 1:
        return image
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def overlay(image: Image.Image | np.ndarray, values: np.ndarray, opacity: float = OPACITY) -> Image.Image:
    """Lay a map over `image`: RGB, of the image's own size.

    Args:
        image: what the model saw, a Pillow image or uint8 (H, W, C).  Resized and cropped as for the model, so that
            patches lie where the model has them.
        values: (rows, columns), at least 0; as `vit.explain.explain` gives, on any device once it is an array.
        opacity: of the map, from 0 (the image alone) to 1 (the map alone).
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1, not {opacity!r}")
    base = picture(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    colours = colour(values)
    # pixel y belongs to row y * rows // height, whatever the sizes
    rows = np.arange(base.height) * colours.shape[0] // base.height
    columns = np.arange(base.width) * colours.shape[1] // base.width
    return Image.blend(base, Image.fromarray(colours[rows[:, None], columns]), opacity)


def panel(
    image: Image.Image | np.ndarray,
    values: np.ndarray,
    *,
    label: str,
    probability: float,
    method: str,
    opacity: float = OPACITY,
) -> Image.Image:
    """Draw what the model saw, beside it the overlay, and under both what the map is of: one RGB picture.

    Arguments as those of `overlay`; a small image is enlarged.  A caption that is too long is cut.
    """
    base = enlarge(picture(image) if isinstance(image, np.ndarray) else image.convert("RGB"))
    width, height = 2 * base.width + 3 * _GAP, base.height + 3 * _GAP + _LINE
    sheet = Image.new("RGB", (width, height), _PAPER)
    sheet.paste(base, (_GAP, _GAP))
    sheet.paste(overlay(base, values, opacity), (2 * _GAP + base.width, _GAP))
    font, end = _font(), f"  {probability:.1%}, {method}"
    name = "".join(char if char.isprintable() else "?" for char in label)
    room = width - 2 * _GAP - font.getlength(end)
    if font.getlength(name) > room:
        while name and font.getlength(name + "...") > room:
            name = name[:-1]
        name += "..."
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2 * _GAP + base.height), name + end, fill=_INK, font=font)
    return sheet


@functools.lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
