"""Converts arrays, tensors and Pillow images from a program to the uint8 pixels that data sets hold.

Shapes and ranges are checked, since nothing else says what such numbers mean. Imports no torch: a tensor is recognised
by its methods.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from vit.data.decode import decode
from vit.errors import VitError

_GREY_MODES = ("1", "L", "La", "LA", "I", "F")


def is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "ndim") and value.ndim != 1


def as_numpy(value: Any, where: str) -> np.ndarray:
    try:
        if hasattr(value, "detach"):  # torch's; NumPy has no bfloat16
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VitError(f"{where} cannot be read as an array: {error}") from error


def to_pixels(image: Any, what: str) -> np.ndarray:
    """Convert one image to uint8 (H, W, C). Raises `ImageError` for one that cannot be read, else `VitError`."""
    if isinstance(image, Image.Image):
        grey = image.mode in _GREY_MODES or image.mode.startswith("I;")
        pixels = np.asarray(decode(image, channels=1 if grey else 3))
    elif isinstance(image, bytes):
        pixels = np.asarray(decode(image, channels=3))
    elif hasattr(image, "__array__"):
        array = as_numpy(image, what)
        return as_uint8(channels_last(array[None], what), what)[0]
    else:
        raise VitError(f"{what} is a {type(image).__name__}: expected a path, a Pillow image, an array or a tensor")
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def channels_last(images: np.ndarray, where: str) -> np.ndarray:
    """Bring (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, H, W, C)."""
    shape = "(" + ", ".join(map(str, images.shape)) + ")"
    if images.ndim not in (3, 4):
        raise VitError(f"{where}: images of shape {shape}: expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if len(images) == 0:
        raise VitError(f"{where} is empty: expected at least one image")
    if 0 in images.shape:
        raise VitError(f"{where}: images of shape {shape} have no pixels")
    if images.ndim == 3:
        return images[:, :, :, None]
    first, last = images.shape[1], images.shape[3]
    usual = [count in (1, 3, 4) for count in (first, last)]
    if usual == [False, False]:  # of many channels there are still fewer than of rows and columns
        usual = [2 * first <= min(images.shape[2:]), 2 * last <= min(images.shape[1:3])]
    if usual[0] == usual[1]:
        raise VitError(f"{where}: it is not plain which axis of {shape} has the channels: expected (N, H, W, C)")
    return np.moveaxis(images, 1, 3) if usual[0] else images


def as_uint8(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype == np.bool_:
        return images.astype(np.uint8) * np.uint8(255)
    if images.dtype.kind not in "iuf":
        raise VitError(f"{where}: images of type {images.dtype}: expected uint8, or floating point from 0 to 1")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
        which = f", image {bad}," if len(images) > 1 else ""
        raise VitError(f"{where}{which} holds NaN or infinity: expected numbers from 0 to 1")
    if images.dtype.kind == "f":
        if low < -1e-6 or high > 1 + 1e-6:
            mend = "leave out the normalisation, which the model does itself" if low < 0 else "divide by 255"
            raise VitError(f"{where}: values from {low:.3g} to {high:.3g}: expected uint8, or 0 to 1; {mend}")
        return np.rint(np.clip(images.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise VitError(f"{where}: {images.dtype} values from {low} to {high}: expected 0 to 255")
    return images.astype(np.uint8)
