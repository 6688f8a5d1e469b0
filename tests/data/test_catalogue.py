"""The data sets by name, their keys, their splits, and what happens to someone else's class names."""

import gzip
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from vit.data.catalogue import CATALOGUE, DataConfig, open_data, preprocessing_for, statistics
from vit.data.dataset import SPLITS, ArrayImages, ImageData, Split
from vit.data.preprocess import Preprocessing
from vit.errors import VitError


def rows_of(data):
    return {name: {split.name(i) for i in range(len(split))} for name, split in data.splits.items()}


# --- the configuration


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_has_sizes_that_fit(name):
    config = DataConfig(name=name)
    assert config.size[0] % config.patch_size == 0
    assert config.channels in (1, 3)
    assert config.batch_size > 0
    assert config.eval_batch_size >= config.batch_size
    assert DataConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_plain_types_in_and_out(tmp_path):
    config = DataConfig(
        name="folder", root=tmp_path, image_size=[32, 48], mean=[0.1, 0.2, 0.3], std=[1], kinds=["circle"]
    )
    assert config.size == (32, 48)
    assert config.mean == (0.1, 0.2, 0.3)
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["image_size"] == [32, 48]
    assert plain["root"] == str(tmp_path)
    assert DataConfig.from_dict(plain) == config


def test_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig(name="folder", root="~/photos").root == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "cifr10"}, "did you mean 'cifar10'"),
        ({"name": 7}, "data.name"),
        ({"image_size": -1}, "data.image_size"),
        ({"image_size": (8, 0)}, "data.image_size"),
        ({"image_size": (8, 8, 3)}, "data.image_size"),
        ({"channels": -3}, "data.channels"),
        ({"mean": (0.5, 0.5)}, "data.mean: expected 1"),
        ({"std": (0.0,)}, "data.std"),
        ({"crop_pct": 1.5}, "data.crop_pct"),
        ({"crop_mode": "centre"}, "'center'"),
        ({"interpolation": "cubic"}, "'bicubic'"),
        ({"val_fraction": 1.5}, "data.val_fraction"),
        ({"max_bad_fraction": -0.1}, "data.max_bad_fraction"),
        ({"workers": "many"}, "data.workers"),
        ({"resident": "maybe"}, "data.resident"),
        ({"max_images": 0}, "data.max_images"),
        ({"split_seed": "a"}, "data.split_seed"),
        ({"root": ["a"]}, "data.root"),
        ({"objects": 3}, "data.objects"),
        ({"object_scale": 0}, "data.object_scale"),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(VitError) as caught:
        DataConfig(**change)
    assert words in str(caught.value)


def test_bad_keys_are_named():
    with pytest.raises(VitError, match=r"did you mean 'data\.image_size'"):
        DataConfig.from_dict({"imagesize": 8})
    with pytest.raises(VitError, match="expected a dictionary"):
        DataConfig.from_dict([])


# --- digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = open_data(DataConfig())
    bunch = load_digits()
    assert data.class_names == list("0123456789")
    assert data.channels == 1
    assert data.bad_files == []
    assert sum(len(split) for split in data.splits.values()) == 1797
    for split in data.splits.values():
        assert split.native_size == (8, 8)
        pixels = split.array(Preprocessing((8, 8), channels=1))
        for i in (0, 5, len(split) - 1):
            row = int(split.name(i).split("/")[1])
            assert split.labels[i] == bunch.target[row]
            assert np.array_equal(pixels[i, :, :, 0], np.round(bunch.images[row] * 255 / 16))
            assert np.array_equal(np.asarray(split.image(i)), pixels[i, :, :, 0])


def test_splits_share_no_image_and_hold_their_share():
    data = open_data(DataConfig())
    rows = rows_of(data)
    assert not rows["train"] & rows["val"]
    assert not rows["train"] & rows["test"]
    assert not rows["val"] & rows["test"]
    assert len(rows["val"]) == round(0.1 * 1797)
    assert len(rows["test"]) == round(0.2 * 1797)
    for counts in data.counts().values():
        assert np.ptp(counts / counts.sum()) < 0.03


def test_the_split_moves_with_its_own_seed_only():
    assert rows_of(open_data(DataConfig())) == rows_of(open_data(DataConfig()))
    assert rows_of(open_data(DataConfig(split_seed=1)))["test"] != rows_of(open_data(DataConfig()))["test"]


def test_no_held_out_part_where_none_is_asked_for():
    data = open_data(DataConfig(val_fraction=0.0, test_fraction=0.0))
    assert [len(data.splits[name]) for name in SPLITS] == [1797, 0, 0]


def test_source_reopens_the_same_data(tmp_path):
    data = open_data(DataConfig(split_seed=3, val_fraction=0.2, max_images=200))
    again = open_data(DataConfig.from_dict(json.loads(json.dumps(data.source))))
    assert rows_of(again) == rows_of(data)
    assert again.class_names == data.class_names
    assert all(len(split) <= 200 for split in data.splits.values())


