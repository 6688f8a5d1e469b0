"""Colour operations: level by level against Pillow, and against torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from vit.data import colour

FACTORS = [0.1, 0.55, 1.0, 1.3, 1.9]


def pictures(channels: int, height: int = 17, width: int = 13) -> torch.Tensor:
    """Images that matter: noise, a ramp, dark, flat, two levels, almost black."""
    noise = torch.randint(0, 256, (channels, height, width), generator=torch.Generator().manual_seed(1))
    ramp = (torch.arange(height * width).view(1, height, width) * 255 // (height * width)).expand(channels, -1, -1)
    two = torch.where(noise > 200, 180, 90)
    images = [noise, ramp, noise // 4 + 10, torch.full_like(noise, 77), two, (noise > 250).long()]
    return torch.stack(images).to(torch.uint8)


def to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def agree(got: torch.Tensor, images: torch.Tensor, operation, levels: int = 0) -> None:
    for mine, image in zip(got, images, strict=True):
        theirs = from_pillow(operation(to_pillow(image)))
        assert (mine.int() - theirs.int()).abs().max() <= levels


channel_counts = pytest.mark.parametrize("channels", [1, 3])


def everywhere(images: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
    return colour.apply_curves(images, curve.expand(*images.shape[:2], 256))


@channel_counts
def test_histogram(channels: int) -> None:
    images = pictures(channels)
    counts = colour.histogram(images)
    for b in range(len(images)):
        for c in range(channels):
            assert counts[b, c].tolist() == np.bincount(images[b, c].ravel(), minlength=256).tolist()


@channel_counts
def test_invert(channels: int) -> None:
    images = pictures(channels)
    agree(everywhere(images, colour.fixed_curve("invert", 0)), images, ImageOps.invert)


@channel_counts
@pytest.mark.parametrize("threshold", [0, 26, 128, 200, 256])
def test_solarize(channels: int, threshold: int) -> None:
    images = pictures(channels)
    got = everywhere(images, colour.fixed_curve("solarize", threshold))
    agree(got, images, lambda image: ImageOps.solarize(image, threshold))


@channel_counts
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_posterize(channels: int, bits: int) -> None:
    images = pictures(channels)
    got = everywhere(images, colour.fixed_curve("posterize", bits))
    agree(got, images, lambda image: ImageOps.posterize(image, bits))


def test_posterize_to_no_bits_is_black() -> None:
    assert colour.fixed_curve("posterize", 0).max() == 0


@channel_counts
@pytest.mark.parametrize("amount", [0, 11, 110])
def test_solarize_add(channels: int, amount: int) -> None:
    ops = pytest.importorskip("timm.data.auto_augment")
    images = pictures(channels)
    agree(everywhere(images, colour.fixed_curve("solarize_add", amount)), images, lambda x: ops.solarize_add(x, amount))


@channel_counts
def test_autocontrast(channels: int) -> None:
    images = pictures(channels)
    got = colour.apply_curves(images, colour.autocontrast(colour.histogram(images)))
    # Pillow multiplies by a rounded quotient before it cuts off, and so may fall one level short
    agree(got, images, ImageOps.autocontrast, levels=1)
    assert got[2].amax() == 255


@channel_counts
def test_equalize(channels: int) -> None:
    images = pictures(channels)
    got = colour.apply_curves(images, colour.equalize(colour.histogram(images)))
    agree(got, images, ImageOps.equalize)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=900))
def test_equalize_of_anything(values: list[int]) -> None:
    image = torch.tensor(values, dtype=torch.uint8).view(1, 1, 1, -1)
    agree(colour.apply_curves(image, colour.equalize(colour.histogram(image))), image, ImageOps.equalize)


@channel_counts
@pytest.mark.parametrize("factor", FACTORS)
def test_brightness(channels: int, factor: float) -> None:
    images = pictures(channels)
    curves = colour.blend(torch.zeros(len(images)), torch.full((len(images),), factor))
    agree(everywhere(images, curves), images, lambda x: ImageEnhance.Brightness(x).enhance(factor))


@channel_counts
@pytest.mark.parametrize("factor", FACTORS)
def test_contrast(channels: int, factor: float) -> None:
    images = pictures(channels)
    curves = colour.blend(colour.mean_grey(colour.histogram(images)), torch.full((len(images),), factor))
    agree(everywhere(images, curves), images, lambda x: ImageEnhance.Contrast(x).enhance(factor), levels=1)


@pytest.mark.parametrize("factor", FACTORS)
def test_saturation(factor: float) -> None:
    images = pictures(3)
    got = colour.saturate(images, torch.full((len(images),), factor))
    agree(got, images, lambda x: ImageEnhance.Color(x).enhance(factor))


@channel_counts
@pytest.mark.parametrize("factor", FACTORS)
def test_sharpness(channels: int, factor: float) -> None:
    images = pictures(channels)
    got = colour.sharpen(images, torch.full((len(images),), factor))
    agree(got, images, lambda x: ImageEnhance.Sharpness(x).enhance(factor))


def test_sharpness_of_something_too_small_changes_nothing() -> None:
    images = pictures(3, 2, 9)
    assert torch.equal(colour.sharpen(images, torch.full((len(images),), 1.9)), images)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_jitter_is_torchvisions(name: str, factor: float) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = pictures(3).float()
    factors = torch.ones(len(images), 3)
    factors[:, ["brightness", "contrast", "saturation"].index(name)] = factor
    got = colour.jitter(images.clone(), factors)
    # torchvision's weights of grey have four digits, these the usual three
    expected = getattr(functional, f"adjust_{name}")(images / 255, factor) * 255
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0)


def test_jitter_of_grey_images() -> None:
    images = pictures(1).float()
    factors = torch.tensor([1.2, 0.7, 0.1]).expand(len(images), 3)
    bright = (images * 1.2).clamp(max=255)
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(colour.jitter(images.clone(), factors), mean + 0.7 * (bright - mean), atol=0.01, rtol=0)


def test_many_channels_have_a_grey_of_their_mean() -> None:
    images = pictures(1).expand(-1, 5, -1, -1)
    assert torch.equal(colour.mean_grey(colour.histogram(images)), colour.mean_grey(colour.histogram(images[:, :1])))
