"""Folders of images: layouts, one class map, unreadable files, and names of every kind."""

import logging
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

from vit.data.catalogue import DataConfig, open_data
from vit.data.dataset import SPLITS
from vit.data.preprocess import Preprocessing
from vit.errors import VitError, printable


def opened(root, class_names=None, **keys):
    return open_data(DataConfig(name="folder", root=str(root), image_size=16, **keys), class_names)


def refused(root, class_names=None, **keys):
    with pytest.raises(VitError) as caught:
        opened(root, class_names, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labelled(data, split):
    """The class name and file name of every image of a split."""
    part = data.splits[split]
    return [(data.class_names[part.labels[i]], os.path.basename(part.name(i))) for i in range(len(part))]


def many(classes, count, prefix="", suffix=".jpg"):
    return {f"{prefix}{name}/{name}_{k}{suffix}": None for name in classes for k in range(count)}


# --- layouts


def test_one_folder_a_class_is_split_in_three(make_folder):
    root = make_folder(many(["dog", "ant", "cat"], 20))
    data = opened(root)
    assert data.class_names == ["ant", "cat", "dog"]
    assert [len(data.splits[name]) for name in SPLITS] == [42, 6, 12]
    seen = [name for split in SPLITS for name in labelled(data, split)]
    assert len(seen) == len(set(seen)) == 60
    assert all(name.startswith(label) for label, name in seen)
    assert data.counts()["test"].tolist() == [4, 4, 4]
    assert opened(root, split_seed=1).splits["test"].name(0) is not None
    assert labelled(opened(root), "test") == labelled(data, "test")
    assert labelled(opened(root, split_seed=1), "test") != labelled(data, "test")


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Test"),
        ("TRAIN", "valid", "Testing"),
        ("training_set", "dev", "test_set"),
        ("trainset", "Dev Set", "TestSet"),
    ],
)
def test_split_folders(make_folder, train, val, test):
    root = make_folder(
        many(["b", "a"], 4, f"{train}/") | many(["b", "a"], 2, f"{val}/") | many(["b", "a"], 3, f"{test}/", ".png")
    )
    data = opened(root)
    assert data.class_names == ["a", "b"]
    assert [len(data.splits[name]) for name in SPLITS] == [8, 4, 6]
    for split in SPLITS:
        assert all(name.startswith(label) for label, name in labelled(data, split))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (many(["cat", "dog"], 3) | many(["cat", "dog"], 2, "Test/"), ["Test", "cat"]),
        (many(["cat", "dog", "test"], 3), ["test", "cat"]),
        (many(["cat", "dog", "Validation"], 3), ["Validation", "cat"]),
        (many(["train", "test"], 3), ["train", "test"]),
        (many("ab", 2, "train/") | many("ab", 2, "Train/"), ["train", "Train"]),
        (many("ab", 2, "train/") | many("ab", 2, "val/") | many("ab", 2, "dev_set/"), ["val", "dev_set"]),
        (many("ab", 2, "train/") | many("cd", 2), ["train", "'c'"]),
    ],
)
def test_what_may_be_a_split_or_a_class_is_refused(make_folder, files, named):
    message = refused(make_folder(files))
    assert all(name in message for name in named)


def test_a_class_of_the_model_is_no_split(make_folder):
    data = opened(make_folder(many(["train", "test"], 3)), ["bus", "test", "train"], test_fraction=1.0)
    assert data.counts()["test"].tolist() == [0, 3, 3]


def test_missing_splits_come_out_of_train(make_folder, tmp_path):
    without_val = make_folder(many("ab", 10, "train/") | many("ab", 5, "test/"), tmp_path / "one")
    assert [len(opened(without_val).splits[name]) for name in SPLITS] == [18, 2, 10]
    without_test = make_folder(many("ab", 10, "train/") | many("ab", 5, "val/"), tmp_path / "two")
    assert [len(opened(without_test).splits[name]) for name in SPLITS] == [20, 10, 0]
    only_train = make_folder(many("ab", 10, "train/"), tmp_path / "three")
    assert [len(opened(only_train).splits[name]) for name in SPLITS] == [14, 2, 4]


