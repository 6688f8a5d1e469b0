"""Generated shapes: the same for ever, one image at a time, and the boxes are where the shapes are."""

import pickle

import numpy as np
import pytest

from vit.data.catalogue import DataConfig, open_data
from vit.data.preprocess import Preprocessing
from vit.data.shapes import CLASS_KINDS, DISTRACTORS, KINDS
from vit.errors import VitError


def opened(split="train", **keys):
    counts = {"train_images": 60, "val_images": 30, "test_images": 30}
    return open_data(DataConfig(name="shapes", **{**counts, **keys})).splits[split]


def pixels(split, i):
    return np.asarray(split.image(i))


def drawn(image):
    """Where the noise was painted over: it keeps between 64 and 191 in every channel."""
    image = image[:, :, None] if image.ndim == 2 else image
    return ((image < 60) | (image > 195)).any(axis=2)


def test_the_class_is_the_kind_and_classes_are_equal_in_number():
    data = open_data(DataConfig(name="shapes", train_images=60, val_images=12, test_images=24))
    assert data.class_names == list(CLASS_KINDS)
    assert {"circle", "square", "triangle", "cross"} <= set(data.class_names)
    assert [counts.tolist() for counts in data.counts().values()] == [[10] * 6, [2] * 6, [4] * 6]
    chosen = open_data(DataConfig(name="shapes", kinds=("star", "arrow")))
    assert chosen.class_names == ["star", "arrow"]


def test_an_image_never_depends_on_the_others():
    few, many = opened(train_images=20), opened(train_images=500)
    for i in (0, 7, 19):
        assert np.array_equal(pixels(few, i), pixels(many, i))
        assert np.array_equal(few.boxes[i], many.boxes[i])
    assert np.array_equal(pixels(many.subset([7, 3]), 0), pixels(few, 7))
    again = opened(train_images=20)
    assert np.array_equal(pixels(again, 19), pixels(few, 19))


def test_splits_and_seeds_differ():
    images = [pixels(opened(split, split_seed=seed), 0) for split in ("train", "val", "test") for seed in (0, 1)]
    for a in range(6):
        for b in range(a):
            assert not np.array_equal(images[a], images[b])


