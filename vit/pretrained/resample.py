"""Resample weights to another image size, patch size or number of channels.

Three formulas, from papers or common practice:

- position embeddings are an image of D channels, one pixel for each patch, and are resized as an image;
- patch kernels are resized so that a resized patch gives the same token as before;
- for grey images the first convolution sums its channels; for other numbers it repeats them.

Everything is computed in float32 or better and returned in the input's dtype.  Imports torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.errors import VitError

Pair = tuple[int, int]
_MAX_PIXELS = 64 * 64  # pixels of a patch


def resample_positions(positions_1ND: Tensor, new: Pair, *, prefix: int, old: Pair | None = None) -> Tensor:
    """Resample position embeddings (1, prefix + rows * columns, D) from the `old` to the `new` grid (rows, columns).

    The grid is resized bicubically, antialiased when it shrinks, in float32.  The first `prefix` positions, of class
    token and registers, stay (Dosovitskiy et al. 2021, section 3.2, with the filter in common use).  By default `old`
    is square.

    Raises `VitError` when the positions are no such grid.
    """
    count = positions_1ND.shape[1] - prefix
    if old is None:
        old = square_grid(count)
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


def square_grid(count: int) -> Pair | None:
    """Return (s, s) if `count` is s * s and above 0, else None."""
    side = math.isqrt(max(count, 0))
    return (side, side) if count > 0 and side * side == count else None


def resample_patches(kernel_DCHW: Tensor, new: Pair) -> Tensor:
    """Resample patch kernels (D, C, H, W) to (D, C, *new) with the pseudo-inverse (Beyer et al. 2023, section 3.4).

    B is the matrix that resizes a patch x of the old size to the new (bicubic, antialiased).  The new kernel is
    `argmin_w E[(<x, w_old> - <B x, w>)^2] = (B^T)^+ w_old`: enlarged patches give the same tokens as before
    ("FlexiViT").

    Raises `VitError` for patches so large that B would fill the memory.
    """
    old = tuple(kernel_DCHW.shape[-2:])
    if old == tuple(new):
        return kernel_DCHW
    count = old[0] * old[1]
    if max(count, new[0] * new[1]) > _MAX_PIXELS:
        raise VitError(
            f"patches of {old[0]} x {old[1]} pixels cannot be resampled to {new[0]} x {new[1]}: too many pixels"
        )
    units = torch.eye(count, dtype=torch.float64, device=kernel_DCHW.device).reshape(count, 1, *old)
    resize = F.interpolate(units, size=tuple(new), mode="bicubic", antialias=True).flatten(1).T  # (new, old)
    inverse = torch.linalg.pinv(resize.T, rtol=1e-6)  # (new, old); smaller singular values are rounding errors
    kernel = kernel_DCHW.double().flatten(2) @ inverse.T
    return kernel.unflatten(2, tuple(new)).to(kernel_DCHW.dtype)


def resample_channels(kernel_DCHW: Tensor, channels: int) -> Tensor:
    """Resample the first convolution's kernel (D, C, H, W) to (D, `channels`, H, W).

    One channel is the sum, since a grey image has equal channels.  Otherwise the old channels are repeated in turn,
    times C / channels, so that the tokens keep their scale.
    """
    old = kernel_DCHW.shape[1]
    if channels == old:
        return kernel_DCHW
    kernel = kernel_DCHW.float()
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True).to(kernel_DCHW.dtype)
    index = torch.arange(channels, device=kernel.device) % old
    return (kernel[:, index] * (old / channels)).to(kernel_DCHW.dtype)
