"""Photometric augmentation: changes pixel values, a batch at a time.

Notable:
- An operation that looks at one value at a time (brightness, posterize, equalize, ...) is a curve of 256 levels. Each
  image's curve is made from its histogram, 256 numbers a channel, and one gather applies a different curve to every
  image of a batch.
- Curves follow Pillow to the level, since Pillow is what RandAugment's results were obtained with: the arithmetic of
  `ImageOps` and `ImageEnhance`, cut off to whole levels where they cut off.
- `jitter` works in floats, on every image, and drops no fractions.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 256


def histogram(images: Tensor) -> Tensor:
    """Count each level of each channel: uint8 (B, C, H, W) -> int32 (B, C, 256)."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], LEVELS, dtype=torch.int32, device=images.device)
    return counts.scatter_add_(2, flat, counts.new_ones(()).expand_as(flat))


def apply_curves(images: Tensor, curves: Tensor) -> Tensor:
    """Replace every level by its curve's: uint8 (B, C, H, W) and (B, C, 256) -> uint8 (B, C, H, W)."""
    return curves.gather(2, images.flatten(2).long()).view_as(images)


def fixed_curve(operation: str, amount: int) -> Tensor:
    """Make a curve that is the same for every image: uint8 (256,).

    `invert`: 255 - v. `solarize`: the levels from `amount` up inverted. `posterize`: the `amount` high bits kept. These
    are ImageOps'. `solarize_add`, timm's: `amount` added to the levels under 128.
    """
    v = torch.arange(LEVELS)
    if operation == "posterize":
        v = v & ~((1 << (8 - amount)) - 1)
    elif operation == "solarize_add":
        v = torch.where(v < 128, v + amount, v)
    else:
        v = torch.where(v < (amount if operation == "solarize" else 0), v, LEVELS - 1 - v)
    return _cut(v)


def autocontrast(counts: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255: histograms -> curves (B, C, 256) (ImageOps.autocontrast, no cutoff)."""
    low, high = _extent(counts)
    stretched = (_levels(counts) - low) * (LEVELS - 1) / (high - low)
    return _cut(torch.where(high > low, stretched, _levels(counts)))


def equalize(counts: Tensor) -> Tensor:
    """Level each channel's histogram: histograms -> curves (B, C, 256) (ImageOps.equalize, whole-number arithmetic and
    all)."""
    low, high = _extent(counts)
    end = counts.cumsum(2, dtype=torch.int32)
    total = end[:, :, -1:]
    step = (total - counts.gather(2, high.long())) // (LEVELS - 1)
    curve = (end - counts + step // 2) // step.clamp(min=1)
    return _cut(torch.where((high > low) & (step > 0), curve, _levels(counts)))


def blend(base: Tensor, factor: Tensor) -> Tensor:
    """Pull every level towards `base` (B,) or away from it: `base + factor * (v - base)`, as curves (B, 1, 256).

    With a base of 0 that is ImageEnhance.Brightness; with `mean_grey`, ImageEnhance.Contrast.
    """
    v = torch.arange(LEVELS, device=base.device)
    return _cut(base[:, None, None] + factor[:, None, None] * (v - base[:, None, None]))


def mean_grey(counts: Tensor) -> Tensor:
    """Compute each image's mean grey, rounded to a level: histograms -> float32 (B,).

    Pillow rounds each pixel's grey before it takes the mean; a mean that lies on the edge of two levels may thus come
    out one higher or lower here, and a contrast with it.
    """
    totals = (counts * _levels(counts)).sum(2).to(torch.float32)
    pixels = counts[0, 0].sum()
    return ((totals * _grey_weights(totals)).sum(1) / pixels + 0.5).floor()


def _levels(counts: Tensor) -> Tensor:
    return torch.arange(LEVELS, dtype=torch.int32, device=counts.device)


def _extent(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Find the lowest and highest level present in each channel: int32 (B, C, 1)."""
    present = (counts > 0).to(torch.int32)
    low = (present * (LEVELS - _levels(counts))).amax(2, keepdim=True)
    high = (present * _levels(counts)).amax(2, keepdim=True)
    return LEVELS - low, high


def _cut(values: Tensor) -> Tensor:
    return values.clamp(0, LEVELS - 1).to(torch.uint8)  # the cast drops the fraction, as Pillow's does


def saturate(images: Tensor, factor: Tensor) -> Tensor:
    """Blend RGB images uint8 (B, 3, H, W) with their own grey, factor (B,) (ImageEnhance.Color)."""
    x = images.to(torch.float32)
    # Pillow's whole-number luma, ITU-R 601-2, 16 bits after the point
    r, g, b = images.to(torch.int32).unbind(1)
    grey = ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).to(torch.float32).unsqueeze(1)
    return _cut(grey + factor[:, None, None, None] * (x - grey))


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Blend images uint8 (B, C, H, W) with a smoothed copy, factor (B,) (ImageEnhance.Sharpness).

    The smoothing is Pillow's SMOOTH: 3x3 ones with 5 in the middle, over 13; the outermost pixels are kept.
    """
    if min(images.shape[2:]) < 3:
        return images
    x = images.to(torch.float32)
    smooth = x.clone()
    inner = x[:, :, 1:-1, 1:-1]
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    # sums of whole numbers over 13 are never half-way between two levels
    smooth[:, :, 1:-1, 1:-1] = (total / 13).round()
    return _cut(smooth + factor[:, None, None, None] * (x - smooth))


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and, in colour, saturation.

    Args:
        images: float32 (B, C, H, W), 0 to 255.
        factors: (B, 3), one for each in that order; 1 changes nothing. torchvision's ColorJitter applies the same
            three in a random order.
    """
    bright, strong, vivid = (factors[:, k, None, None, None] for k in range(3))
    x = (images * bright).clamp_(0, LEVELS - 1)
    mean = x.mean(dim=(2, 3), keepdim=True)
    mean = (mean * _grey_weights(mean.flatten(1))[:, None, None]).sum(1, keepdim=True)
    x = x.sub_(mean).mul_(strong).add_(mean).clamp_(0, LEVELS - 1)
    if images.shape[1] != 3:
        return x
    # a sum over a strided dimension is slow on a CPU
    grey = x[:, :1] * 0.299 + x[:, 1:2] * 0.587 + x[:, 2:] * 0.114
    return x.sub_(grey).mul_(vivid).add_(grey).clamp_(0, LEVELS - 1)


def _grey_weights(values: Tensor) -> Tensor:
    """Return each channel's weight in grey, float32 (C,): luma for three channels, the mean for any other count."""
    channels = values.shape[1]
    weights = torch.full((channels,), 1 / channels, device=values.device)
    if channels == 3:
        weights[0], weights[1], weights[2] = 0.299, 0.587, 0.114
    return weights
