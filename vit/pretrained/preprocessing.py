"""Read the preprocessing of pretrained weights from timm's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vit.data.preprocess import Preprocessing
from vit.errors import VitError

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""timm's defaults for missing keys; its others are bicubic and a crop of 0.875 (timm.data.config)."""


def from_timm_cfg(
    cfg: Mapping[str, Any], *, image_size: Sequence[int], channels: int, source: str = "the weights"
) -> Preprocessing:
    """Read the preprocessing from a `pretrained_cfg` of timm, for images of this size (height, width) and channels.

    The size is the model's, not that of pretraining; `adapt_channels` fits the statistics to the channels.  Raises
    `VitError`, naming `source`, when the configuration is malformed or has unknown values.
    """
    try:
        statistics = {key: _check_numbers(key, cfg.get(key) or default) for key, default in _IMAGENET.items()}
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
    return adapt_channels(preprocessing, channels)


def adapt_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Adapt preprocessing to another number of channels: each gets the mean of the statistics."""
    if channels == preprocessing.channels:
        return preprocessing
    mean, std = (sum(values) / len(values) for values in (preprocessing.mean, preprocessing.std))
    return replace(preprocessing, channels=channels, mean=(mean,) * channels, std=(std,) * channels)


def _check_numbers(key: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise VitError(f"{key}: expected a list of numbers, got {value!r}")
    return tuple(value)
