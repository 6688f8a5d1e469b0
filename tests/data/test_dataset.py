"""Splits: what an image is, where it is, and when it is copied."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.decode import ImageError
from vit.data.preprocess import Preprocessing


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 6, 8, 3), dtype=np.uint8)


def array_split(pixels, channels=3):
    return Split(np.arange(len(pixels)), ArrayImages(pixels, "some"), channels, native_size=pixels.shape[1:3])


def test_an_array_is_used_as_it_is(pixels):
    split = array_split(pixels)
    whole = split.array(Preprocessing((6, 8)))
    assert np.shares_memory(whole, pixels)
    assert np.array_equal(whole, pixels)
    part = split.subset(range(5, 11)).array(Preprocessing((6, 8)))
    assert np.shares_memory(part, pixels)
    assert np.array_equal(part, pixels[5:11])
    mixed = split.subset([3, 1, 7])
    assert np.array_equal(mixed.array(Preprocessing((6, 8))), pixels[[3, 1, 7]])
    assert mixed.subset([2, 0]).labels.tolist() == [7, 3]
    assert len(split.subset([])) == 0
    assert split.subset([]).array(Preprocessing((6, 8))).shape == (0, 6, 8, 3)
    assert split.subset([]).array(Preprocessing((3, 3))).shape == (0, 3, 3, 3)


def test_one_image_at_a_time_is_the_same(pixels):
    split = array_split(pixels).subset([4, 2])
    for geometry in ((6, 8), (5, 5), (12, 12)):
        preprocessing = Preprocessing(geometry)
        together = split.array(preprocessing)
        for i in range(2):
            assert np.array_equal(together[i], split.resized(i, preprocessing))
            assert np.array_equal(together[i], preprocessing.resize(split.image(i)))
    assert split.image(0).mode == "RGB"
    assert split.name(0) == "some/4"


def test_channels_other_than_the_images_own(pixels):
    grey = array_split(pixels[:, :, :, :1], 3)
    assert grey.image(0).mode == "RGB"
    assert np.array_equal(grey.array(Preprocessing((6, 8))), np.repeat(pixels[:, :, :, :1], 3, axis=3))
    colour = array_split(pixels, 1)
    assert colour.image(0).mode == "L"
    got = colour.array(Preprocessing((6, 8), channels=1))
    assert got.shape == (20, 6, 8, 1)
    assert np.array_equal(got[3, :, :, 0], np.asarray(Image.fromarray(pixels[3]).convert("L")))


def test_what_is_kept_is_given_once_more(pixels):
    split = array_split(pixels)
    first = split.array(Preprocessing((4, 4)), keep=True)
    again = split.array(Preprocessing((4, 4), mean=(0.1, 0.2, 0.3), std=(1, 1, 1)))
    assert again is first  # statistics do not change the pixels
    assert split.array(Preprocessing((4, 4))) is not first
    split.array(Preprocessing((4, 4)), keep=True)
    assert split.array(Preprocessing((4, 5))).shape == (20, 4, 5, 3)
    bordered = split.array(Preprocessing((8, 8), crop_mode="border"), keep=True)
    darker = split.array(Preprocessing((8, 8), crop_mode="border", mean=(0, 0, 0), std=(1, 1, 1)))
    assert not np.array_equal(bordered, darker)  # where they are the filling, they do


def test_files_of_any_name(tmp_path):
    names = [b"plain.png", b"caf\xe9.png", b"new\nline.png", "日本.png".encode()]
    paths = []
    for k, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            Image.new("RGB", (4, 3), (k, k, k)).save(file, "PNG")
        paths.append(os.fsdecode(path))
    split = Split(np.arange(4), FileImages(paths), 3)
    for k in range(4):
        assert split.name(k) == paths[k]
        assert split.image(k).getpixel((0, 0)) == (k, k, k)
    again = pickle.loads(pickle.dumps(split.subset([3, 1])))
    assert [again.name(0), again.name(1)] == [paths[3], paths[1]]
    assert again.image(1).getpixel((0, 0)) == (1, 1, 1)


def test_what_was_decoded_does_not_travel_to_workers(pixels):
    split = array_split(pixels[:, :, :, :1], 3)
    small = len(pickle.dumps(split))
    split.array(Preprocessing((200, 200)), keep=True)
    assert len(pickle.dumps(split)) == small


def test_a_file_that_went_bad_is_named(tmp_path, picture, encoded):
    paths = [tmp_path / f"{k}.jpg" for k in range(100)]
    for path in paths:
        path.write_bytes(encoded(picture(16, 16)))
    paths[70].write_bytes(encoded(picture(16, 16))[:-300])
    split = Split(np.zeros(100), FileImages(paths), 3)
    with pytest.raises(ImageError, match="truncated") as caught:
        split.array(Preprocessing((8, 8)))
    assert str(paths[70]) in str(caught.value)
    with pytest.raises(ImageError):
        split.image(70)


def test_a_large_jpeg_may_come_smaller(tmp_path, picture, encoded):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(400, 400)))
    split = Split(np.zeros(1), FileImages([tmp_path / "a.jpg"]), 3)
    assert split.image(0).size == (400, 400)
    assert split.image(0, (20, 20)).size == (50, 50)
    assert split.resized(0, Preprocessing((20, 20))).shape == (20, 20, 3)


def test_boxes_follow_their_images(pixels):
    boxes = np.arange(20 * 2 * 4, dtype=np.float32).reshape(20, 2, 4)
    split = Split(
        np.arange(20), ArrayImages(pixels, "a"), 3, boxes=boxes, object_labels=np.arange(40).reshape(20, 2)
    ).subset([9, 4])
    assert np.array_equal(split.boxes, boxes[[9, 4]])
    assert split.object_labels.tolist() == [[18, 19], [8, 9]]
