"""Augments, normalises and mixes a batch of uint8 images for a training step.

Notable:
- Whole batches, on the device the images are on; no loop over images, no NumPy, nothing that waits for the device.
- Every random number is a function of (seed, epoch, sample index) (`vit.data.random`), all drawn in one call a step. An
  image is augmented alike in any batch, at any position, in any process, after any resume. Only mixing uses a second
  image: the neighbour.
- What is off costs nothing. Mirroring and whole-pixel crops copy bytes; the rest of the geometry is composed into one
  sampling.

The order: crop, mirror, rotate/translate/scale/shear, RandAugment, colour jitter, normalise, erase, mix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vit.data import geometry, mixing, rand_augment, regions
from vit.data.augment_config import AugmentConfig as AugmentConfig
from vit.data.colour import jitter
from vit.data.random import Stream, draw, offsets
from vit.errors import VitError


class BatchAugment:
    """Augments, normalises and mixes batches; one object serves a whole run.

    Args:
        config: what to do. Call its `check` first; this does not.
        num_classes: K, for soft targets.
        mean, std: per channel, of values in [0, 1].
        seed: the run's.
        cropped: the loader cuts the random-resized crops (`vit.data.loaders.crops_in_loader`).
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        cropped: bool = False,
    ) -> None:
        self.config = config
        self.num_classes = num_classes
        self.seed = seed
        self._device: torch.device | None = None
        self._cropped = cropped
        self._mean, self._std = tuple(mean), tuple(std)

    def __call__(
        self, images: Tensor, labels: Tensor, index: Tensor, epoch: int, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: uint8 (B, C, H, W).
            labels: int64 (B,).
            index: int64 (B,), each image's index in its data set.
            epoch: from 0.
            progress: the fraction of training that is done, 0 to 1; `mix_off_epochs` is measured against it.

        Returns:
            float32 normalised images (B, C, H, W), and targets: the labels, or float32 (B, K) distributions where
            labels are smoothed or, at this point of training, mixed.
        """
        config = self.config
        if images.device != self._device:
            self._prepare(images.device)
        mixes = config.mixes and progress < 1 - config.mix_off_epochs and len(images) > 1
        numbers = draw(self.seed, epoch, index, self._offsets) if self._columns else None
        images = self._transform_geometry(images, numbers)
        images = self._transform_colours(images, numbers)
        images = normalise(images, self._mean, self._std)
        if config.erasing > 0:
            drawn = self._drawn(numbers, Stream.ERASING)
            boxes = regions.erased_boxes(drawn[:, 1:], (images.shape[2], images.shape[3]))
            boxes = boxes * (drawn[:, :1] < config.erasing)
            # after normalising, the mean colour is zero
            images = images.mul_(1 - regions.coverage(boxes, (images.shape[2], images.shape[3])))
        own_weight = None
        if mixes:
            # the pair's numbers are its first image's
            drawn = draw(self.seed, epoch, index[: len(index) // 2 * 2 : 2], self._mix_offsets)
            images, own_weight = self._mixing(images, drawn)
        if own_weight is None and config.label_smoothing == 0:
            return images, labels
        return images, mixing.soft_targets(labels, self.num_classes, config.label_smoothing, own_weight)

    def _prepare(self, device: torch.device) -> None:
        """Put all that is the same in every step on the device."""
        config, plan = self.config, []
        if config.random_resized_crop and not self._cropped:
            plan.append((Stream.CROP, regions.NUMBERS))
        if config.crop_padding:
            plan.append((Stream.SHIFT, 2))
        if config.flip > 0:
            plan.append((Stream.FLIP, 1))
        if config.moves:
            plan.append((Stream.AFFINE, 5))
        if config.rand_augment:
            plan.append((Stream.RAND_AUGMENT, rand_augment.NUMBERS * config.rand_augment))
        if config.color_jitter > 0:
            plan.append((Stream.JITTER, 3))
        if config.erasing > 0:
            plan.append((Stream.ERASING, 1 + regions.NUMBERS))
        self._columns: dict[Stream, slice] = {}
        end = 0
        for stream, count in plan:
            self._columns[stream] = slice(end, end + count)
            end += count
        if plan:
            self._offsets = torch.cat([offsets(stream, count, device) for stream, count in plan])
        self._fill = torch.tensor(self._mean, device=device).mul_(255)
        self._mix_offsets = offsets(Stream.MIXING, mixing.NUMBERS, device)
        self._rand = rand_augment.RandAugment(config.rand_augment, config.rand_magnitude, device)
        self._mixing = mixing.Mixing(config.mixup, config.cutmix, config.mix_prob, device)
        self._device = device

    def _drawn(self, numbers: Tensor | None, stream: Stream) -> Tensor:
        assert numbers is not None
        return numbers[:, self._columns[stream]]

    def _transform_geometry(self, images: Tensor, numbers: Tensor | None) -> Tensor:
        """Crop, mirror, move: uint8 in; uint8 out where bytes were only copied, else float32, 0 to 255."""
        config, size = self.config, (images.shape[2], images.shape[3])
        flip = down = right = None
        if config.flip > 0:
            flip = self._drawn(numbers, Stream.FLIP)[:, 0] < config.flip
        if pad := config.crop_padding:
            if config.border == "reflect" and pad >= min(size):
                raise VitError(f"augment.crop_padding: {pad} reflects more than an image of {size[0]}x{size[1]} has")
            moved = (self._drawn(numbers, Stream.SHIFT) * (2 * pad + 1)).long().clamp_(max=2 * pad) - pad
            down, right = moved[:, 0], moved[:, 1]
        crops = Stream.CROP in self._columns
        if not crops and not config.moves and not config.rand_augment:
            if down is not None and right is not None:
                fill = self._fill.round().to(torch.uint8)
                return geometry.shift(images, down, right, flip, pad, config.border, fill)
            return images if flip is None else geometry.mirror(images, flip)

        matrices = []
        if crops:
            drawn = self._drawn(numbers, Stream.CROP)
            boxes = regions.crop_boxes(drawn, *size, config.crop_scale, config.crop_ratio)
            matrices.append(geometry.crop_matrix(boxes, size))
        if down is not None and right is not None:
            matrices.append(geometry.shift_matrix(down, right))
        if flip is not None:
            matrices.append(geometry.mirror_matrix(flip))
        if config.moves:
            matrices.append(self._affine(self._drawn(numbers, Stream.AFFINE), size))
        if config.rand_augment:
            chosen = self._rand.choose(self._drawn(numbers, Stream.RAND_AUGMENT), images.shape[1])
            matrices.append(self._rand.matrix(*chosen, size))
        matrix = functools.reduce(torch.matmul, matrices)
        return geometry.sample(images.to(torch.float32), matrix, config.border, self._fill)

    def _affine(self, drawn: Tensor, size: tuple[int, int]) -> Tensor:
        config = self.config
        either = drawn * 2 - 1
        low, high = config.scale or (1.0, 1.0)
        return geometry.affine_matrix(
            radians=either[:, 0] * math.radians(config.rotate),
            right=either[:, 1] * (config.translate * size[1]),
            down=either[:, 2] * (config.translate * size[0]),
            scale=low + (high - low) * drawn[:, 3],
            shear=(either[:, 4] * math.radians(config.shear)).tan(),
        )

    def _transform_colours(self, images: Tensor, numbers: Tensor | None) -> Tensor:
        """Apply RandAugment's colour operations and jitter: uint8 or float32, 0 to 255, in and out."""
        config = self.config
        if config.rand_augment:
            if images.is_floating_point():
                images = images.round_().clamp_(0, 255).to(torch.uint8)
            chosen = self._rand.choose(self._drawn(numbers, Stream.RAND_AUGMENT), images.shape[1])
            images = self._rand.photometric(images, *chosen)
        if config.color_jitter > 0:
            factors = 1 + config.color_jitter * (self._drawn(numbers, Stream.JITTER) * 2 - 1)
            images = jitter(images.to(torch.float32), factors)
        return images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute `(value / 255 - mean) / std`: (B, C, H, W), uint8 or float32 of 0 to 255 -> float32 of the same shape.

    `mean` and `std` are per channel. A float32 input is overwritten.
    """
    scale, bias = _affine_of_channel(tuple(mean), tuple(std), images.device)
    # converting first and then in place is three times faster on a CPU than one mixed-type product
    return images.to(torch.float32).mul_(scale).add_(bias)


@functools.lru_cache(maxsize=32)
def _affine_of_channel(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
    bias = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return scale[:, None, None], bias[:, None, None]