def test_an_unlabelled_test_set_is_as_if_it_were_not_there(make_folder, caplog):
    root = make_folder(many("ab", 10, "train/") | {"test/1.jpg": None, "test/2.jpg": None})
    (root / "val").mkdir()
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root)
    assert [len(data.splits[name]) for name in SPLITS] == [14, 2, 4]
    assert "test holds no labelled images" in caplog.text
    assert "val holds no labelled images" in caplog.text


def test_a_class_may_be_called_train(make_folder):
    root = make_folder(many(["train", "bus"], 5))
    assert opened(root).class_names == ["bus", "train"]


def test_images_may_lie_deeper(make_folder):
    files = {"cats/2023/a.jpg": None, "cats/2024/spring/b.jpg": None, "dogs/c.jpg": None, "dogs/x/y/z/d.jpg": None}
    data = opened(make_folder(files), val_fraction=0.0, test_fraction=0.0)
    assert labelled(data, "train") == [("cats", "a.jpg"), ("cats", "b.jpg"), ("dogs", "c.jpg"), ("dogs", "d.jpg")]


def test_what_is_no_image_is_passed_over_and_counted(make_folder, encoded, picture, caplog):
    jpeg = encoded(picture(20, 20))
    files = many("ab", 3) | {
        "a/scraped.JPG_large": jpeg,
        "b/no_ending": jpeg,
        "b/renamed.txt": jpeg,
        "a/notes.txt": b"x",
        "a/.hidden.jpg": b"x",
        "a/._a_1.jpg": b"x",
        ".git/c.jpg": None,
        "__MACOSX/a/d.jpg": None,
        "b/@eaDir/b_1.jpg/SYNOPHOTO_THUMB_M.jpg": None,
        "$RECYCLE.BIN/e.jpg": None,
        "b/Thumbs.db": b"x",
        "b/clip.MOV": b"\0\0\0\x14ftypqt  \0\0\0\0qt  ",
        "b/new.jxl": b"\xff\x0a\xfa",
        "README": b"x",
    }
    with caplog.at_level(logging.INFO, "vit"):
        data = opened(make_folder(files))
    assert data.class_names == ["a", "b"]
    assert data.bad_files == []
    assert sum(data.counts().values()).tolist() == [4, 5]
    assert data.passed_over == {
        "text file": 2,
        "hidden file or folder": 3,
        "__MACOSX": 1,
        "@eaDir": 1,
        "$RECYCLE.BIN": 1,
        "Thumbs.db": 1,
        "video file": 1,
        "JPEG XL file": 1,
    }
    assert "'a' 4, 'b' 5" in caplog.text
    [record] = [record for record in caplog.records if "passed over" in record.message]
    assert "1 JPEG XL file (convert it to JPEG or PNG)" in record.message
    assert record.levelname == "WARNING"  # photographs were left out


def test_photographs_that_are_left_out_are_never_left_out_in_silence(make_folder, caplog, monkeypatch):
    monkeypatch.setattr("vit.data.filetype.importlib.util.find_spec", lambda name: None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(100))
    root = make_folder(many(["cat"], 3) | many(["dog"], 20) | {f"cat/IMG_{k}.HEIC": heic for k in range(40)})
    with caplog.at_level(logging.INFO, "vit"):
        data = opened(root)
    assert data.passed_over == {"HEIC file": 40}
    assert "passed over: 40 HEIC files (to read them: pip install pillow-heif)" in caplog.text
    assert "'cat' 3, 'dog' 20" in caplog.text


def test_a_class_of_nothing_but_what_cannot_be_read_is_refused_with_the_kinds(make_folder):
    root = make_folder(many("ab", 3) | {"c/1.jxl": b"\xff\x0a\xfa", "c/2.jxl": b"\xff\x0a\xfa"})
    message = refused(root)
    assert "no images in 'c'" in message
    assert "2 JPEG XL files" in message


def test_capital_extensions_and_all_formats(make_folder, picture, encoded):
    files = {"a/1.JPG": None, "a/2.Jpeg": None}
    for kind, ext in (
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("PPM", "pgm"),
    ):
        files[f"b/{ext}.{ext}"] = encoded(picture(8, 8), kind)
    data = opened(make_folder(files), val_fraction=0.0, test_fraction=0.0)
    assert data.counts()["train"].tolist() == [2, 6]


