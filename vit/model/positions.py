"""Where a patch is: attention itself does not know, since a weighted mean does not depend on the order of its terms.

Three ways to tell it, and a fourth, none, to see what is lost:

- learned: one free vector a position, added to the tokens (Dosovitskiy et al. 2021);
- 2-D sine-cosine: fixed waves of many lengths, half the width for rows and half for columns, added to the tokens
  (Vaswani et al. 2017, section 3.5; in two dimensions, Chen et al. 2021, "An Empirical Study of Training
  Self-Supervised Vision Transformers");
- 2-D rotary: queries and keys are turned by an angle that grows with the position, so that their product depends on
  the distance alone (Su et al. 2021, "RoFormer"; axial in two dimensions, Heo et al. 2024, "Rotary Position
  Embedding for Vision Transformer"); in grid steps, or in fractions of the image, so that it spans the same
  angles at any resolution (Siméoni et al. 2025, "DINOv3").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vit.errors import VitError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of each token's angles, both (N, d) or (B, 1, N, d)."""


def sincos_2d(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed embeddings of the positions of a grid of (rows, columns): (rows * columns, width), row by row.

    The first half of the width speaks of the column, the second of the row; each half is the sines, then the
    cosines, of `position / temperature^(i / (width/4))` for i = 0 .. width/4 - 1.

    Raises `VitError` when the width is not divisible by 4.
    """
    if width % 4:
        raise VitError(f"model.width: sine-cosine positions need a width divisible by 4, not {width}")
    frequencies = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def rotary_2d(
    grid: tuple[int, int], head_width: int, prefix: int, temperature: float = 100.0, box: bool = False
) -> Rotary:
    """Cosines and sines, each (prefix + rows * columns, head_width), for `rotate`.

    The first half of each head's width turns with the column and the second with the row, in pairs of neighbouring
    channels; pair i turns by `position * temperature^(-i / (head_width/4))` radians.  Prefix tokens (class token,
    registers) have no position, so they do not turn: angle 0.

    Positions are rows and columns from 0; with `box` they are 2π times the position of a patch's middle in a box from
    -1 to 1, so that grids of any size and shape span the same angles (Siméoni et al. 2025, section 3.2).

    The temperature is 100, as Heo et al. found for grids of tens of patches, not the 10,000 of long texts.
    Raises `VitError` when the head's width is not divisible by 4.
    """
    if head_width % 4:
        raise VitError(f"model.width: rotary positions need a width per head divisible by 4, not {head_width}")
    frequencies = temperature ** -(torch.arange(head_width // 4, dtype=torch.float64) / (head_width // 4))
    steps = [torch.arange(n, dtype=torch.float64) for n in grid]
    if box:
        steps = [2 * math.pi * ((2 * step + 1) / len(step) - 1) for step in steps]
    rows, columns = torch.meshgrid(*steps, indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * frequencies for p in (columns, rows)], dim=1)
    angles = torch.cat([torch.zeros(prefix, head_width // 2, dtype=torch.float64), angles])
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BHNd: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of channels (a, b) of queries or keys by its angle: (a cos - b sin, b cos + a sin).

    (B, H, N, d) -> (B, H, N, d).
    """
    cos, sin = rotary
    a, b = x_BHNd.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return x_BHNd * cos.to(x_BHNd.dtype) + turned * sin.to(x_BHNd.dtype)
