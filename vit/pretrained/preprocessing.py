"""How images are prepared for somebody's weights: timm's account of it, as this project's `Preprocessing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vit.data.preprocess import Preprocessing
from vit.errors import VitError

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What timm takes where a configuration does not say, as it takes bicubic and 0.875 of the image (timm.data.config)."""


def from_timm_cfg(
    cfg: Mapping[str, Any], *, image_size: Sequence[int], channels: int, source: str = "the weights"
) -> Preprocessing:
    """The preprocessing that a `pretrained_cfg` of timm's asks for, for images of a size (height, width) and channels.

    The size is the model's, whatever the weights were trained on; statistics are fitted to the channels as
    `for_channels` does.  Raises `VitError`, naming `source`, when the account is malformed or asks for what is not
    known here.
    """
    try:
        statistics = {key: _numbers(key, cfg.get(key) or default) for key, default in _IMAGENET.items()}
        preprocessing = Preprocessing(
            image_size=(image_size[0], image_size[1]),
            channels=len(statistics["mean"]),
            **statistics,
            interpolation=cfg.get("interpolation") or "bicubic",
            crop_pct=cfg.get("crop_pct") or 0.875,
            crop_mode=cfg.get("crop_mode") or "center",
        )
    except VitError as error:
        raise VitError(f"{source}: preprocessing: {error}") from None
    return for_channels(preprocessing, channels)


def for_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """The same for images of another number of channels: each gets the mean of the statistics there are."""
    if channels == preprocessing.channels:
        return preprocessing
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, channels=channels, mean=(mean,) * channels, std=(std,) * channels)


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise VitError(f"{key}: expected a list of numbers, got {value!r}")
    return tuple(value)