def test_links_are_followed_and_circles_are_not(make_folder, tmp_path):
    store = make_folder(many(["x"], 3), tmp_path / "store")
    root = make_folder(many(["a"], 3))
    (root / "b").symlink_to(store / "x", target_is_directory=True)
    (root / "a" / "again").symlink_to(root / "a", target_is_directory=True)
    data = opened(root, val_fraction=0.0, test_fraction=0.0)
    assert data.counts()["train"].tolist() == [3, 3]


def test_a_class_with_two_names_is_refused(make_folder):
    root = make_folder(many("ab", 3))
    (root / "kitty").symlink_to(root / "a", target_is_directory=True)
    message = refused(root)
    assert f"{root / 'kitty'} and {root / 'a'} are the same folder" in message
    (root / "kitty").unlink()
    (root / "b" / "more").symlink_to(root / "a", target_is_directory=True)
    assert opened(root).passed_over == {"folder linked a second time": 1}


def test_a_split_linked_to_another_is_refused(make_folder):
    root = make_folder(many("ab", 3, "train/"))
    (root / "val").symlink_to("train", target_is_directory=True)
    assert "are the same folder" in refused(root)


@pytest.mark.parametrize("target", ["/nowhere/cat", "cat"])
@pytest.mark.parametrize("prefix", ["", "train/", "val/"])
def test_a_class_behind_a_broken_link_is_refused(make_folder, target, prefix):
    files = many("ab", 3, prefix) if prefix != "val/" else many("ab", 3, "train/") | many("ab", 3, prefix)
    root = make_folder(files)
    (root / prefix / "cat").symlink_to(target)
    message = refused(root)
    assert f"{root / prefix / 'cat'} is a link to {target}" in message


def test_a_relative_root_reopens_from_elsewhere(make_folder, monkeypatch, tmp_path):
    root = make_folder(many("ab", 4))
    monkeypatch.chdir(root.parent)
    data = opened(root.name)
    monkeypatch.chdir("/")
    again = open_data(DataConfig.from_dict(data.source))
    assert labelled(again, "train") == labelled(data, "train")


# --- one class map


def test_a_class_that_a_split_lacks_shifts_nothing(make_folder, caplog):
    files = many("abcd", 3, "train/") | many("ad", 2, "val/") | many("cd", 2, "test/")
    root = make_folder(files)
    (root / "val" / "b").mkdir()
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root)
    assert data.class_names == list("abcd")
    assert data.splits["val"].labels.tolist() == [0, 0, 3, 3]
    assert data.splits["test"].labels.tolist() == [2, 2, 3, 3]
    assert "no val images of 'b', 'c'" in caplog.text
    assert "no test images of 'a', 'b'" in caplog.text


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_only_a_later_split_has_is_an_error(make_folder, split):
    root = make_folder(many("ac", 3, "train/") | many("abc", 2, f"{split}/"))
    message = refused(root)
    assert f"{split} has 'b'" in message
    assert "train" in message


def test_names_are_sorted_plainly(make_folder):
    root = make_folder(many(["10", "9", "B", "a", "Ä"], 3))
    assert opened(root).class_names == ["10", "9", "B", "a", "Ä"]


def test_a_trained_model_brings_its_classes(make_folder, tmp_path):
    root = make_folder(many(["cat", "dog"], 10))
    data = opened(root, ["fox", "dog", "cat"])
    assert set(labelled(data, "test")) == set(labelled(opened(root), "test"))
    assert set(data.splits["test"].labels.tolist()) == {1, 2}
    assert "the model does not know 'cat', 'dog'; the data does not have 'bird'" in refused(root, ["bird"])
    # all of a folder may be the test
    everything = opened(root, ["cat", "dog"], test_fraction=1.0)
    assert [len(everything.splits[name]) for name in SPLITS] == [0, 0, 20]
    # which then needs no train folder
    judged = make_folder(many(["dog"], 4, "test/"), tmp_path / "judged")
    data = opened(judged, ["cat", "dog"])
    assert data.splits["test"].labels.tolist() == [1] * 4
    assert "no train folder" in refused(judged)


