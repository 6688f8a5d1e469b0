"""Pictures for TensorBoard, drawn with Pillow: a plotting library would cost the training loop 0.3 s each.

Notable: small images are enlarged by whole numbers without smoothing, so that one pixel of a digit stays one square;
names of classes come from folders and may hold anything, so they are cleaned and cut to fit before they are drawn.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from vit.training.examples import Example

Caption = list[tuple[str, str]]  # lines: what is cut to fit, and what stands whole at the right

_TILE, _LARGEST = 96, 128  # pixels of an image's longer side in a grid: about, and at most
_NARROWEST, _WIDEST = 100, 150  # pixels for a caption; longer ones are cut
_GAP = 8
_INK, _GREY, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
_GOOD, _BAD, _BLUE = (24, 128, 56), (197, 34, 31), (25, 86, 176)
_NUMBERED = 26  # pixels of a cell that has room for its count
_MOST_BARS = 40


def clean(name: str) -> str:
    """`name` with everything that has no shape (control characters, broken encoding) as "?"."""
    return "".join(c if c.isprintable() else "?" for c in name) or "?"


def tags(names: Sequence[str]) -> list[str]:
    """A TensorBoard tag for each class: cleaned names, without slashes, told apart where they became equal."""
    cleaned = [clean(name).replace("/", "_") for name in names]
    return [tag if cleaned.count(tag) == 1 else f"{tag} ({k})" for k, tag in enumerate(cleaned)]


def to_rgb(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) as a Pillow image: one or two channels in grey, of more the first three as colours."""
    pixels = image.numpy()
    if len(pixels) < 3:
        return Image.fromarray(pixels[0])
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))


def percent(share: float) -> str:
    """Whole per cent, but never a certainty that is none."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def example_caption(example: Example, names: Sequence[str]) -> Caption:
    """The label, and under a mistake's label the prediction, each with its probability."""
    if example.predicted == example.label:
        return [(names[example.label], percent(example.probability))]
    return [
        (names[example.label], percent(example.label_probability)),
        (f"→ {names[example.predicted]}", percent(example.probability)),
    ]


def target_caption(target: Tensor, names: Sequence[str]) -> Caption:
    """A target: a label () or a distribution (K,), of which two classes at most are shown, and smoothing left out."""
    if target.ndim == 0:
        return [(names[int(target)], "")]
    shares, labels = target.topk(min(2, len(target)))
    floor = float(target.min()) if len(target) > 2 else 0.0
    parts = [(int(k), float(share)) for k, share in zip(labels, shares, strict=True) if float(share) - floor > 0.02]
    if len(parts) < 2:
        return [(names[int(labels[0])], "")]
    return [(names[k], percent(share)) for k, share in parts]