def test_known_images():
    # written down: results on this data must stay comparable.  Edges are Pillow's to draw; the rest is ours.
    split = opened(image_size=32, clutter=1, objects=2)
    assert np.allclose(
        split.boxes[0],
        [[8.14, 18.69, 19.15, 29.70], [22.45, 24.95, 28.52, 31.01], [6.06, 5.68, 15.30, 14.07]],
        atol=0.01,
    )
    assert split.object_labels[:4].tolist() == [[0, 1, -1], [1, 0, -1], [2, 3, -1], [3, 1, -1]]
    assert [pixels(split, i)[0, 0].tolist() for i in range(4)] == [
        [146, 70, 70],
        [147, 72, 96],
        [109, 118, 142],
        [154, 121, 184],
    ]


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (224, 224), (33, 20)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_exact(size, channels, kind):
    others = [name for name in KINDS if name != kind]
    split = opened(image_size=size, channels=channels, kinds=(kind, others[0]), object_scale=0.25)
    for i in range(0, 12, 2):
        painted = drawn(pixels(split, i))
        rows, columns = np.flatnonzero(painted.any(axis=1)), np.flatnonzero(painted.any(axis=0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert split.boxes[i, 0, 0] >= 0
        assert split.boxes[i, 0, 1] >= 0
        assert (split.boxes[i, 0, 2:] <= (size[1], size[0])).all()
        assert np.abs(found - split.boxes[i, 0]).max() <= 1.6, (found, split.boxes[i, 0])


def test_object_scale_is_a_share_of_the_area():
    for scale in (0.05, 0.1, 0.3):
        split = opened(train_images=600, kinds=("square", "circle"), object_scale=scale)
        x0, y0, x1, y1 = split.boxes[:, 0].T
        circles = split.labels == 1
        # a circle's box is its side squared; the side varies by 12% either way
        share = ((x1 - x0) * (y1 - y0) / 64**2)[circles]
        assert abs(share.mean() - scale) < 0.1 * scale
        assert share.min() > 0.7 * scale
        assert share.max() < 1.3 * scale


def test_two_objects_of_two_classes():
    split = opened(objects=2)
    assert split.boxes.shape == (60, 2, 4)
    assert np.array_equal(split.object_labels[:, 0], split.labels)
    assert (split.object_labels[:, 1] != split.labels).all()
    assert set(split.object_labels[:, 1]) == set(range(6))
    sides = (split.boxes[:, :, 2:] - split.boxes[:, :, :2]).max(axis=2)
    assert (sides[:, 0] > sides[:, 1]).all()  # the larger one names the image


def test_clutter_is_of_other_kinds():
    split = opened(clutter=4, train_images=200)
    assert split.boxes.shape == (200, 5, 4)
    assert np.array_equal(split.object_labels[:, 0], split.labels)
    assert (split.object_labels[:, 1:] == -1).all()
    assert not set(KINDS) & set(DISTRACTORS)
    kinds = split.images._scene.kinds
    assert all(len(set(row)) == 5 for row in kinds)
    assert len(np.unique(kinds[:, 1:])) == len(DISTRACTORS)


def test_objects_keep_apart_and_nothing_covers_the_first():
    split = opened(clutter=4, train_images=300)
    boxes = split.boxes
    low = np.maximum(boxes[:, 0, None, :2], boxes[:, 1:, :2])
    high = np.minimum(boxes[:, 0, None, 2:], boxes[:, 1:, 2:])
    overlap = (high - low).clip(min=0).prod(axis=2)
    assert (overlap > 0).mean() < 0.05
    alone = opened(clutter=0, train_images=300)
    for i in np.flatnonzero((overlap > 0).any(axis=1))[:5]:
        painted = drawn(pixels(alone, i)) & (pixels(alone, i).max(axis=2) >= 250)
        assert np.abs(pixels(split, i)[painted].astype(int) - pixels(alone, i)[painted]).max() <= 1


def test_places_colours_and_turns_vary():
    split = opened(train_images=600)
    centres = (split.boxes[:, 0, :2] + split.boxes[:, 0, 2:]) / 2
    counts, _, _ = np.histogram2d(*centres.T, bins=3, range=[[8, 56], [8, 56]])
    assert counts.min() > 30
    colours = split.images._scene.colours[:, 0]
    assert len(np.unique(colours, axis=0)) > 300
    assert (colours.max(axis=1) == 255).all()
    # neither colour nor place tells the class
    for feature in (*centres.T, *colours.T.astype(float)):
        means = [feature[split.labels == k].mean() for k in range(6)]
        assert np.ptp(means) < 0.6 * feature.std()


def test_any_number_of_channels():
    split = opened(channels=5)
    assert split.image(0).shape == (64, 64, 5)
    assert opened(channels=1).image(0).mode == "L"
    assert opened(channels=3).image(0).mode == "RGB"
    # what names the class is as far from the noise as can be
    assert drawn(pixels(opened(channels=1, object_scale=0.3), 0)).mean() > 0.1


def test_all_images_as_an_array():
    split = opened(clutter=2, train_images=150)
    whole = split.array(Preprocessing((64, 64)))
    assert whole.shape == (150, 64, 64, 3)
    assert np.array_equal(whole[149], pixels(split, 149))
    assert split.native_size == (64, 64)
    assert split.name(3) == "shapes/train/3"
    sent = pickle.loads(pickle.dumps(split))
    assert np.array_equal(pixels(sent, 149), whole[149])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kinds": ("circel", "square")}, "did you mean 'circle'"),
        ({"kinds": ("circle", "circle")}, "twice"),
        ({"kinds": ("circle",)}, "one class only"),
        ({"kinds": ("circle",), "objects": 2}, "data.objects=2"),
        ({"clutter": 9}, "data.clutter=9"),
        ({"clutter": 4, "object_scale": 0.2}, "data.object_scale=0.2"),
        ({"object_scale": 0.7}, "data.object_scale=0.7"),
        ({"image_size": 6}, "at least 8 pixels"),
    ],
)
def test_what_cannot_be_drawn(keys, words):
    with pytest.raises(VitError) as caught:
        opened(**keys)
    assert words in str(caught.value)


def test_the_advice_on_size_works():
    with pytest.raises(VitError) as caught:
        opened(clutter=4, object_scale=0.2)
    advice = float(str(caught.value).split("at most ")[1].split()[0])
    assert opened(clutter=4, object_scale=advice).boxes.shape == (60, 5, 4)