def test_max_images_is_stratified():
    data = open_data(DataConfig(max_images=50))
    assert data.counts()["train"].tolist() == [5] * 10
    assert [len(data.splits[name]) for name in SPLITS] == [50, 50, 50]


# --- Fashion-MNIST


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def garments(folder, train=60, test=20, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        arrays[stem] = images, labels
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return arrays


@pytest.mark.parametrize("layout", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_files_that_are_there(tmp_path, layout, packed):
    arrays = garments(tmp_path / layout, packed=packed)
    data = open_data(DataConfig(name="fashion_mnist", root=str(tmp_path), download=False))
    assert data.class_names[0] == "T-shirt/top"
    assert data.class_names[9] == "Ankle boot"
    test = data.splits["test"]
    assert np.array_equal(test.array(Preprocessing((28, 28), channels=1))[:, :, :, 0], arrays["t10k"][0])
    assert np.array_equal(test.labels, arrays["t10k"][1])
    rows = rows_of(data)
    assert len(rows["train"] | rows["val"]) == 60
    assert len(rows["val"]) == 6
    assert not (rows["train"] | rows["val"]) & rows["test"]


def test_fashion_mnist_in_debians_layout(tmp_path, monkeypatch):
    from vit.data import small_sets

    garments(tmp_path / "fashion-mnist")
    monkeypatch.setattr(small_sets, "DEBIAN_FASHION", tmp_path / "fashion-mnist")
    data = open_data(DataConfig(name="fashion_mnist", download=False))
    assert len(data.splits["test"]) == 20
    # but never where another folder was named
    with pytest.raises(VitError, match=r"train-images-idx3-ubyte\.gz"):
        open_data(DataConfig(name="fashion_mnist", root=str(tmp_path / "elsewhere"), download=False))


def test_the_real_fashion_mnist_where_it_is_installed():
    from vit.data.small_sets import DEBIAN_FASHION

    if not DEBIAN_FASHION.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = open_data(DataConfig(name="fashion_mnist", download=False))
    assert [len(data.splits[name]) for name in SPLITS] == [54_000, 6_000, 10_000]
    assert data.counts()["train"].tolist() == [5_400] * 10
    assert data.counts()["test"].tolist() == [1_000] * 10
    whole = open_data(DataConfig(name="fashion_mnist", download=False, val_fraction=0.0))
    mean, std = statistics(whole.splits["train"], Preprocessing((28, 28), channels=1))
    assert np.allclose((mean[0], std[0]), (0.2860, 0.3530), atol=1e-4)  # the figures everyone uses


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-10], lambda b: b"", lambda b: gzip.compress(b"nothing"), lambda b: b"x" + b]
)
def test_damaged_files_are_named(tmp_path, damage):
    garments(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VitError, match="t10k-images-idx3-ubyte"):
        open_data(DataConfig(name="fashion_mnist", root=str(tmp_path)))


def test_files_that_do_not_belong_together(tmp_path):
    garments(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(59))))
    with pytest.raises(VitError, match="train files"):
        open_data(DataConfig(name="fashion_mnist", root=str(tmp_path)))


# --- statistics


def test_statistics_are_exact():
    pixels = np.random.default_rng(1).integers(0, 256, (700, 5, 6, 3), dtype=np.uint8)
    split = Split(np.zeros(700), ArrayImages(pixels, "a"), 3, native_size=(5, 6))
    mean, std = statistics(split, Preprocessing((5, 6)))
    exact = pixels.reshape(-1, 3).astype(np.float64) / 255
    assert np.allclose(mean, exact.mean(axis=0), rtol=0, atol=1e-12)
    assert np.allclose(std, exact.std(axis=0), rtol=0, atol=1e-12)
    assert all(type(value) is float for value in (*mean, *std))


def test_statistics_of_files_are_exact_too(tmp_path, picture):
    root = tmp_path / "photos"
    for k in range(80):
        folder = root / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(10 + k % 3, 12, k).save(folder / f"{k}.png")
    data = open_data(DataConfig(name="folder", root=str(root), val_fraction=0.0, test_fraction=0.0))
    train = data.splits["train"]
    preprocessing = Preprocessing((8, 8))
    mean, std = statistics(train, preprocessing)
    exact = train.array(preprocessing).reshape(-1, 3).astype(np.float64) / 255
    assert np.allclose(mean, exact.mean(axis=0), rtol=0, atol=1e-12)
    assert np.allclose(std, exact.std(axis=0), rtol=0, atol=1e-12)


def test_large_images_of_one_size_are_not_all_held(monkeypatch):
    from vit.data import catalogue

    pixels = np.random.default_rng(1).integers(0, 256, (300, 5, 6, 3), dtype=np.uint8)
    split = Split(np.zeros(300), ArrayImages(pixels, "a"), 3, native_size=(5, 6))
    exact = statistics(split, Preprocessing((5, 6)))
    monkeypatch.setattr(catalogue, "_EXACT_BYTES", 100)
    monkeypatch.setattr(Split, "array", lambda *a, **k: pytest.fail("held"))
    assert statistics(split, Preprocessing((5, 6))) == exact
    monkeypatch.setattr(catalogue, "_SAMPLE", 50)
    sampled = statistics(split, Preprocessing((5, 6)))
    assert sampled != exact
    assert np.allclose(sampled, exact, atol=0.02)


