"""Pictures of attention for TensorBoard's image tab, which need nothing installed: maps over images, and every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vit.explain.render import colour, overlay
from vit.training import pictures

_TILE = 96  # pixels of an image's longer side
_HEAD = 36  # and of a head's map, about
_GAP, _LEFT, _TOP, _LINE = 3, 56, 18, 16
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


def overlays(
    images: Sequence[Image.Image],
    maps: np.ndarray,
    labels: Sequence[int],
    predictions: Sequence[dict[str, Any]],
    names: Sequence[str],
) -> Image.Image:
    """Each image beside itself under its map, with what it is and what it was taken for, green where that is right.

    Args:
        images: as the model saw them.
        maps: (n, rows, columns).
        labels, predictions: of each image; predictions as in a record of steps.
        names: of the classes.
    """
    tiles: list[Image.Image] = []
    captions: list[pictures.Caption] = []
    good: list[bool | None] = []
    for image, each, label, said in zip(images, maps, labels, predictions, strict=True):
        tile = _fitted(image)
        tiles += [tile, overlay(tile, each)]
        captions.append([(names[label], "")])
        captions.append([(f"→ {names[said['predicted']]}", pictures.format_percent(said["probability"]))])
        good += [None, said["predicted"] == label]
    return pictures.draw_grid(tiles, captions, good, columns=2 * min(4, len(images)))


def heads(image: Image.Image, rows: np.ndarray, grid: tuple[int, int], title: str) -> Image.Image:
    """Where every head of every layer looks, for one image: (L, H, P) as rows of layers and columns of heads.

    Counted from 1, as in the Attention tab.
    """
    layers, count = rows.shape[:2]
    factor = max(1, round(_HEAD / max(grid)))
    width, height = grid[1] * factor, grid[0] * factor
    tile = _fitted(image)
    left = _LEFT + tile.width + _GAP
    size = (left + count * (width + _GAP), max(layers * (height + _GAP), tile.height) + _TOP + _LINE)
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(tile, (_GAP, _TOP + _LINE))
    draw, font = ImageDraw.Draw(sheet), pictures.load_font(11)
    draw.text((_GAP, 3), pictures.fit_text(title, font, size[0] - 2 * _GAP), fill=_INK, font=font)
    for head in range(count):
        place = (left + head * (width + _GAP) + width / 2, _TOP + _LINE / 2)
        draw.text(place, str(head + 1), fill=_INK, font=font, anchor="mm")
    for layer in range(layers):
        y = _TOP + _LINE + layer * (height + _GAP)
        draw.text((left - 2 * _GAP, y + height / 2), f"layer {layer + 1}", fill=_INK, font=font, anchor="rm")
        for head in range(count):
            cell = Image.fromarray(colour(rows[layer, head].reshape(grid)))
            sheet.paste(cell.resize((width, height), Image.Resampling.NEAREST), (left + head * (width + _GAP), y))
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """In RGB, about as large as a tile; a small image's pixels stay squares."""
    image, side = image.convert("RGB"), max(image.size)
    if side <= _TILE:
        factor = max(1, round(_TILE / side))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * _TILE / side)), max(1, round(image.height * _TILE / side)))
    return image.resize(size, Image.Resampling.LANCZOS)
