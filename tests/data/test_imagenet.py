"""ImageNet's folders: the official validation is the test, and classes are found by any of their names."""

import subprocess
import sys

import numpy as np
import pytest

from vit.data import imagenet as room
from vit.data.catalogue import DataConfig, open_data
from vit.data.dataset import SPLITS
from vit.errors import VitError

TENCH, GOLDFISH, BIRD, MACHINE = "n01440764", "n01443537", "n02012849", "n03126707"


@pytest.fixture
def root(make_folder):
    files = {}
    for synset in (MACHINE, TENCH, BIRD, GOLDFISH):
        files |= {f"train/{synset}/{synset}_{k}.JPEG": None for k in range(10)}
        files |= {f"val/{synset}/ILSVRC2012_val_{k:08}.JPEG": None for k in range(3)}
    files["test/ILSVRC2012_test_00000001.JPEG"] = None  # unlabelled, as it comes
    return make_folder(files)


def opened(root, class_names=None, **keys):
    return open_data(DataConfig(name="imagenet", root=str(root), image_size=16, patch_size=4, **keys), class_names)


def test_official_validation_is_the_test(root):
    data = opened(root)
    assert [len(data.splits[name]) for name in SPLITS] == [36, 4, 12]
    assert all("/val/" in data.splits["test"].name(i) for i in range(12))
    assert all("/train/" in data.splits[name].name(i) for name in ("train", "val") for i in range(4))


def test_classes_are_in_the_order_of_synsets_and_have_readable_names(root):
    data = opened(root)
    assert data.class_names[0] == "tench, Tinca tinca"
    assert data.class_names[1].startswith("goldfish")
    assert data.class_names[2:] == [f"crane ({BIRD})", f"crane ({MACHINE})"]  # two things with one name
    for i in range(12):
        synset = sorted((TENCH, GOLDFISH, BIRD, MACHINE))[data.splits["test"].labels[i]]
        assert f"/{synset}/" in data.splits["test"].name(i)


@pytest.mark.parametrize(
    "names",
    [
        [BIRD, MACHINE, TENCH, GOLDFISH],
        [f"crane ({BIRD})", f"crane ({MACHINE})", "tench, Tinca tinca", "goldfish, Carassius auratus"],
        [f"crane ({BIRD})", f"crane ({MACHINE})", "tench", "goldfish"],
        [f"{BIRD} crane", f"{MACHINE} crane", f"{TENCH} tench, Tinca tinca", f"{GOLDFISH} goldfish, Carassius auratus"],
    ],
)
def test_a_model_may_name_them_in_any_usual_way(root, names):
    data = opened(root, names)
    assert data.class_names == names
    order = [BIRD, MACHINE, TENCH, GOLDFISH]
    for i in range(12):
        assert f"/{order[data.splits['test'].labels[i]]}/" in data.splits["test"].name(i)


def test_all_thousand_names_differ():
    timm = pytest.importorskip("timm.data", reason="timm has the list")
    synsets = timm.ImageNetInfo().label_names()
    assert len(synsets) == 1000
    assert room._standard_synsets() == synsets == sorted(synsets)
    for whole in (True, False):
        names = room._readable_names(synsets, whole)
        assert len(set(names)) == 1000
        assert room._class_indices(synsets, names[::-1]) == list(range(999, -1, -1))
    assert room._class_indices(synsets[:5], ["x"] * 1000) is None


def test_a_model_with_two_cranes(root):
    timm = pytest.importorskip("timm.data", reason="timm has the list")
    info = timm.ImageNetInfo()
    names = [info.index_to_description(k) for k in range(1000)]
    assert len(set(names)) < 1000
    data = opened(root, names)
    places = [info.label_names().index(synset) for synset in (TENCH, GOLDFISH, BIRD, MACHINE)]
    assert sorted(set(data.splits["test"].labels.tolist())) == sorted(places)
    assert data.class_names == names


def test_a_model_of_other_things_is_refused(root):
    with pytest.raises(VitError, match="does not know 'tench, Tinca tinca'"):
        opened(root, ["cat", "dog"])


def test_unknown_synsets_keep_their_names(make_folder, tmp_path):
    files = {f"{split}/{name}/{k}.JPEG": None for split in ("train", "val") for name in ("x1", "x2") for k in range(4)}
    data = opened(make_folder(files, tmp_path / "other"))
    assert data.class_names == ["x1", "x2"]
    assert np.array_equal(data.counts()["test"], [4, 4])


def test_layouts_that_are_not_it(root, tmp_path, make_folder):
    with pytest.raises(VitError, match=r"data\.root=FOLDER"):
        open_data(DataConfig(name="imagenet"))
    with pytest.raises(VitError, match="no train folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(VitError, match="no val folder"):
        opened(make_folder({"train/n1/a.JPEG": None, "train/n2/a.JPEG": None}, tmp_path / "half"))
    flat = make_folder({"train/n1/a.JPEG": None, "val/a.JPEG": None, "val/b.JPEG": None}, tmp_path / "flat")
    with pytest.raises(VitError, match="one folder a synset"):
        opened(flat)


def test_a_trained_model_needs_no_train_folder(root):
    import shutil

    shutil.rmtree(root / "train")
    data = opened(root, [TENCH, GOLDFISH, BIRD, MACHINE])
    assert len(data.splits["test"]) == 12
    assert len(data.splits["train"]) == 0


def test_names_do_not_cost_an_import_of_timm(root):
    code = (
        "import sys; from vit.data.catalogue import *; "
        f"open_data(DataConfig(name='imagenet', root={str(root)!r})); "
        "print('timm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["False", "False"]
