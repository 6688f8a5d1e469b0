"""Resizing crops: against torchvision, against Pillow, and one way against the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from vit.data.crops import resize, resize_all
from vit.data.preprocess import INTERPOLATIONS

KINDS = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def pixels(height, width, channels=3, seed=0, low=64, high=190):
    """Noise over a slope: what a wrong pixel or weight shows in.

    From `low` to `high`: what a filter adds at an edge stays within 8 bits, whichever direction is resized first.
    """
    noise = np.random.default_rng(seed).integers(0, (high - low) // 2 + 1, (height, width, channels))
    slope = np.linspace(low, (high + low) / 2, width)[None, :, None] * np.ones((height, 1, channels))
    return (noise + slope).astype(np.uint8)


def packed(images):
    """What `resize_all` takes of arrays (h, w, C)."""
    sizes = torch.tensor([[image.size, *image.shape[:2]] for image in images])
    shapes = torch.cat([(sizes[:, :1].cumsum(0) - sizes[:, :1]), sizes[:, 1:]], dim=1)
    flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    return flat, shapes, tuple(sizes[:, 1:].amax(0).tolist())


def pillows(image, size, interpolation):
    """Pillow's resize, a band at a time: (H, W, C)."""
    kind = Image.Resampling[interpolation.upper()]
    bands = [Image.fromarray(image[:, :, c]).resize(size[::-1], kind) for c in range(image.shape[2])]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def close(found, wanted, share):
    """Not more than a level apart, but for a share of values (or three) that are two apart; equal for a share of 0."""
    apart = (found.int() - wanted.int()).abs()
    assert apart.max() <= (2 if share else 0)
    assert (apart > 1).sum() <= max(3, share * apart.numel())


@pytest.mark.parametrize("interpolation", KINDS)
@pytest.mark.parametrize("box", [(0, 0, 256, 341), (31, 50, 200, 188), (100, 3, 70, 90), (5, 6, 13, 300), (9, 9, 1, 1)])
def test_a_crop_is_torchvisions(box, interpolation):
    image = torch.from_numpy(pixels(256, 341, low=0, high=254))
    top, left, height, width = box
    wanted = functional.resized_crop(
        image.permute(2, 0, 1), top, left, height, width, [224, 160], KINDS[interpolation], antialias=True
    )
    part = image[top : top + height, left : left + width]
    for found in (
        resize(part, (224, 160), interpolation),
        resize_all(*packed([part.numpy()]), 3, (224, 160), interpolation)[0],
    ):
        assert found.dtype == torch.uint8
        close(found, wanted, 0 if interpolation == "nearest" else 1e-3)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    channels=st.sampled_from([1, 2, 3, 5]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),  # Pillow is not exact in nearest
)
@settings(deadline=None, max_examples=150)
def test_a_batch_is_pillows(sizes, size, channels, interpolation):
    images = [pixels(*each, channels, seed) for seed, each in enumerate(sizes)]
    found = resize_all(*packed(images), channels, size, interpolation)
    assert found.shape == (len(images), channels, *size)
    for image, each in zip(images, found, strict=True):
        wanted = torch.from_numpy(pillows(image, size, interpolation)).permute(2, 0, 1)
        close(each, wanted, 0.02)


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    channels=st.sampled_from([1, 2, 3, 5]),
    interpolation=st.sampled_from(INTERPOLATIONS),
)
@settings(deadline=None, max_examples=150)
def test_one_image_at_a_time_is_the_same(height, width, size, channels, interpolation):
    whole = torch.from_numpy(pixels(height + 3, width + 5, channels))
    part = whole[2 : 2 + height, 4 : 4 + width]
    one = resize(part, size, interpolation)
    batch = resize_all(*packed([part.numpy()]), channels, size, interpolation)[0]
    assert one.shape == batch.shape == (channels, *size)
    close(one, batch, 0 if interpolation == "nearest" else 0.02)


def test_a_batch_of_many_is_cut_up_and_put_together():
    images = [pixels(5 + k % 7, 9 + k % 3, seed=k) for k in range(150)]
    whole = resize_all(*packed(images), 3, (8, 8), "bicubic")
    for k in (0, 63, 64, 149):
        assert torch.equal(whole[k], resize_all(*packed([images[k]]), 3, (8, 8), "bicubic")[0])
