"""Geometric augmentation: moves pixels, a batch at a time.

Notable:
- A whole-pixel shift and a mirror are one gather of uint8, fifty microseconds for 128 images of 28x28 on one core;
  only what needs values between pixels is sampled.
- Everything else (crop, mirror, rotate, shear, ...) becomes one matrix an image and one bilinear sampling: the image is
  blurred once, however many operations are composed.
- Matrices are 3x3, in pixels from the image's centre, x to the right and y down, and map where a pixel is wanted to
  where it is read. So the operation applied first stands leftmost in the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.data.augment_config import BORDERS as BORDERS


def mirror(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the uint8 images (B, C, H, W) whose `flip` (B,) is true, left to right."""
    # the difference wraps and the sum wraps back; on a CPU three times faster than selecting with torch.where
    return (images.flip(-1) - images).mul_(flip.to(images.dtype)[:, None, None, None]).add_(images)


def shift(
    images: Tensor, down: Tensor, right: Tensor, flip: Tensor | None, limit: int, border: str, fill: Tensor
) -> Tensor:
    """Move images by whole pixels, then mirror some.

    Args:
        images: (B, C, H, W), any type.
        down, right: int64 (B,), from -`limit` to `limit`; pixel (y, x) is read from (y + down, x + right).
        flip: bool (B,), which to mirror afterwards; None for none.
        border: what lies outside: `zero`; `mean`, which is `fill`; `reflect`, without repeating the edge.
        fill: (C,), of the images' type.
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(0), columns)
    columns = columns + right[:, None]
    if border == "reflect":
        rows = (height - 1) - (height - 1 - rows.abs()).abs()
        columns = (width - 1) - (width - 1 - columns.abs()).abs()
    else:
        padded = F.pad(images, (limit, limit, limit, limit))
        if border == "mean":
            padded.copy_(fill[:, None, None])
            padded[:, :, limit : limit + height, limit : limit + width] = images
        images = padded
        rows, columns = rows + limit, columns + limit
    position = (rows * images.shape[3]).unsqueeze(2) + columns.unsqueeze(1)
    index = position.view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(batch, channels, height, width)


def sample(images: Tensor, matrix: Tensor, border: str, fill: Tensor) -> Tensor:
    """Read float32 images (B, C, H, W) through matrices (B, 3, 3), bilinearly.

    Outside lies what `border` says, blended over one pixel at the edge; `reflect` mirrors about the pixels' outer
    edge. `fill` is (C,) float32, what `mean` fills with.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    # grid_sample counts in half image sizes
    m = matrix[:, :2].clone()
    m[:, 0] *= 2 / width
    m[:, 1] *= 2 / height
    # one broadcast sum, both coordinates: affine_grid's batched product is many times slower on a CPU
    along, down = m[:, :, :1] * x, m[:, :, 1:2] * y + m[:, :, 2:]
    grid = (along.unsqueeze(2) + down.unsqueeze(3)).permute(0, 2, 3, 1)
    if border == "reflect":
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if border == "zero":
        return F.grid_sample(images, grid, align_corners=False)
    level = fill[:, None, None]
    return F.grid_sample(images - level, grid, align_corners=False).add_(level)


def crop_matrix(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Make the matrix that reads the boxes (B, 4: left, top, width, height) of images of `size` (H, W)."""
    height, width = size
    left, top, w, h = boxes.unbind(1)
    return _matrix(
        (w / width, 0, left + (w - width) / 2),
        (0, h / height, top + (h - height) / 2),
        boxes,
    )


def shift_matrix(down: Tensor, right: Tensor) -> Tensor:
    """Make the matrix of `shift` by `down` and `right` (B,)."""
    right = right.to(torch.float32)
    return _matrix((1, 0, right), (0, 1, down.to(torch.float32)), right)


def mirror_matrix(flip: Tensor) -> Tensor:
    """Make the matrix of `mirror`."""
    sign = torch.where(flip, -1.0, 1.0)
    return _matrix((sign, 0, 0), (0, 1, 0), sign)


def affine_matrix(radians: Tensor, right: Tensor, down: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Make the matrix that enlarges by `scale`, shears along x by `shear` (its tangent), rotates by `radians`
    counter-clockwise, then moves by `right` and `down` pixels; all (B,), about the centre. The order is that of
    torchvision's RandomAffine."""
    cos, sin = radians.cos(), radians.sin()
    # the inverse, one factor after another: scale^-1 shear^-1 rotation^-1 translation^-1
    a, b = (cos + shear * -sin) / scale, (-sin - shear * cos) / scale
    c, d = sin / scale, cos / scale
    return _matrix((a, b, -(a * right + b * down)), (c, d, -(c * right + d * down)), radians)


def _matrix(first: tuple[Tensor | float, ...], second: tuple[Tensor | float, ...], like: Tensor) -> Tensor:
    matrix = torch.zeros(len(like), 3, 3, device=like.device)
    for row, values in enumerate((first, second)):
        for column, value in enumerate(values):
            if isinstance(value, Tensor) or value != 0:
                matrix[:, row, column] = value
    matrix[:, 2, 2] = 1
    return matrix