def test_statistics_are_of_what_the_model_sees():
    pixels = np.zeros((4, 10, 20, 3), dtype=np.uint8)
    pixels[:, :, 5:15] = 200
    split = Split(np.zeros(4), ArrayImages(pixels, "a"), 3, native_size=(10, 20))
    mean, std = statistics(split, Preprocessing((10, 10)))
    assert mean == (200 / 255,) * 3
    assert std == (1 / 255,) * 3  # a constant picture must not be divided by nothing


def test_statistics_of_many_files_are_sampled(monkeypatch):
    class Drawn:
        def __init__(self):
            self.seen = []

        def read(self, i, channels, target):
            self.seen.append(i)
            return np.full((2, 2, 3), i % 256, dtype=np.uint8)

        def name(self, i):
            return str(i)

    first, second = Drawn(), Drawn()
    results = [statistics(Split(np.zeros(10_000), images, 3), Preprocessing((2, 2))) for images in (first, second)]
    assert len(set(first.seen)) == 4096
    assert sorted(first.seen) == sorted(second.seen)
    assert results[0] == results[1]
    assert abs(results[0][0][0] - 0.5) < 0.02


def test_no_statistics_of_nothing():
    data = open_data(DataConfig(val_fraction=0.0))
    with pytest.raises(VitError, match=r"data\.mean"):
        statistics(data.splits["val"], Preprocessing((8, 8), channels=1))


def test_preprocessing_is_measured_on_train_or_taken():
    config = DataConfig(image_size=8)
    data = open_data(config)
    measured = preprocessing_for(config, data)
    mean, std = statistics(data.splits["train"], Preprocessing((8, 8), channels=1))
    assert (measured.mean, measured.std) == (mean, std)
    given = preprocessing_for(DataConfig(mean=(0.25,), std=(0.5,), image_size=16, crop_pct=0.5), data)
    assert given == Preprocessing((16, 16), 1, (0.25,), (0.5,), crop_pct=0.5)
    half = preprocessing_for(DataConfig(mean=(0.25,), image_size=8), data)
    assert (half.mean, half.std) == ((0.25,), std)


# --- a trained model's classes


def test_classes_are_matched_by_name():
    plain = open_data(DataConfig())
    names = [str(digit) for digit in (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)]
    turned = open_data(DataConfig(), class_names=names)
    assert turned.class_names == names
    for name in SPLITS:
        assert np.array_equal(turned.splits[name].labels, 9 - plain.splits[name].labels)
    assert rows_of(turned) == rows_of(plain)


def test_a_model_may_know_more_classes(caplog):
    caplog.set_level(logging.WARNING, "vit")
    data = open_data(DataConfig(), class_names=["ten", *map(str, range(10))])
    assert data.splits["test"].labels.min() == 1
    assert "'ten'" in caplog.text


def test_a_model_that_knows_fewer_is_refused_with_the_difference():
    with pytest.raises(VitError) as caught:
        open_data(DataConfig(), class_names=["0", "1", "2", "3", "4", "5", "6", "7", "eight", "9"])
    assert "does not know '8'" in str(caught.value)
    assert "does not have 'eight'" in str(caught.value)


def test_a_model_with_a_name_twice_is_refused():
    with pytest.raises(VitError, match="several classes called '7'"):
        open_data(DataConfig(), class_names=[*map(str, range(10)), "7"])


def test_object_labels_are_matched_too():
    config = DataConfig(name="shapes", train_images=12, val_images=0, test_images=0, clutter=1)
    plain = open_data(config)
    names = sorted(plain.class_names)
    turned = open_data(config, class_names=names)
    before, after = plain.splits["train"].object_labels, turned.splits["train"].object_labels
    assert (after[:, 1] == -1).all()
    for old, new in zip(before[:, 0], after[:, 0], strict=True):
        assert plain.class_names[old] == names[new]


def test_counts_and_the_log(caplog):
    caplog.set_level(logging.INFO, "vit")
    open_data(DataConfig())
    assert "digits: 1,258 train, 180 val, 359 test images in 10 classes" in caplog.text


def test_counts_cover_every_class():
    data = ImageData(
        "a", ["x", "y", "z"], {"train": Split(np.array([2, 2]), ArrayImages(np.zeros((2, 1, 1, 3)), "a"), 3)}
    )
    assert data.counts()["train"].tolist() == [0, 0, 2]


# --- what it costs


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import vit.data.decode, vit.data.preprocess; "
        "light = [m for m in ('torch', 'torchvision', 'sklearn', 'scipy', 'pyarrow', 'rich') if m in sys.modules]; "
        "import vit.data.catalogue; vit.data.catalogue.DataConfig(); "
        "heavy = [m for m in ('torch', 'torchvision', 'sklearn', 'pyarrow', 'timm', 'hydra') if m in sys.modules]; "
        "print(light, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[] []"
