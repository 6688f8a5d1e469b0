"""Maps as pictures: the colours are matplotlib's, overlays lie where the patches are, nothing is exaggerated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vit.explain.colours import INFERNO
from vit.explain.render import OPACITY, colour, enlarge, overlay, panel, picture


def test_inferno_is_matplotlibs():
    matplotlib = pytest.importorskip("matplotlib")
    expected = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    assert INFERNO.dtype == np.uint8
    assert (expected == INFERNO).all()
    assert not INFERNO.flags.writeable


def test_colours_get_lighter_with_the_values():
    linear = (INFERNO / 255.0) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(linear) > -1e-3).all()
    assert linear[0] < 0.01
    assert linear[-1] > 0.9


def test_the_largest_value_is_brightest_and_zero_is_black():
    map_ = np.zeros((4, 5))
    map_[1, 2] = 1
    colours = colour(map_)
    assert colours.shape == (4, 5, 3)
    assert (colours[1, 2] == INFERNO[255]).all()
    assert (np.delete(colours.reshape(-1, 3), 7, axis=0) == INFERNO[0]).all()


def test_a_map_that_tells_nothing_apart_is_not_blown_up():
    even = np.full((14, 14), 1 / 196)
    assert (colour(even) == INFERNO[85]).all()  # a third of the way: three times the average is the brightest
    noise = even * np.random.default_rng(0).uniform(0.95, 1.05, even.shape)
    assert np.ptp(colour(noise).astype(int), axis=(0, 1)).max() < 30
    assert (colour(np.zeros((2, 2))) == INFERNO[0]).all()


@pytest.mark.parametrize(
    "wrong", [np.ones(3), np.ones((1, 2, 2)), np.ones((0, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan)]
)
def test_what_is_no_map_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a map"):
        colour(wrong)


@pytest.mark.parametrize(
    ("size", "grid"), [((32, 32), (4, 4)), ((24, 40), (3, 10)), ((30, 20), (7, 3)), ((5, 5), (5, 5))]
)
def test_each_patch_is_one_flat_block_in_its_place(size, grid):
    (height, width), (rows, columns) = size, grid
    for row in range(rows):
        for column in range(columns):
            map_ = np.zeros(grid)
            map_[row, column] = 1
            image = np.asarray(overlay(np.zeros((*size, 3), np.uint8), map_, opacity=1.0))
            assert image.shape == (*size, 3)
            y, x = np.nonzero((image == INFERNO[255]).all(axis=2))
            assert (y * rows // height == row).all()
            assert (x * columns // width == column).all()
            count = sum(i * rows // height == row for i in range(height)) * sum(
                i * columns // width == column for i in range(width)
            )
            assert len(y) == count > 0


def test_opacity_mixes_image_and_map():
    random = np.random.default_rng(0)
    pixels, map_ = random.integers(0, 256, (16, 16, 3), dtype=np.uint8), random.random((4, 4))
    bare, full = np.asarray(overlay(pixels, map_, 0.0)), np.asarray(overlay(pixels, map_, 1.0))
    assert (bare == pixels).all()
    expected = (1 - OPACITY) * pixels + OPACITY * full.astype(float)
    assert np.abs(np.asarray(overlay(pixels, map_)) - expected).max() <= 1
    with pytest.raises(ValueError, match="opacity"):
        overlay(pixels, map_, 1.5)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_image_and_tensors(mode):
    image = Image.new(mode, (20, 10))
    result = overlay(image, torch.rand(2, 4), 0.5)
    assert (result.mode, result.size) == ("RGB", (20, 10))
    assert image.mode == mode


@pytest.mark.parametrize(("channels", "grey"), [(1, True), (2, True), (3, False), (4, False), (9, False)])
def test_pictures_of_any_number_of_channels(channels, grey):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    array = np.asarray(picture(pixels))
    assert array.shape == (6, 8, 3)
    assert (array == (pixels[:, :, [0, 0, 0]] if grey else pixels[:, :, :3])).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((8, 8), (224, 224)), ((28, 14), (224, 112)), ((223, 1), (446, 2)), ((224, 9), (224, 9)), ((500, 9), (500, 9))],
)
def test_small_images_grow_by_whole_numbers(size, expected):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    large = enlarge(image)
    assert large.size == expected
    assert large.resize(size, Image.Resampling.NEAREST).tobytes() == image.tobytes()


def test_the_overlay_of_an_enlarged_image_is_the_enlarged_overlay():
    """For patches of whole pixels, that is."""
    random = np.random.default_rng(0)
    image, map_ = Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)), random.random((7, 7))
    assert overlay(enlarge(image), map_).tobytes() == enlarge(overlay(image, map_)).tobytes()


@pytest.mark.parametrize("label", ["cat", "größe", "x\ty\n\x1b[31m", "a very long name " * 20, "", "\udcff", "猫"])
def test_a_panel_has_image_overlay_and_caption(label):
    random = np.random.default_rng(0)
    pixels, map_ = random.integers(0, 256, (32, 48, 3), dtype=np.uint8), random.random((4, 6))
    sheet = panel(pixels, map_, label=label, probability=0.9312, method="relevance")
    large = enlarge(picture(pixels))
    left, right = (sheet.crop((x, 8, x + large.width, 8 + large.height)) for x in (8, 16 + large.width))
    assert left.tobytes() == large.tobytes()
    assert right.tobytes() == overlay(large, map_).tobytes()
    caption = np.asarray(sheet.convert("L"))[16 + large.height :]
    assert (caption < 128).sum() > 50
    assert (caption[:, -8:] > 250).all()  # not written over the edge
