"""Draw pictures for TensorBoard with Pillow; a plotting library would take 0.3 s each in the training loop.

Notable: small images are enlarged by whole factors without smoothing, so that each pixel stays a square.  Class names
come from folders and may hold anything, so they are cleaned and cut to fit.
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

Caption = list[tuple[str, str]]  # lines: a text that is cut to fit, and a number at the right

_TILE, _MAX_TILE = 96, 128  # pixels of an image's longer side in a grid: target and maximum
_MIN_CAPTION, _MAX_CAPTION = 100, 150  # pixels of a caption; longer ones are cut
_GAP = 8
_INK, _GREY, _PAPER = (32, 33, 36), (95, 99, 104), (255, 255, 255)
_GOOD, _BAD, _BLUE = (24, 128, 56), (197, 34, 31), (25, 86, 176)
_MIN_NUMBERED_CELL = 26  # pixels of a cell with its count
_MAX_BARS = 40


def clean_text(name: str) -> str:
    """Replace unprintable characters of `name` by "?"."""
    return "".join(c if c.isprintable() else "?" for c in name) or "?"


def make_tags(names: Sequence[str]) -> list[str]:
    """Make a unique TensorBoard tag for each class: cleaned names without slashes."""
    tags = [clean_text(name).replace("/", "_") for name in names]
    return [tag if tags.count(tag) == 1 else f"{tag} ({k})" for k, tag in enumerate(tags)]


def to_rgb(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) as a Pillow image: one or two channels in grey, of more the first three as colours."""
    pixels = image.numpy()
    if len(pixels) < 3:
        return Image.fromarray(pixels[0])
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))


def format_percent(fraction: float) -> str:
    """Format a fraction in whole per cent; values near 0 and 1 become "<1%" and ">99%"."""
    if 0 < fraction < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= fraction < 1 else f"{fraction:.0%}"


def example_caption(example: Example, names: Sequence[str]) -> Caption:
    """Return the caption of an example: the label and, for a mistake, the prediction, each with its probability."""
    if example.predicted == example.label:
        return [(names[example.label], format_percent(example.probability))]
    return [
        (names[example.label], format_percent(example.label_probability)),
        (f"→ {names[example.predicted]}", format_percent(example.probability)),
    ]


def target_caption(target: Tensor, names: Sequence[str]) -> Caption:
    """Return the caption of a target, a label () or a distribution (K,): at most two classes, without smoothing."""
    if target.ndim == 0:
        return [(names[int(target)], "")]
    probabilities, labels = target.topk(min(2, len(target)))
    floor = float(target.min()) if len(target) > 2 else 0.0
    parts = [
        (int(k), float(probability))
        for k, probability in zip(labels, probabilities, strict=True)
        if float(probability) - floor > 0.02
    ]
    if len(parts) < 2:
        return [(names[int(labels[0])], "")]
    return [(names[k], format_percent(probability)) for k, probability in parts]


