"""What augmentation can be asked for: every key of `augment.*`.

Apart from `vit.data.augment`, which does it, so that a configuration is checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vit import options
from vit.errors import VitError
from vit.options import option

BORDERS = ("zero", "mean", "reflect")


@dataclass(frozen=True)
class AugmentConfig:
    """What `conf/augment/*.yaml` can say. The default changes nothing."""

    name: str = option("none", "of the file in conf/augment")
    crop_padding: int = option(0, "crop at random after adding this many pixels on every side", ge=0, le=512)
    random_resized_crop: bool = option(False, "crop a random rectangle and resize it to the whole")
    crop_scale: tuple[float, float] = option((0.08, 1.0), "least and greatest share of the image in it", gt=0, le=1)
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "least and greatest width over height", gt=0, le=100)
    flip: float = option(0.0, "probability of mirroring left to right", ge=0, le=1)
    rotate: float = option(0.0, "up to this many degrees either way", ge=0, le=180)
    translate: float = option(0.0, "up to this share of width and height either way", ge=0, le=1)
    scale: tuple[float, float] | None = option(
        None, "least and greatest enlargement about the centre; null: none", gt=0, le=10
    )
    shear: float = option(0.0, "along x, up to this many degrees either way", ge=0, le=80)
    border: str = option("zero", "what lies outside: black, the mean colour, the mirrored image", choices=BORDERS)
    rand_augment: int = option(0, "how many of RandAugment's operations; 0: none", ge=0, le=16)
    rand_magnitude: float = option(9.0, "their strength", ge=0, le=10)
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation change by factors of 1 - this to 1 + this", ge=0, le=1
    )
    erasing: float = option(0.0, "probability of turning a rectangle into the mean colour", ge=0, le=1)
    mixup: float = option(0.0, "alpha of its Beta distribution; 0: none", ge=0, le=10)
    cutmix: float = option(0.0, "alpha of its Beta distribution; 0: none", ge=0, le=10)
    mix_prob: float = option(1.0, "probability that a pair is mixed at all", ge=0, le=1)
    mix_off_epochs: float = option(0.0, "last share of training without mixing", ge=0, le=1)
    label_smoothing: float = option(0.0, "share of each target spread evenly over all classes", ge=0, lt=1)

    def __post_init__(self) -> None:
        for key in ("crop_scale", "crop_ratio", "scale"):
            value = getattr(self, key)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, key, tuple(value))  # a list in the file

    @property
    def mixes(self) -> bool:
        """Say whether images are ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0

    @property
    def moves(self) -> bool:
        """Say whether images are rotated, translated, scaled or sheared, RandAugment aside."""
        return bool(self.rotate or self.translate or self.shear) or self.scale is not None

    def check(self, num_classes: int) -> None:
        """Raise `VitError`, naming the key, on the first value that makes no sense for `num_classes` classes."""
        options.check_fields(self, "augment.")
        for key in ("crop_scale", "crop_ratio", "scale"):
            span = getattr(self, key)
            if span is not None and span[0] > span[1]:
                raise VitError(f"augment.{key}: {list(span)} is not [least, greatest]: swap the two")
        if self.random_resized_crop and self.crop_padding:
            raise VitError(
                "augment.crop_padding and augment.random_resized_crop both crop: "
                "set augment.crop_padding=0 or augment.random_resized_crop=false"
            )
        if self.mixes and num_classes < 2:
            key = "mixup" if self.mixup > 0 else "cutmix"
            raise VitError(f"augment.{key}: mixing needs at least 2 classes, the data has {num_classes}; set it to 0")
