"""Weights of one image size, patch size or channel count, turned into those of another.

Three formulas, each of the layer's own paper or of what became the custom:

- positions are an image of D channels, one pixel a patch, and are resized like one;
- patch kernels are resized so that a resized patch gives the token that the patch gave before;
- the first convolution takes grey images through the sum of its channels, and others through repeated ones.

Everything is computed in float32 or better and returned in the dtype it came in.  Imports torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.errors import VitError

Pair = tuple[int, int]
_LARGEST = 64 * 64  # pixels of a patch


def resample_positions(positions_1ND: Tensor, new: Pair, *, prefix: int, old: Pair | None = None) -> Tensor:
    """Position embeddings (1, prefix + rows * columns, D) of an `old` grid -> those of a `new` one (rows, columns).

    The grid is resized bicubically, antialiased when it shrinks, in float32; the first `prefix` positions, of class
    token and registers, have no place in the image and stay (Dosovitskiy et al. 2021, section 3.2, with the filter
    that the field has settled on).  `old` is taken for square where it is not given.

    Raises `VitError` when the positions are no such grid.
    """
    count = positions_1ND.shape[1] - prefix
    if old is None:
        old = square(count)
    if old is None or count != old[0] * old[1]:
        shape = f"{old[0]} x {old[1]}" if old is not None else "a square"
        raise VitError(
            f"pos_embed has {positions_1ND.shape[1]} positions: not {shape} of patches after {prefix} tokens"
        )
    if old == tuple(new):
        return positions_1ND
    first, grid = positions_1ND[:, :prefix], positions_1ND[:, prefix:]
    grid_1Dhw = grid.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=tuple(new), mode="bicubic", antialias=True)
    return torch.cat([first, grid_1Dhw.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


def square(count: int) -> Pair | None:
    """(s, s) where `count` is s * s and above 0."""
    side = math.isqrt(max(count, 0))
    return (side, side) if count > 0 and side * side == count else None


def resample_patches(kernel_DCHW: Tensor, new: Pair) -> Tensor:
    """Patch kernels (D, C, H, W) -> (D, C, *new), by the pseudo-inverse (Beyer et al. 2023, "FlexiViT", section 3.4).

    With B the matrix that resizes a patch x of the old size to the new (bicubic, antialiased), the new kernel is
    `argmin_w E[(<x, w_old> - <B x, w>)^2] = (B^T)^+ w_old`: enlarged patches give the tokens that they gave before.

    Raises `VitError` for patches so large that B would fill the memory.
    """
    old = tuple(kernel_DCHW.shape[-2:])
    if old == tuple(new):
        return kernel_DCHW
    count = old[0] * old[1]
    if max(count, new[0] * new[1]) > _LARGEST:
        raise VitError(
            f"patches of {old[0]} x {old[1]} pixels cannot be resampled to {new[0]} x {new[1]}: too many pixels"
        )
    units = torch.eye(count, dtype=torch.float64, device=kernel_DCHW.device).reshape(count, 1, *old)
    resize = F.interpolate(units, size=tuple(new), mode="bicubic", antialias=True).flatten(1).T  # (new, old)
    inverse = torch.linalg.pinv(resize.T, rtol=1e-6)  # (new, old); beyond float32's precision nothing is a direction
    kernel = kernel_DCHW.double().flatten(2) @ inverse.T
    return kernel.unflatten(2, tuple(new)).to(kernel_DCHW.dtype)


def resample_channels(kernel_DCHW: Tensor, channels: int) -> Tensor:
    """The first convolution's kernel (D, C, H, W) -> (D, `channels`, H, W).

    One channel: the sum, since a grey image is one whose channels are equal.  Otherwise the old ones in turn, times
    C / channels, so that the tokens keep their size.
    """
    old = kernel_DCHW.shape[1]
    if channels == old:
        return kernel_DCHW
    kernel = kernel_DCHW.float()
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True).to(kernel_DCHW.dtype)
    turns = torch.arange(channels, device=kernel.device) % old
    return (kernel[:, turns] * (old / channels)).to(kernel_DCHW.dtype)
