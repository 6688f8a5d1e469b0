"""Draws random rectangles, a batch at a time: to crop, to erase, to paste.

Notable:
- "Try ten rectangles, take the first that fits" is drawn as ten rectangles at once, so there is no loop that waits for
  the device and every sample spends the same numbers.
- The numbers come in as uniform draws; nothing here is random by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRIES = 10
NUMBERS = 2 * TRIES + 2  # draws of a random rectangle: areas, ratios, and its position


def crop_boxes(
    numbers: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Draw the rectangles of a random-resized crop (Szegedy et al. 2014), distributed as torchvision's are.

    Args:
        numbers: (B, 22) uniform draws.
        height, width: of the images, in pixels; (B,) where they differ.
        scale: least and greatest fraction of the image's area.
        ratio: least and greatest width over height; its logarithm is uniform.

    Returns:
        float32 (B, 4) of whole numbers: left, top, width, height. Where none of ten rectangles fits, the greatest
        central one that keeps to `ratio`.
    """
    if not isinstance(height, Tensor):
        height = torch.full_like(numbers[:, 0], height)
    if not isinstance(width, Tensor):
        width = torch.full_like(numbers[:, 0], width)
    fits, w, h = _first_fit(numbers, height, width, scale, ratio, inside=0)
    aspect = width / height
    central_w = torch.where(aspect > ratio[1], (height * ratio[1]).round(), width)
    central_h = torch.where(aspect < ratio[0], (width / ratio[0]).round(), height)
    w = torch.where(fits, w, central_w)
    h = torch.where(fits, h, central_h)
    left = torch.where(fits, _whole(numbers[:, -1], width - w + 1), ((width - w) / 2).floor())
    top = torch.where(fits, _whole(numbers[:, -2], height - h + 1), ((height - h) / 2).floor())
    return torch.stack((left, top, w, h), dim=1)


def erased_boxes(
    numbers: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Draw the rectangles of random erasing (Zhong et al. 2017) with timm's limits, strictly inside the image.

    Takes (B, 22) uniform draws and (H, W); returns float32 (B, 4) left, top, width, height, of no area where none of
    ten rectangles fits.
    """
    height, width = size
    fits, w, h = _first_fit(numbers, height, width, scale, ratio, inside=1)
    w, h = w * fits, h * fits
    return torch.stack((_whole(numbers[:, -1], width - w + 1), _whole(numbers[:, -2], height - h + 1), w, h), dim=1)


def pasted_boxes(numbers: Tensor, fraction: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draw the rectangles of CutMix (Yun et al. 2019): of area `fraction` (B,), centred anywhere, cut at the borders.

    Takes (B, 2) uniform draws for the centre; returns float32 (B, 4) left, top, width, height in whole pixels, and
    the fraction of the image that the rectangle really covers, (B,).
    """
    height, width = size
    side = fraction.sqrt()
    left, w = _span(numbers[:, 1], (side * width).floor(), width)
    top, h = _span(numbers[:, 0], (side * height).floor(), height)
    return torch.stack((left, top, w, h), dim=1), w * h / (height * width)


def coverage(boxes: Tensor, size: tuple[int, int], weight: Tensor | None = None) -> Tensor:
    """Draw a mask of each rectangle (B, 4): float32 (B, 1, H, W), its `weight` (B,; default 1) inside, 0 outside."""
    left, top, w, h = (boxes[:, k, None] for k in range(4))
    x = torch.arange(size[1], device=boxes.device)
    y = torch.arange(size[0], device=boxes.device)
    columns = ((x >= left) & (x < left + w)).to(torch.float32)
    rows = ((y >= top) & (y < top + h)).to(torch.float32)
    if weight is not None:
        rows = rows * weight[:, None]
    # a product of floats: several times faster on a CPU than masks and torch.where
    return (rows[:, :, None] * columns[:, None, :]).unsqueeze(1)


def _first_fit(
    numbers: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    inside: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the first try that fits, for each image: whether there is one, bool (B,), and its width and height."""
    if isinstance(height, Tensor) and isinstance(width, Tensor):
        height, width = height[:, None], width[:, None]
    area = (scale[0] + (scale[1] - scale[0]) * numbers[:, :TRIES]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    root = torch.exp(0.5 * (low + (high - low) * numbers[:, TRIES : 2 * TRIES]))
    side = area.sqrt()
    w, h = (side * root).round(), (side / root).round()
    fit = (w > 0) & (h > 0) & (w <= width - inside) & (h <= height - inside)
    first = fit.to(torch.uint8).argmax(dim=1, keepdim=True)  # argmax names the first of equals
    return fit.any(dim=1), w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)


def _whole(number: Tensor, count: Tensor | int) -> Tensor:
    """Turn a draw into a whole number of 0 to `count` - 1. The product may round up to `count`, hence the clamp."""
    value = (number * count).floor()
    return torch.minimum(value, count - 1) if isinstance(count, Tensor) else value.clamp_(max=count - 1)


def _span(number: Tensor, length: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return start and length of a span about a random centre, cut to 0 .. `limit`."""
    centre = _whole(number, limit)
    start = (centre - (length / 2).floor()).clamp_(min=0)
    stop = (centre + ((length + 1) / 2).floor()).clamp_(max=limit)
    return start, stop - start
