"""Resizes crops of many sizes to one size: resampled from uint8, antialiased where they shrink.

Notable:
- On a CPU one image after another by torch's kernel for uint8, a third of a millisecond at 224. Elsewhere a whole batch
  at once, as two products with matrices of weights, which is what such hardware is fast at; only the bytes of the crops
  themselves go there.
- The weights are Pillow's (`Resample.c`): the filter stretched by the factor that the image shrinks by, sampled at the
  centres of pixels, cut at the edges of the crop and made to sum to 1; first along the rows, rounded to 8 bits, then
  down the columns. So a crop is what torchvision's `resized_crop` makes of it: on a CPU the same, elsewhere to one
  level of 255; two in one value of thousands on pure noise, which is as far as torch and Pillow are from each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # in pixels of the coarser of the two images
_AT_ONCE = 64  # images: what is between the products takes a few MB an image


def resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize one image on the CPU, uint8 (h, w, C) -> uint8 (C, H, W); the input may be a part of a larger one."""
    height, width, channels = pixels.shape
    if interpolation == "nearest":
        rows, columns = _nearest(torch.tensor(height), size[0]), _nearest(torch.tensor(width), size[1])
        return pixels[rows[:, None], columns].permute(2, 0, 1)
    if interpolation in ("bilinear", "bicubic"):
        if channels == 3:
            return F.interpolate(pixels.permute(2, 0, 1)[None], size, mode=interpolation, antialias=True)[0]
        # of another number torch's kernel is slow, and of five wrong (2.14)
        bands = pixels.permute(2, 0, 1).contiguous()[:, None]
        return torch.cat([F.interpolate(band[None], size, mode=interpolation, antialias=True)[0] for band in bands])
    shape = torch.tensor([[0, height, width]])
    return resize_all(pixels.reshape(-1), shape, (height, width), channels, size, interpolation)[0]


def resize_all(
    flat: Tensor, shapes: Tensor, largest: tuple[int, int], channels: int, size: tuple[int, int], interpolation: str
) -> Tensor:
    """Resize a batch of images on their device.

    Args:
        flat: uint8, the images' bytes, each (h, w, C) and contiguous, one after another.
        shapes: int64 (B, 3) on the same device: where each begins, its h, its w.
        largest: the greatest h and the greatest w, known on the host, so that nothing waits for the device.
        channels: C.
        size: (H, W).
        interpolation: one of `vit.data.preprocess.INTERPOLATIONS`.

    Returns:
        uint8 (B, C, H, W).
    """
    parts = [_resize_some(flat, part, largest, channels, size, interpolation) for part in shapes.split(_AT_ONCE)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _resize_some(
    flat: Tensor, shapes: Tensor, largest: tuple[int, int], channels: int, size: tuple[int, int], interpolation: str
) -> Tensor:
    start, height, width = shapes.unbind(1)
    down = torch.arange(largest[0], device=flat.device)
    bytes_ = torch.arange(largest[1] * channels, device=flat.device)
    position = start[:, None, None] + down[:, None] * (width * channels)[:, None, None] + bytes_
    # beyond an image's own height and width lies something else, which the weights leave out
    pixels = flat[position.clamp_(max=len(flat) - 1)].view(len(shapes), *largest, channels).to(torch.float32)
    along = _weights(width, size[1], largest[1], interpolation)
    upright = _weights(height, size[0], largest[0], interpolation)
    rows = _round_half_up(pixels.permute(0, 3, 1, 2) @ along.transpose(1, 2).unsqueeze(1))
    return _round_half_up(upright.unsqueeze(1) @ rows).to(torch.uint8)


def _round_half_up(values: Tensor) -> Tensor:
    """Round to 0..255 in place, halves up, as Pillow and torch do."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def _weights(length: Tensor, wanted: int, largest: int, interpolation: str) -> Tensor:
    """Compute the weight of each of `length` (B,) input pixels in each of `wanted` outputs: (B, wanted, largest)."""
    pixel = torch.arange(largest, device=length.device)
    if interpolation == "nearest":
        return (_nearest(length, wanted)[..., None] == pixel).to(torch.float32)
    length = length.to(torch.float32)[:, None, None]
    scale = length / wanted
    centre = (torch.arange(wanted, device=length.device)[:, None] + 0.5) * scale
    stretch = scale.clamp(min=1)
    reach = _SUPPORT[interpolation] * stretch
    first = (centre - reach + 0.5).floor().clamp_(min=0)
    last = torch.minimum((centre + reach + 0.5).floor(), length)
    weights = _filter((pixel + 0.5 - centre) / stretch, interpolation)
    weights = weights * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(2, keepdim=True)


def _nearest(length: Tensor, wanted: int) -> Tensor:
    """Find the input pixel, of `length` (...), that holds the centre of each output: int64 (..., wanted)."""
    # whole numbers: a centre may lie on an edge
    return (2 * torch.arange(wanted, device=length.device) + 1) * length[..., None] // (2 * wanted)


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """Evaluate the filter at `x`, in pixels from its centre; values beyond its support are never used."""
    if interpolation == "bilinear":
        return (1 - x.abs()).clamp_(min=0)
    if interpolation == "lanczos":
        return torch.sinc(x) * torch.sinc(x / 3)
    # Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", with a = -1/2
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