def grid(
    images: Sequence[Image.Image],
    captions: Sequence[Caption],
    good: bool | Sequence[bool | None] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """Captioned images in rows.

    Args:
        images: grey or RGB, any sizes.
        captions: for each image its lines; all images get room for the longest.
        good: colour of the captions' last lines: green, red, or for None black; for all, or for each.
        columns: images in a row; None: about as many as rows.
    """
    tiles = [_tile(image) for image in images]
    font, line = typeface(11), 15
    longest = max(font.getlength(clean(text)) + font.getlength(figure) for lines in captions for text, figure in lines)
    width = max(min(_WIDEST, max(_NARROWEST, math.ceil(longest) + 10)), *(tile.width for tile in tiles))
    height = max(tile.height for tile in tiles)
    strip = line * max(len(caption) for caption in captions) + 4
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    marks = good if isinstance(good, Sequence) else [good] * len(tiles)
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + strip + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x = _GAP + i % columns * (width + _GAP)
        y = _GAP + i // columns * (height + strip + _GAP)
        sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
        last_colour = _INK if marks[i] is None else _GOOD if marks[i] else _BAD
        for row, (text, figure) in enumerate(caption):
            colour = last_colour if row == len(caption) - 1 else _INK
            top = y + height + 3 + row * line
            right = font.getlength(figure)
            draw.text((x, top), fit(text, font, width - right - 4), fill=colour, font=font)
            draw.text((x + width - right, top), figure, fill=colour, font=font)
    return sheet


def class_accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of each class's images that were classified right: (K, K) confusion -> (K,), NaN where there are none."""
    total = counts.sum(1)
    return np.divide(counts.diagonal(), total, out=np.full(len(counts), np.nan), where=total > 0)


def confusion(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The confusion matrix (K, K), rows the true classes, coloured by each row's shares.

    The colour follows the root of the share, so that single mistakes show.  Up to 50 classes are named, and where
    cells have room they hold their counts.
    """
    k = len(counts)
    cell = 40 if k <= 10 else 28 if k <= 24 else 14 if k <= 50 else max(1, 800 // k)
    font = typeface(11)
    named = k <= 50
    labels = [fit(clean(name), font, 120) for name in names] if named else []
    longest = math.ceil(max((font.getlength(label) for label in labels), default=0))
    side = longest + (14 if named else 4)
    flat = longest <= cell - 4
    left, top, body = side + 18, (24 if flat else side) + 18, k * cell
    sheet = Image.new("RGB", (left + body + 12, top + body + 12), _PAPER)

    share = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))[:, :, None]
    colours = (np.array(_PAPER) * (1 - share) + np.array(_BLUE) * share).astype(np.uint8)
    sheet.paste(Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1)), (left, top))
    draw = ImageDraw.Draw(sheet)
    if cell >= 14:
        for i in range(k + 1):
            draw.line([(left, top + i * cell), (left + body, top + i * cell)], fill=(232, 234, 237))
            draw.line([(left + i * cell, top), (left + i * cell, top + body)], fill=(232, 234, 237))
    draw.rectangle([left - 1, top - 1, left + body, top + body], outline=_GREY)
    if cell >= _NUMBERED:
        for i, j in zip(*counts.nonzero(), strict=True):
            place = (left + j * cell + cell / 2, top + i * cell + cell / 2)
            colour = _PAPER if share[i, j, 0] > 0.6 else _INK
            draw.text(place, _short(int(counts[i, j])), fill=colour, font=font, anchor="mm")
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        draw.text((left - 6, top + middle), label, fill=_INK, font=font, anchor="rm")
        if flat:
            draw.text((left + middle, top - 6), label, fill=_INK, font=font, anchor="md")
            continue
        upright = Image.new("L", (side, 15), 0)
        ImageDraw.Draw(upright).text((0, 7), label, fill=255, font=font, anchor="lm")
        upright = upright.rotate(90, expand=True)
        sheet.paste(_INK, (int(left + middle - 7), top - 6 - side), upright)
    draw.text((left + body / 2, 3), "predicted", fill=_GREY, font=font, anchor="mt")
    across = Image.new("L", (40, 15), 0)
    ImageDraw.Draw(across).text((20, 7), "true", fill=255, font=font, anchor="mm")
    sheet.paste(_GREY, (1, int(top + body / 2 - 20)), across.rotate(90, expand=True))
    return sheet


def accuracy_bars(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Accuracy of each class as bars, from the confusion matrix (K, K); of many classes the 40 worst."""
    accuracy, support = class_accuracy(counts), counts.sum(1)
    shown = np.arange(len(counts))
    if len(shown) > _MOST_BARS:
        shown = np.argsort(accuracy, kind="stable")[:_MOST_BARS]  # NaN sorts last
    font, line, length = typeface(11), 18, 260
    labels = [fit(clean(names[int(k)]), font, 140) for k in shown]
    left = math.ceil(max(font.getlength(label) for label in labels)) + 16
    sheet = Image.new("RGB", (left + length + 110, line * len(shown) + 12), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (k, label) in enumerate(zip(shown, labels, strict=True)):
        y = 6 + row * line
        draw.text((left - 6, y + line / 2), label, fill=_INK, font=font, anchor="rm")
        draw.rectangle([left, y + 3, left + length, y + line - 3], fill=(232, 234, 237))
        if support[k]:
            if accuracy[k] > 0:
                draw.rectangle([left, y + 3, left + length * accuracy[k], y + line - 3], fill=_BLUE)
            note = f"{percent(accuracy[k])} of {_short(int(support[k]))}"
        else:
            note = "no images"
        draw.text((left + length + 6, y + line / 2), note, fill=_GREY, font=font, anchor="lm")
    return sheet


def fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """`text`, cleaned, cut to `width` pixels with an ellipsis where it is longer."""
    text = clean(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _tile(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side > _LARGEST:
        size = (max(1, round(image.width * _LARGEST / side)), max(1, round(image.height * _LARGEST / side)))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(_TILE / side))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _short(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.0f}M"


@functools.lru_cache(maxsize=4)
def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # DejaVu, which knows more of the world's letters than Pillow's own font, comes with matplotlib; looking for the
    # package does not import it
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            return ImageFont.truetype(Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
        except OSError:
            continue
    return ImageFont.load_default(size)
