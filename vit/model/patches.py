"""From an image to tokens: cut it into patches and project each one (Dosovitskiy et al. 2021, equation 1).

Notable: training on a random part of the patches (`drop_patches`) is the first use of the lecture's remark that many
tasks do not need the whole input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vit.errors import VitError
from vit.model.norms import MakeNorm


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Read a size given as one number or as (height, width).  Raises `VitError` naming `name`."""
    numbers = (value, value) if isinstance(value, int) else value
    if not isinstance(numbers, Sequence) or len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
        raise VitError(f"{name}: expected one positive whole number, or [height, width], not {value!r}")
    return numbers[0], numbers[1]


class PatchEmbed(nn.Module):
    """Images (B, C, height, width) -> patch tokens (B, P, D), row by row.

    A convolution whose stride is its kernel is exactly "cut into patches, flatten, multiply by one matrix".  Pixels at
    the right and at the bottom that fill no whole patch are left out.  `norm` is one more, of each patch's token.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_channels: int,
        width: int,
        bias: bool = True,
        norm: MakeNorm | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = norm(width) if norm else nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        expected = (self.proj.in_channels, *self.image_size)
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != expected:
            raise VitError(
                f"the model takes images of (batch, channels, height, width) = (B, {', '.join(map(str, expected))}), "
                f"not {tuple(images_BCHW.shape)}"
            )
        return self.norm(self.proj(images_BCHW).flatten(2).transpose(1, 2))


def drop_patches(tokens_BPD: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Keep a random subset of each image's patches (Liu et al. 2022, "PatchDropout").

    Returns the kept tokens (B, K, D), with K = max(1, round(P (1 - rate))), in their original order, and their
    indices (B, K), int64.  The draw is torch's generator on the tokens' device.
    """
    B, P, D = tokens_BPD.shape
    keep = max(1, round(P * (1 - rate)))
    indices_BK = torch.rand(B, P, device=tokens_BPD.device).topk(keep, dim=1).indices.sort(dim=1).values
    return tokens_BPD.gather(1, indices_BK[:, :, None].expand(-1, -1, D)), indices_BK
