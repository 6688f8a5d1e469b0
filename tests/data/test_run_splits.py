"""A run's splits, written down and found again after the files have moved, changed or gone."""

import csv
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vit.data.catalogue import DataConfig, open_data
from vit.data.dataset import SPLITS
from vit.data.run_splits import COLUMNS, write_splits
from vit.errors import VitError


def photos(root, count=20, names=("cat", "dog")):
    """Distinct small pictures, `count` a class; every third a bitmap, all of which have one size."""
    draw = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (12, 12, 3)).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i:02}.{'bmp' if i % 3 == 0 else 'png'}")
    return root


def opened(root, splits=None, **keys):
    config = DataConfig(name="folder", root=str(root), image_size=16, **keys)
    return open_data(config, None if splits is None else ["cat", "dog"], splits)


def contents(data):
    """For each split the pictures it holds, in order, and their labels."""
    return {
        name: [(split.image(i).tobytes(), int(split.labels[i])) for i in range(len(split))]
        for name, split in data.splits.items()
    }


def renumber(root):
    (root / "cat" / "00.bmp").unlink()
    for i in range(3, 20, 3):
        (root / "cat" / f"{i:02}.bmp").rename(root / "cat" / f"{i - 3:02}.bmp")


CHANGES = {
    "nothing": lambda root: None,
    "renamed": lambda root: (root / "cat" / "00.bmp").rename(root / "cat" / "zebra.bmp"),
    "exchanged": lambda root: [
        os.rename(root / a, root / b)
        for a, b in (("cat/00.bmp", "x"), ("cat/03.bmp", "cat/00.bmp"), ("x", "cat/03.bmp"))
    ],
    "added": lambda root: [shutil.copy(root / "dog" / "01.png", root / "dog" / f"aa{i}.png") for i in range(5)],
    "deeper": lambda root: [(root / "cat" / "in").mkdir(), os.rename(root / "cat/01.png", root / "cat/in/01.png")],
    "touched": lambda root: [os.utime(path) for path in (root / "cat").iterdir()],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["here", "moved"])
def test_images_stay_in_their_splits_whatever_happens_to_their_names(tmp_path, change, place):
    root = photos(tmp_path / "photos")
    data = opened(root)
    before = contents(data)
    write_splits(tmp_path / "splits.csv", data)
    CHANGES[change](root)
    if place == "moved":
        shutil.copytree(root, tmp_path / "elsewhere")
        shutil.rmtree(root)
        root = tmp_path / "elsewhere"
    assert contents(opened(root, tmp_path / "splits.csv")) == before


def test_what_is_gone_or_changed_or_new_is_counted_and_named_in_a_line(tmp_path, caplog):
    root = photos(tmp_path / "photos")
    data = opened(root)
    before = contents(data)
    write_splits(tmp_path / "splits.csv", data)
    renumber(root)
    Image.new("RGB", (30, 30)).save(root / "dog" / "01.png")
    Image.new("RGB", (31, 31)).save(root / "dog" / "new.png")
    caplog.clear()
    with caplog.at_level("INFO", "vit"):
        after = contents(opened(root, tmp_path / "splits.csv"))
    assert "of the run's 40 images 6 have another name or place; they stay in their splits" in caplog.text
    assert "of the run's 40 images 1 have changed" in caplog.text
    assert "of the run's 40 images 1 are gone or cannot be read: 'cat/00.bmp'" in caplog.text
    assert "1 other images, which the run does not use: 'dog/new.png'" in caplog.text
    everywhere = {picture: name for name, pictures in before.items() for picture, _ in pictures}
    kept = [
        (name, everywhere[picture])
        for name, pictures in after.items()
        for picture, _ in pictures
        if picture in everywhere
    ]
    assert len(kept) == 38
    assert all(now == then for now, then in kept)


def test_a_split_that_is_gone_and_a_damaged_table_are_named_in_a_line(tmp_path):
    root = photos(tmp_path / "photos")
    write_splits(tmp_path / "splits.csv", opened(root))
    other = tmp_path / "other"
    for name in ("cat", "dog"):
        (other / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(other / name / f"x{i}.png")
    with pytest.raises(VitError, match=r"none of the images of the run's train split is there: data\.root="):
        opened(other, tmp_path / "splits.csv")
    for text in ("", "a,b\n", ",".join(COLUMNS) + "\nnowhere,a,b,c,d\n", ",".join(COLUMNS) + "\ntrain,a\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(VitError, match=r"bad\.csv: the run's splits cannot be read"):
            opened(root, tmp_path / "bad.csv")


@pytest.mark.parametrize("config", [{"name": "digits", "max_images": 50}, {"name": "shapes", "train_images": 40}])
def test_data_that_is_not_in_files_is_split_as_it_was(tmp_path, config):
    config = DataConfig(**config)
    data = open_data(config)
    write_splits(tmp_path / "splits.csv", data)
    again = open_data(config, data.class_names, tmp_path / "splits.csv")
    for name in SPLITS:
        assert len(again.splits[name]) == len(data.splits[name])
        assert np.array_equal(again.splits[name].labels, data.splits[name].labels)
        assert np.array_equal(again.splits[name].rows, data.splits[name].rows)
    assert again.source == data.source


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_renaming_and_adding_leaves_every_image_in_its_split(tmp_path_factory, data):
    where = tmp_path_factory.mktemp("any")
    root = photos(where / "photos", 6)
    first = opened(root)
    before = contents(first)
    write_splits(where / "splits.csv", first)
    paths = sorted(root.glob("*/*.*"))
    order = data.draw(st.permutations(range(len(paths))))
    for i, path in enumerate(paths):
        path.rename(path.with_name(f"tmp{i}{path.suffix}"))
    for i, k in enumerate(order):  # every picture gets the name of another, or one of its own
        stem = paths[k].stem if paths[k].parent == paths[i].parent else f"own{i}"
        target = paths[i].with_name(stem + paths[i].suffix)
        path = paths[i].with_name(f"tmp{i}{paths[i].suffix}")
        path.rename(target if not target.exists() else paths[i].with_name(f"other{i}{paths[i].suffix}"))
    for i in range(data.draw(st.integers(0, 3))):
        Image.new("RGB", (40 + i, 40)).save(root / "cat" / f"{data.draw(st.sampled_from(['0', 'zz', 'm']))}{i}new.png")
    assert contents(opened(root, where / "splits.csv")) == before


def test_names_of_any_kind_come_back(tmp_path):
    root = photos(tmp_path / "photos", 8)
    names = ['comma, "quote".png', "line\nbreak.png", "return\rhere.png", "größe.png"]
    if os.name == "posix":
        names.append(os.fsdecode(b"bytes\xff.png"))
    for name, path in zip(names, sorted((root / "cat").glob("*.png")), strict=False):
        path.rename(root / "cat" / name)
    data = opened(root)
    write_splits(tmp_path / "splits.csv", data)
    with open(tmp_path / "splits.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 16
    assert not [row for row in table if str(tmp_path) in row["path"]]
    assert contents(opened(root, tmp_path / "splits.csv")) == contents(data)