def test_accents_in_two_spellings_are_one_class(make_folder, caplog):
    root = make_folder(
        {f"{name}/{k}.jpg": None for k, name in enumerate(["caf\u00e9", "cafe\u0301"] * 4 + ["tea"] * 4)}
    )
    assert len(list(root.iterdir())) == 3
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root)
    assert data.class_names == ["caf\u00e9", "tea"]
    assert sum(data.counts().values()).tolist() == [8, 4]
    assert "'cafe\\u0301', 'caf\\xe9' are one class" in caplog.text


@pytest.mark.parametrize("form", ["caf\u00e9", "cafe\u0301"])
@pytest.mark.parametrize("known", ["caf\u00e9", "cafe\u0301"])
def test_a_model_s_names_match_in_either_spelling_and_stay(make_folder, form, known):
    data = opened(make_folder(many([form, "tea"], 3)), ["water", known, "tea"], test_fraction=1.0)
    assert data.class_names == ["water", known, "tea"]
    assert data.counts()["test"].tolist() == [0, 3, 3]


def test_splits_may_spell_a_class_differently(make_folder):
    data = opened(make_folder(many(["caf\u00e9", "tea"], 4, "train/") | many(["cafe\u0301", "tea"], 2, "test/")))
    assert data.counts()["test"].tolist() == [2, 2]


def test_names_that_are_easily_confused_are_named(make_folder, caplog):
    with caplog.at_level(logging.WARNING, "vit"):
        assert len(opened(make_folder(many(["Cat", "cat", "dog "], 3))).class_names) == 3
    assert "'Cat', 'cat' are classes of their own" in caplog.text
    assert "'dog ' begins or ends with a blank" in caplog.text


def test_many_classes_are_shortened_in_the_log(make_folder, caplog):
    files = {f"c{k:02}/{n}.jpg": None for k in range(40) for n in range(9 if k == 20 else 1 if k == 30 else 3)}
    with caplog.at_level(logging.INFO, "vit"):
        opened(make_folder(files))
    assert "'c00' 3, " in caplog.text
    assert "fewest: 'c30' 1, most: 'c20' 9" in caplog.text
    assert "'c25'" not in caplog.text.split("fewest")[0].splitlines()[-1]


trees = st.dictionaries(
    st.sampled_from(["ant", "Caf\u00e9", "Cafe\u0301", "train", "@eaDir", ".x", "d\ne", "z "]),
    st.lists(
        st.tuples(
            st.sampled_from(["", "deep/", "deep/er/", "@eaDir/", "test/"]),
            st.sampled_from(["1.jpg", "2", "3.txt", "4.PNG_large", "._5.jpg", "6.jpg"]),
            st.sampled_from(["image", "image", "image", "text", "empty"]),
        ),
        max_size=8,
    ),
    max_size=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees, st.booleans())
def test_every_image_is_in_one_class_or_counted(encoded, picture, tree, in_splits):
    image = encoded(picture(8, 8), "PNG")
    with tempfile.TemporaryDirectory() as name:
        root, wanted = Path(name), {}
        for top in ("train", "Test") if in_splits else ("",):
            for folder, files in ({"ant": [], "bee": []} | tree).items():
                for below, file, kind in [("", "0.jpg", "image"), *files]:
                    path = root / top / folder / below / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image if kind == "image" else b"words" if kind == "text" else b"")
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            walked = path.is_file() and not any(part == "@eaDir" or part.startswith(".") for part in parts)
            if walked and (path.suffix == ".jpg" or path.read_bytes() == image):
                wanted[str(path)] = path.read_bytes() == image
        try:
            data = opened(root, max_bad_fraction=1.0)
        except VitError:  # refused: nothing was taken, nothing is lost
            reject()
        found = [split.name(i) for split in data.splits.values() for i in range(len(split))]
        loose = data.passed_over.get("image without a label", 0)
        assert len(found) == len(set(found))
        assert set(found) <= {path for path, whole in wanted.items() if whole}
        assert {path for path, _ in data.bad_files} <= {path for path, whole in wanted.items() if not whole}
        assert len(found) + len(data.bad_files) + loose == len(wanted)
        assert len({unicodedata.normalize("NFC", name) for name in data.class_names}) == len(data.class_names)
        for split in data.splits.values():
            for i in range(len(split)):
                inside = os.path.relpath(split.name(i), root).split(os.sep)[1 if in_splits else 0]
                assert unicodedata.normalize("NFC", printable(inside)) == data.class_names[split.labels[i]]


