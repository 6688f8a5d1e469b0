"""RandAugment (Cubuk et al. 2019), a batch at a time.

Notable:
- The operations and their strengths are timm's "increasing" set (`rand-mM-nN-inc1`, without noise in the magnitude):
  a greater magnitude is always a greater change. As there, a chosen operation is applied with probability one half.
- The geometric operations of all rounds become one matrix, sampled once and before the others; the photometric ones
  then follow round by round.
- On a GPU every operation is computed for the whole batch and selected, so nothing waits for the device to say how many
  images chose what; on a CPU, where knowing is free, only for the images that chose it. The results are equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vit.data import colour

NUMBERS = 2  # draws of a round: which operation (or none), and in which direction
OPERATIONS = (
    "invert",
    "posterize",
    "solarize",
    "solarize_add",  # up to here one curve of 256 levels for all images
    "brightness",
    "contrast",
    "autocontrast",
    "equalize",  # up to here a curve for each image
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "colour",  # last, so that images without colour have a shorter list and not another one
)
_Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
_FIXED = OPERATIONS.index("solarize_add") + 1
_CURVES = OPERATIONS.index("equalize") + 1


class RandAugment:
    """`rounds` operations of `magnitude` (0 to 10) for each image.

    `select` says to compute every operation for every image and select, rather than look who chose it.

    A decision is two int64 or bool tensors (B, rounds): which operation (an index into `OPERATIONS`, or -1), and
    whether its direction is the negative one.
    """

    def __init__(self, rounds: int, magnitude: float, device: torch.device | str = "cpu") -> None:
        self.rounds = rounds
        level = magnitude / 10
        # timm's LEVEL_TO_ARG
        self.radians = level * 30 * torch.pi / 180
        self.shear = level * 0.3
        self.translate = level * 0.45
        self.enhance = level * 0.9
        amounts = {
            "posterize": max(1, 4 - int(level * 4)),  # timm's 0 bits at the greatest magnitude are a black image
            "solarize": 256 - min(256, int(level * 256)),
            "solarize_add": min(128, int(level * 110)),
        }
        curves = [colour.fixed_curve(name, amounts.get(name, 0)) for name in OPERATIONS[:_FIXED]]
        self._fixed = torch.stack(curves).to(device)
        self.select = torch.device(device).type != "cpu"

    def choose(self, numbers: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Decide by uniform draws (B, 2 * rounds) for images of `channels` channels."""
        count = len(OPERATIONS) if channels == 3 else len(OPERATIONS) - 1
        which = (numbers[:, : self.rounds] * (2 * count)).floor().long().clamp_(max=2 * count - 1)
        return torch.where(which < count, which, -1), numbers[:, self.rounds :] < 0.5

    def matrix(self, chosen: Tensor, negative: Tensor, size: tuple[int, int]) -> Tensor:
        """Compose the geometric operations for images of `size` (H, W): (B, 3, 3), as `geometry` has them.

        As in timm, shears lean from the upper left corner and translations are shares of the width and the height.
        """
        height, width = size
        sign = torch.where(negative, -1.0, 1.0)

        def amount(operation: str, value: float) -> Tensor:
            return sign * value * (chosen == OPERATIONS.index(operation))

        angle = amount("rotate", self.radians)
        shear_x, shear_y = amount("shear_x", self.shear), amount("shear_y", self.shear)
        # at most one of these differs from nothing in a round, so their sum is that one
        rows = torch.zeros(*chosen.shape, 3, 3, device=chosen.device)
        rows[..., 0, 0] = rows[..., 1, 1] = angle.cos()
        rows[..., 0, 1] = shear_x - angle.sin()
        rows[..., 1, 0] = shear_y + angle.sin()
        rows[..., 0, 2] = amount("translate_x", self.translate * width) + shear_x * (height / 2)
        rows[..., 1, 2] = amount("translate_y", self.translate * height) + shear_y * (width / 2)
        rows[..., 2, 2] = 1
        composed = rows[:, 0]
        for k in range(1, self.rounds):
            composed = composed @ rows[:, k]
        return composed

    def photometric(self, images: Tensor, chosen: Tensor, negative: Tensor) -> Tensor:
        """Apply the other operations to uint8 images (B, C, H, W), round by round; the images may be overwritten."""
        for k in range(self.rounds):
            which = chosen[:, k]
            factor = torch.where(negative[:, k], max(0.1, 1 - self.enhance), 1 + self.enhance)
            images = self._apply((which >= 0) & (which < _CURVES), self._curve, images, which, factor)
            images = self._apply(which == OPERATIONS.index("sharpness"), _sharpen, images, which, factor)
            if images.shape[1] == 3:
                images = self._apply(which == OPERATIONS.index("colour"), _saturate, images, which, factor)
        return images

    def _apply(self, mask: Tensor, operation: _Operation, images: Tensor, which: Tensor, factor: Tensor) -> Tensor:
        """`operation` on the images that `mask` (B,) names; `images` may be overwritten."""
        if self.select:
            return torch.where(mask[:, None, None, None], operation(images, which, factor), images)
        rows = mask.nonzero().squeeze(1)
        if len(rows) == 0:
            return images
        return images.index_copy_(0, rows, operation(images[rows], which[rows], factor[rows]))

    def _curve(self, images: Tensor, which: Tensor, factor: Tensor) -> Tensor:
        counts = colour.histogram(images)
        count = len(images)
        base = torch.where(which == OPERATIONS.index("contrast"), colour.mean_grey(counts), 0.0)
        curves = torch.cat(
            [
                self._fixed[which.clamp(0, _FIXED - 1)].unsqueeze(1).expand_as(counts),
                colour.blend(base, factor).expand_as(counts),
                colour.autocontrast(counts),
                colour.equalize(counts),
            ]
        )
        # which of the four: brightness and contrast are one kind
        kind = (which - _FIXED).clamp(min=-1, max=_CURVES - _FIXED - 1)
        kind = (kind + 1 - (kind > 0).long()).clamp_(min=0)
        return colour.apply_curves(images, curves[kind * count + torch.arange(count, device=images.device)])


def _sharpen(images: Tensor, which: Tensor, factor: Tensor) -> Tensor:
    return colour.sharpen(images, factor)


def _saturate(images: Tensor, which: Tensor, factor: Tensor) -> Tensor:
    return colour.saturate(images, factor)
