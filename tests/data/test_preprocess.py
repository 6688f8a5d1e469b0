"""Geometry, normalisation and the plain form of preprocessing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit.data.decode import ImageError
from vit.data.preprocess import CROP_MODES, INTERPOLATIONS, Preprocessing
from vit.errors import VitError

sides = st.integers(1, 40)


@st.composite
def preprocessings(draw, most_channels=5):
    count = draw(st.integers(1, most_channels))
    values = st.floats(0.01, 1.0)
    return Preprocessing(
        image_size=(draw(sides), draw(sides)),
        channels=count,
        mean=tuple(draw(st.lists(values, min_size=count, max_size=count))),
        std=tuple(draw(st.lists(values, min_size=count, max_size=count))),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        crop_pct=draw(st.floats(0.25, 1.0)),
        crop_mode=draw(st.sampled_from(CROP_MODES)),
    )


@given(preprocessings())
def test_the_plain_form_round_trips_through_json(preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@given(preprocessings(4), sides, sides, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_image_becomes_the_model_input(preprocessing, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, preprocessing.channels), dtype=np.uint8)
    if preprocessing.channels == 2:  # neither grey nor colour: bands of their own
        small = preprocessing.resize(image)
        alone = Preprocessing(
            preprocessing.image_size,
            1,
            preprocessing.mean[:1],
            preprocessing.std[:1],
            preprocessing.interpolation,
            preprocessing.crop_pct,
            preprocessing.crop_mode,
        )
        assert np.array_equal(small[:, :, :1], alone.resize(image[:, :, :1]))
    small = preprocessing.resize(image)
    assert small.dtype == np.uint8
    assert small.shape == (*preprocessing.image_size, preprocessing.channels)
    ready = preprocessing(image)
    assert ready.dtype == np.float32
    expected = (small.astype(np.float64) / 255 - preprocessing.mean) / preprocessing.std
    assert np.abs(ready - expected.transpose(2, 0, 1)).max() < 1e-4 / min(preprocessing.std)


def test_normalise_takes_any_number_of_leading_axes():
    preprocessing = Preprocessing((4, 6), 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 6, 3), dtype=np.uint8)
    ready = preprocessing.normalise(images)
    assert ready.shape == (2, 5, 3, 4, 6)
    assert ready.flags["C_CONTIGUOUS"]
    expected = (images / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert np.abs(ready - np.moveaxis(expected, -1, -3)).max() < 1e-6
    assert np.array_equal(preprocessing.normalise(images[0, 0]), ready[0, 0])


def test_an_array_of_the_right_size_is_not_copied():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert np.shares_memory(Preprocessing((8, 8)).resize(image), image)
    assert not np.shares_memory(Preprocessing((8, 8), crop_pct=0.5).resize(image), image)


def test_center_keeps_the_middle_of_the_shorter_side():
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 255
    assert (Preprocessing((20, 20)).resize(image) == 255).all()


def test_squash_keeps_everything():
    image = np.zeros((20, 60, 3), dtype=np.uint8)
    image[:, 20:40] = 255
    small = Preprocessing((30, 30), crop_mode="squash", interpolation="nearest").resize(image)
    assert (small[:, 10:20] == 255).all()
    assert (small[:, :10] == 0).all()
    assert (small[:, 20:] == 0).all()


def test_border_fills_with_the_mean_colour():
    image = np.full((10, 40, 3), 255, dtype=np.uint8)
    small = Preprocessing((40, 40), mean=(0.2, 0.4, 0.6), std=(1, 1, 1), crop_mode="border").resize(image)
    assert (small[15:25] == 255).all()
    assert (small[:15] == [51, 102, 153]).all()
    assert (small[25:] == [51, 102, 153]).all()


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (1, 1), (2, 5_000)], ids=str)
def test_a_strip_does_not_fill_the_memory(mode, shape):
    image = np.full((*shape, 3), 200, dtype=np.uint8)
    small = Preprocessing((224, 160), mean=(200 / 255,) * 3, std=(1, 1, 1), crop_mode=mode).resize(image)
    assert small.shape == (224, 160, 3)
    assert (small == 200).all()


def test_modes_become_the_right_channels(picture):
    image = picture(16, 16)
    assert Preprocessing((8, 8), channels=1).resize(image).shape == (8, 8, 1)
    assert Preprocessing((8, 8), channels=3).resize(image.convert("L")).shape == (8, 8, 3)
    assert np.array_equal(Preprocessing((16, 16)).resize(image.convert("RGBA")), np.asarray(image))
    with pytest.raises(ImageError, match="expected"):
        Preprocessing((8, 8)).resize(np.zeros((3, 8, 8), np.uint8))


def test_sizes_before_the_crop():
    assert Preprocessing((224, 224), crop_pct=0.875).resize_target == (256, 256)
    assert Preprocessing((224, 160), crop_pct=0.9).resize_target == (248, 177)


def test_defaults_are_filled_in():
    assert Preprocessing(32, channels=2) == Preprocessing((32, 32), 2, (0.5, 0.5), (0.5, 0.5))
    assert Preprocessing((32, 32), 3, mean=(0.1,), std=(0.2,)).mean == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": [8]}, "image_size"),
        ({"image_size": [8, 8.5]}, "image_size"),
        ({"image_size": "8"}, "image_size"),
        ({"image_size": None}, "image_size"),
        ({"channels": 0}, "channels"),
        ({"channels": True}, "channels"),
        ({"channels": "3"}, "channels"),
        ({"channels": 10**12}, "channels"),
        ({"image_size": [8, 10**12]}, "image_size"),
        ({"mean": [0.5, 0.5]}, "mean: expected 3 numbers"),
        ({"mean": 0.5}, "mean"),
        ({"mean": ["a", 0, 0]}, "mean"),
        ({"std": [0.5, 0.5, 0.0]}, "above 0"),
        ({"std": [float("nan")] * 3}, "std"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"interpolation": ["bicubic"]}, "interpolation"),
        ({"interpolation": None}, "interpolation"),
        ({"crop_mode": "centre"}, "did you mean 'center'"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": 1.2}, "crop_pct"),
        ({"crop_pct": "all"}, "crop_pct"),
        ({"crop_pc": 1}, "did you mean 'crop_pct'"),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(VitError, match="preprocessing") as caught:
        Preprocessing.from_dict({"image_size": [8, 8], **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "x", 3, {}, {"channels": 3}])
def test_bad_dictionaries(value):
    with pytest.raises(VitError, match="preprocessing"):
        Preprocessing.from_dict(value)


def test_pillow_image_of_the_right_size_keeps_its_pixels(picture):
    image = picture(12, 12)
    assert np.array_equal(Preprocessing((12, 12)).resize(image), np.asarray(image))
    assert isinstance(image, Image.Image)