# --- too little


def test_missing_roots(make_folder, tmp_path):
    with pytest.raises(VitError, match=r"data\.root=FOLDER"):
        open_data(DataConfig(name="folder"))
    assert "no such folder" in refused(tmp_path / "nothing")
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")


def test_empty_folders(make_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "a").mkdir()
    (tmp_path / "empty" / "b").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    root = make_folder(many(["a", "b"], 3))
    (root / "c").mkdir()
    assert "no images in 'c'" in refused(root)


def test_images_without_labels(make_folder):
    root = make_folder({"1.jpg": None, "2.jpg": None})
    message = refused(root)
    assert "no labels" in message
    assert "ROOT/cat" in message


def test_stray_images_are_reported(make_folder, caplog):
    root = make_folder(many("ab", 3) | {"stray.jpg": None})
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root)
    assert sum(len(split) for split in data.splits.values()) == 6
    assert "1 images lie beside the class folders" in caplog.text


def test_one_class_and_one_image(make_folder, tmp_path):
    assert "one class only ('a')" in refused(make_folder(many("a", 5), tmp_path / "one"))
    assert "one image only" in refused(make_folder({"a/1.jpg": None}, tmp_path / "two"))
    # for a trained model one class is a test like any other
    assert len(opened(tmp_path / "one", ["a", "b"], test_fraction=1.0).splits["test"]) == 5


def test_a_class_with_a_single_image_goes_to_train(make_folder, caplog):
    root = make_folder(many("ab", 10) | {"c/only.jpg": None})
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root)
    assert ("c", "only.jpg") in labelled(data, "train")
    assert "1 class with one image only" in caplog.text
    assert "no test images of 'c'" in caplog.text


def test_two_classes_of_one_image(make_folder):
    data = opened(make_folder({"a/1.jpg": None, "b/1.jpg": None}))
    assert [len(data.splits[name]) for name in SPLITS] == [2, 0, 0]


def test_another_folder_beside_the_splits(make_folder, caplog):
    root = make_folder(many("ab", 3, "train/") | many("ab", 3, "val/") | {"labels/1.txt": b"3 0.5 0.5"})
    with caplog.at_level(logging.WARNING, "vit"):
        assert opened(root).class_names == ["a", "b"]
    assert "'labels' is neither train, val nor test, and holds no images" in caplog.text
    make_folder({"extra/deep/1.jpg": None}, root)
    message = refused(root)
    assert "'train', 'val'" in message
    assert "'extra'" in message


def test_fractions_that_leave_nothing(make_folder):
    root = make_folder(many("ab", 4))
    assert "leave nothing to train on" in refused(root, val_fraction=0.5, test_fraction=0.5)


def test_an_unreadable_folder(unprivileged, make_folder):
    with unprivileged() as place:
        root = make_folder(many("ab", 2), place / "photos")
        (root / "b").chmod(0)
        try:
            assert "Permission denied" in refused(root)
        finally:
            (root / "b").chmod(0o755)


# --- unreadable files


def test_unreadable_files_are_left_out_and_listed(make_folder, encoded, picture, caplog):
    whole = encoded(picture(40, 40))
    broken = {"a/cut.jpg": whole[:-150], "a/empty.jpg": b"", "b/text.png": b"no image at all"}
    root = make_folder(many("ab", 60) | broken)
    os.mkfifo(root / "b" / "pipe.jpg")
    (root / "b" / "folder.jpg").mkdir()
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(root, max_bad_fraction=0.05)
    reasons = {os.path.relpath(path, root): reason for path, reason in data.bad_files}
    assert set(reasons) == {"a/cut.jpg", "a/empty.jpg", "b/text.png", "b/pipe.jpg"}
    assert "truncated" in reasons["a/cut.jpg"]
    assert reasons["a/empty.jpg"] == "empty file"
    assert "not an image" in reasons["b/text.png"]
    assert reasons["b/pipe.jpg"] == "not a regular file"
    for path, reason in data.bad_files:
        assert path in caplog.text
        assert reason in caplog.text
    assert sum(len(split) for split in data.splits.values()) == 120
    # every image is its own, none stands in for a broken one
    seen = [split.name(i) for split in data.splits.values() for i in range(len(split))]
    assert len(set(seen)) == 120
    for split in data.splits.values():
        assert split.array(Preprocessing((16, 16))).shape[0] == len(split)


