"""Mixup and CutMix between neighbours.

Notable:
- Image 2k of a batch mixes with image 2k + 1, and the two share one decision and one weight. A batch of an even size
  cut into even parts mixes as it would whole, so the number of processes changes nothing; the last image of an odd
  batch stays as it is.
- The weight is Beta(alpha, alpha) by a table of its quantiles: no rejection loop, so nothing waits for the device.

Mixup: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization". CutMix: Yun et al. 2019, "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features".
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit.data.regions import coverage, pasted_boxes

NUMBERS = 5  # draws of a pair: whether, which, how much, and the rectangle's centre
_KNOTS = 1024


class BetaQuantiles:
    """Beta(alpha, alpha) variates from uniform ones, for alpha in (0, 10]; within 1e-5 of the exact quantile.

    Near 0 the distribution function goes as x^alpha, so x is a smooth function of `v = (2 u)^(1/alpha)`, from 0 to 1/2
    for v from 0 to 1: that is the table, read linearly. The upper half is the lower half's mirror image.
    """

    def __init__(self, alpha: float, device: torch.device | str = "cpu") -> None:
        self.alpha = alpha
        # x = s^g takes the density's singularity at 0 out of the integral, for alpha < 1:
        # x^(alpha - 1) dx = g s^(g alpha - 1) ds; midpoints, in float64
        power, steps = max(1.0, 1 / alpha), 64 * _KNOTS
        edges = torch.linspace(0, 0.5 ** (1 / power), steps + 1, dtype=torch.float64)
        s = (edges[1:] + edges[:-1]) / 2
        density = s ** (power * alpha - 1) * (1 - s**power) ** (alpha - 1)
        mass = torch.cat((density.new_zeros(1), density.cumsum(0)))
        levels = torch.linspace(0, 1, _KNOTS + 1, dtype=torch.float64) ** alpha * mass[-1]
        above = torch.searchsorted(mass, levels).clamp(1, steps)
        fraction = (levels - mass[above - 1]) / (mass[above] - mass[above - 1])
        x = torch.lerp(edges[above - 1], edges[above], fraction) ** power
        self._knots = x.float().to(device)  # a GPU may have no float64

    def __call__(self, uniform: Tensor) -> Tensor:
        """Map float32 draws in [0, 1) to Beta(alpha, alpha) variates of the same shape."""
        v = torch.minimum(uniform, 1 - uniform).mul_(2).pow_(1 / self.alpha).mul_(_KNOTS)
        below = v.floor().clamp_(max=_KNOTS - 1)
        knot = below.long()
        x = torch.lerp(self._knots[knot], self._knots[knot + 1], v - below)
        return torch.where(uniform < 0.5, x, 1 - x)


class Mixing:
    """Mixes pairs: mixup with Beta(`mixup`, `mixup`), CutMix with Beta(`cutmix`, `cutmix`); 0 turns either off.

    A pair is mixed with probability `prob`; where both kinds are on, either with probability one half, as timm's
    `switch_prob`.
    """

    def __init__(self, mixup: float, cutmix: float, prob: float, device: torch.device | str = "cpu") -> None:
        self.prob = prob
        self._mixup = BetaQuantiles(mixup, device) if mixup > 0 else None
        self._cutmix = BetaQuantiles(cutmix, device) if cutmix > 0 else None

    def __call__(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Mix float images (B, C, H, W), in place, by the draws (B // 2, 5) of their pairs.

        Returns the images, and the weight of each one's own label, float32 (B,); the rest is the weight of its
        neighbour's. For CutMix that is the true fraction of pixels, after the rectangle was cut at the borders.
        """
        pairs, size = len(numbers), (images.shape[2], images.shape[3])
        exchanged, weight = self._weights(numbers, size)
        first, second = images[: 2 * pairs].unflatten(0, (pairs, 2)).unbind(1)
        # each of the two moves towards the other by the same step
        step = (second - first).mul_(weight)
        first.add_(step)
        second.sub_(step)
        own_weight = (1 - exchanged).repeat_interleave(2, output_size=2 * pairs)
        return images, torch.cat((own_weight, own_weight.new_ones(len(images) - 2 * pairs)))

    def _weights(self, numbers: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute the fraction that each pair exchanges: overall (pairs,), and per pixel, for (pairs, C, H, W)."""
        mixed = numbers[:, 0] < self.prob
        uniform = numbers[:, 2]  # serves either kind: only one of the two is used
        if self._cutmix is None:
            assert self._mixup is not None
            exchanged = (1 - self._mixup(uniform)) * mixed
            return exchanged, exchanged[:, None, None, None]
        boxes, covered = pasted_boxes(numbers[:, 3:5], (1 - self._cutmix(uniform)) * mixed, size)
        if self._mixup is None:
            return covered, coverage(boxes, size)
        pastes = numbers[:, 1] < 0.5
        exchanged = torch.where(pastes, covered, (1 - self._mixup(uniform)) * mixed)
        # mixing all of an image is pasting all of it, thinly
        whole = boxes.new_zeros(4)
        whole[2], whole[3] = size[1], size[0]
        boxes = torch.where(pastes[:, None], boxes, whole)
        return exchanged, coverage(boxes, size, torch.where(pastes, 1.0, exchanged))


def soft_targets(labels: Tensor, classes: int, smoothing: float, own_weight: Tensor | None = None) -> Tensor:
    """Make target distributions float32 (B, K) of labels int64 (B,).

    `smoothing` s gives every class s / K and the rest to the label's, as torch's cross-entropy and timm do.
    `own_weight` (B,), from `Mixing`, is the weight of the image's own label; the rest is its neighbour's.
    """
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    own = torch.full_like(targets[:, 0], 1 - smoothing) if own_weight is None else own_weight * (1 - smoothing)
    targets.scatter_add_(1, labels[:, None], own[:, None])
    if own_weight is not None:
        pairs = len(labels) // 2
        others = labels[: 2 * pairs].view(pairs, 2).flip(1).reshape(-1, 1)
        rest = ((1 - own_weight) * (1 - smoothing))[: 2 * pairs, None]
        targets[: 2 * pairs].scatter_add_(1, others, rest)
    return targets