def draw_grid(
    images: Sequence[Image.Image],
    captions: Sequence[Caption],
    good: bool | Sequence[bool | None] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """Draw captioned images in rows.

    Args:
        images: grey or RGB, any sizes.
        captions: the lines of each image; all images get room for the longest.
        good: colour of the last caption line: green, red, or black for None; for all images or for each.
        columns: images in a row; None: about as many as rows.
    """
    tiles = [_resize_image(image) for image in images]
    font, line = load_font(11), 15
    longest = max(
        font.getlength(clean_text(text)) + font.getlength(number) for lines in captions for text, number in lines
    )
    width = max(min(_MAX_CAPTION, max(_MIN_CAPTION, math.ceil(longest) + 10)), *(tile.width for tile in tiles))
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
        for row, (text, number) in enumerate(caption):
            colour = last_colour if row == len(caption) - 1 else _INK
            top = y + height + 3 + row * line
            right = font.getlength(number)
            draw.text((x, top), fit_text(text, font, width - right - 4), fill=colour, font=font)
            draw.text((x + width - right, top), number, fill=colour, font=font)
    return sheet


def class_accuracy(counts: np.ndarray) -> np.ndarray:
    """Compute the accuracy of each class: (K, K) confusion matrix -> (K,), NaN for classes without images."""
    total = counts.sum(1)
    return np.divide(counts.diagonal(), total, out=np.full(len(counts), np.nan), where=total > 0)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw the confusion matrix (K, K), rows are the true classes, coloured by the fractions of each row.

    The colour follows the root of the fraction, so that single mistakes are visible.  Up to 50 classes are named, and
    large cells show their counts.
    """
    k = len(counts)
    cell = 40 if k <= 10 else 28 if k <= 24 else 14 if k <= 50 else max(1, 800 // k)
    font = load_font(11)
    named = k <= 50
    labels = [fit_text(clean_text(name), font, 120) for name in names] if named else []
    longest = math.ceil(max((font.getlength(label) for label in labels), default=0))
    side = longest + (14 if named else 4)
    flat = longest <= cell - 4
    left, top, body = side + 18, (24 if flat else side) + 18, k * cell
    sheet = Image.new("RGB", (left + body + 12, top + body + 12), _PAPER)

    strength = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))[:, :, None]
    colours = (np.array(_PAPER) * (1 - strength) + np.array(_BLUE) * strength).astype(np.uint8)
    sheet.paste(Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1)), (left, top))
    draw = ImageDraw.Draw(sheet)
    if cell >= 14:
        for i in range(k + 1):
            draw.line([(left, top + i * cell), (left + body, top + i * cell)], fill=(232, 234, 237))
            draw.line([(left + i * cell, top), (left + i * cell, top + body)], fill=(232, 234, 237))
    draw.rectangle([left - 1, top - 1, left + body, top + body], outline=_GREY)
    if cell >= _MIN_NUMBERED_CELL:
        for i, j in zip(*counts.nonzero(), strict=True):
            centre = (left + j * cell + cell / 2, top + i * cell + cell / 2)
            colour = _PAPER if strength[i, j, 0] > 0.6 else _INK
            draw.text(centre, _format_count(int(counts[i, j])), fill=colour, font=font, anchor="mm")
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


def draw_accuracy_bars(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw the accuracy of each class as bars, from the confusion matrix (K, K); of many classes the 40 worst."""
    accuracy, support = class_accuracy(counts), counts.sum(1)
    classes = np.arange(len(counts))
    if len(classes) > _MAX_BARS:
        classes = np.argsort(accuracy, kind="stable")[:_MAX_BARS]  # NaN sorts last
    font, line, length = load_font(11), 18, 260
    labels = [fit_text(clean_text(names[int(k)]), font, 140) for k in classes]
    left = math.ceil(max(font.getlength(label) for label in labels)) + 16
    sheet = Image.new("RGB", (left + length + 110, line * len(classes) + 12), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (k, label) in enumerate(zip(classes, labels, strict=True)):
        y = 6 + row * line
        draw.text((left - 6, y + line / 2), label, fill=_INK, font=font, anchor="rm")
        draw.rectangle([left, y + 3, left + length, y + line - 3], fill=(232, 234, 237))
        if support[k]:
            if accuracy[k] > 0:
                draw.rectangle([left, y + 3, left + length * accuracy[k], y + line - 3], fill=_BLUE)
            note = f"{format_percent(accuracy[k])} of {_format_count(int(support[k]))}"
        else:
            note = "no images"
        draw.text((left + length + 6, y + line / 2), note, fill=_GREY, font=font, anchor="lm")
    return sheet


def fit_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Clean `text`, and cut it to `width` pixels with an ellipsis."""
    text = clean_text(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _resize_image(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side > _MAX_TILE:
        size = (max(1, round(image.width * _MAX_TILE / side)), max(1, round(image.height * _MAX_TILE / side)))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(_TILE / side))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _format_count(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.0f}M"


@functools.lru_cache(maxsize=4)
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # DejaVu comes with matplotlib and has more letters than Pillow's font; find_spec does not import the package
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            return ImageFont.truetype(Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
        except OSError:
            continue
    return ImageFont.load_default(size)