def test_too_many_unreadable_files_stop_with_the_list(make_folder):
    root = make_folder(many("ab", 40) | {f"a/bad{k:02}.jpg": b"" for k in range(25)})
    message = refused(root)
    assert "25 of 105" in message
    assert "data.max_bad_fraction=0.01" in message
    assert "bad00.jpg: empty file" in message
    assert "bad19.jpg" in message
    assert "bad20.jpg" not in message
    assert "and 5 more" in message
    assert len(opened(root, max_bad_fraction=0.5).bad_files) == 25


def test_a_class_of_broken_files_only(make_folder):
    root = make_folder(many("ab", 30) | {"c/1.jpg": b"", "c/2.jpg": b"x"})
    assert "no image of 'c' can be read" in refused(root, max_bad_fraction=0.5)


def test_no_permission_for_a_file(unprivileged, make_folder):
    with unprivileged() as place:
        root = make_folder(many("ab", 4), place / "photos")
        (root / "a" / "a_1.jpg").chmod(0)
        data = opened(root, max_bad_fraction=0.5)
        assert data.bad_files == [(str(root / "a" / "a_1.jpg"), "permission denied")]
        (root / "a" / "a_1.jpg").chmod(0o644)
        assert opened(root).bad_files == []


def test_names_of_every_kind(make_folder, encoded, picture, tmp_path):
    root = os.fsencode(tmp_path / "photos")
    for k, folder in enumerate([b"caf\xe9", b"new\nline", b"-rf", "日本".encode()]):
        os.makedirs(os.path.join(root, folder))
        for n, name in enumerate([b"\xff\xfe.png", b"a\nb.png", b"'\".png", b" .png"]):
            with open(os.path.join(root, folder, name), "wb") as file:
                file.write(encoded(Image.new("RGB", (8, 8), (k * 10, n * 10, 0)), "PNG"))
    data = opened(os.fsdecode(root), val_fraction=0.25, test_fraction=0.25)
    assert data.class_names == ["-rf", "caf\\xe9", "new\\nline", "日本"]
    for name in data.class_names:
        name.encode("utf-8")
    for split in data.splits.values():
        assert len(split)
        for i in range(len(split)):
            assert os.path.exists(split.name(i))
            assert split.image(i).size == (8, 8)
    with open(os.path.join(root, b"caf\xe9", b"bad\n\xff.png"), "wb"):
        pass
    message = refused(os.fsdecode(root))
    message.encode("utf-8")
    assert "bad\\n\\xff.png: empty file" in message


def test_images_of_one_size_are_known(make_folder, encoded, picture):
    files = {f"{name}/{k}.png": encoded(picture(12, 18, k), "PNG") for name in "ab" for k in range(5)}
    data = opened(make_folder(files), val_fraction=0.0, test_fraction=0.0)
    assert data.splits["train"].native_size == (12, 18)
    assert data.splits["val"].native_size is None
    make_folder({"a/other.png": encoded(picture(13, 18), "PNG")})
    assert opened(make_folder({}), val_fraction=0.0, test_fraction=0.0).splits["train"].native_size is None


def test_arrays_of_many_channels(make_folder, tmp_path):
    root = tmp_path / "bands"
    for name in "ab":
        (root / name).mkdir(parents=True)
        for k in range(6):
            np.save(root / name / f"{k}.npy", np.full((10, 12, 5), k, dtype=np.uint8))
    data = opened(root, channels=5, val_fraction=0.0, test_fraction=0.0)
    assert data.bad_files == []
    preprocessing = Preprocessing((16, 16), 5)
    assert data.splits["train"].array(preprocessing).shape == (12, 16, 16, 5)
    assert data.splits["train"].native_size == (10, 12)
    assert "holds no images" in refused(root)
