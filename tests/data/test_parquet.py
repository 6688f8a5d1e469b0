"""Images in Parquet: layouts, columns, class names, bad rows, and files larger than memory."""

import builtins
import io
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from vit.data import parquet as room
from vit.data.catalogue import DataConfig, open_data, preprocessing_for
from vit.data.dataset import SPLITS
from vit.data.preprocess import Preprocessing
from vit.errors import VitError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value, size=(6, 9)):
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def features(names, image="image", label="label"):
    kind = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    return {b"huggingface": json.dumps({"info": {"features": {image: {"_type": "Image"}, label: kind}}}).encode()}


def write(
    path, labels, *, start=0, images=None, names=None, plain=False, label_type=None, rows=7, columns=None, extra=None
):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png(start + k) for k in range(len(labels))] if images is None else images
    column = pa.array(images, pa.binary()) if plain else pa.array([{"bytes": b, "path": "x"} for b in images], IMAGE)
    image, label = columns or ("image", "label")
    table = pa.table({image: column, label: pa.array(labels, label_type), **(extra or {})})
    if names is not None:
        table = table.replace_schema_metadata(features(names, image, label))
    pq.write_table(table, path, row_group_size=rows)
    return path


def opened(root, class_names=None, **keys):
    return open_data(DataConfig(name="parquet", root=str(root), **keys), class_names)


def refused(root, class_names=None, **keys):
    with pytest.raises(VitError) as caught:
        opened(root, class_names, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(split):
    """The number written into each image."""
    found = [split.image(i).getpixel((0, 0)) for i in range(len(split))]
    return [red + 256 * green for red, green, _ in found]


def test_one_file_is_split_in_three(tmp_path):
    path = write(tmp_path / "all.parquet", [k % 3 for k in range(60)], names=["x", "y", "z"])
    data = opened(path)
    assert data.class_names == ["x", "y", "z"]
    assert [len(data.splits[name]) for name in SPLITS] == [42, 6, 12]
    numbers = [value for split in data.splits.values() for value in values(split)]
    assert sorted(numbers) == list(range(60))
    for split in data.splits.values():
        assert [value % 3 for value in values(split)] == split.labels.tolist()
    assert data.splits["train"].name(0).startswith(f"{path}, row ")


def test_shards_in_a_folder(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1] * 10, names=["a", "b"])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 0] * 10, names=["a", "b"], start=100)
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [0, 1], names=["a", "b"], start=200)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 1, 0], names=["a", "b"], start=300)
    data = opened(tmp_path)
    assert values(data.splits["train"]) == [*range(20), *range(100, 120)]
    assert data.splits["train"].labels.tolist() == [0, 1] * 10 + [1, 0] * 10
    assert values(data.splits["val"]) == [200, 201]
    assert values(data.splits["test"]) == [300, 301, 302]
    assert data.splits["train"].name(25).endswith("train-00001-of-00002.parquet, row 5")


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("mnist-train.parquet", "mnist_test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train-00000-of-00001-a1b2c3.parquet", "test-00000-of-00001-d4e5f6.parquet"),
    ],
)
def test_names_of_splits(tmp_path, names):
    write(tmp_path / names[0], [0, 1] * 10)
    write(tmp_path / names[1], [0, 1], start=50)
    data = opened(tmp_path)
    assert [len(data.splits[name]) for name in SPLITS] == [18, 2, 2]
    assert values(data.splits["test"]) == [50, 51]


def test_files_of_no_split_are_one_pool(tmp_path):
    for k in range(3):
        write(tmp_path / f"part{k}.parquet", [0, 1] * 10, start=20 * k)
    assert [len(opened(tmp_path).splits[name]) for name in SPLITS] == [42, 6, 12]
    write(tmp_path / "train.parquet", [0, 1])
    assert "belongs to no split" in refused(tmp_path)


def test_missing_shards_are_reported(tmp_path, caplog):
    write(tmp_path / "train-00000-of-00003.parquet", [0, 1] * 10)
    with caplog.at_level(logging.WARNING, "vit"):
        opened(tmp_path)
    assert "1 of 3 files are there" in caplog.text


# --- columns and labels


@pytest.mark.parametrize("label_type", [pa.int8(), pa.int64(), pa.uint16(), pa.bool_()])
def test_numbers_as_labels(tmp_path, label_type):
    labels = [bool(k % 2) if label_type == pa.bool_() else k % 2 for k in range(20)]
    data = opened(write(tmp_path / "a.parquet", labels, label_type=label_type))
    assert data.class_names == (["False", "True"] if label_type == pa.bool_() else ["0", "1"])


def test_numbers_are_in_their_order(tmp_path):
    data = opened(write(tmp_path / "a.parquet", [10, 2, 7] * 10))
    assert data.class_names == ["2", "7", "10"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=["text", "large", "dictionary"],
)
def test_texts_as_labels(tmp_path, kind):
    data = opened(write(tmp_path / "a.parquet", ["pear", "fig"] * 10, label_type=kind))
    assert data.class_names == ["fig", "pear"]
    assert all(
        ("pear", "fig")[v % 2] == data.class_names[k]
        for v, k in zip(values(data.splits["train"]), data.splits["train"].labels, strict=True)
    )


def test_plain_bytes_as_images(tmp_path):
    data = opened(write(tmp_path / "a.parquet", [0, 1] * 10, plain=True), val_fraction=0.0, test_fraction=0.0)
    assert values(data.splits["train"]) == list(range(20))


def test_columns_are_found_or_asked_for(tmp_path):
    extra = {"id": pa.array(range(20)), "split": pa.array(["x"] * 20)}
    found = write(tmp_path / "a.parquet", [0, 1] * 10, extra=extra)
    assert opened(found).class_names == ["0", "1"]
    odd = write(tmp_path / "b.parquet", [0, 1] * 10, columns=("foto", "breed"), extra=extra)
    message = refused(odd)
    assert "several columns of labels" in message
    assert "data.label_column" in message
    assert "breed" in message
    assert opened(odd, label_column="breed", image_column="foto").class_names == ["0", "1"]
    assert "did you mean 'breed'" in refused(odd, label_column="bred")
    assert "data.image_column='breed'" in refused(odd, image_column="breed")
    described = write(tmp_path / "c.parquet", [0, 1] * 10, columns=("foto", "breed"), extra=extra, names=["a", "b"])
    assert opened(described).class_names == ["a", "b"]


def test_columns_that_are_not_there(tmp_path):
    pq.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "a.parquet")
    assert "no column of images; its columns are x" in refused(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": pa.array([b"x"], pa.binary())}), tmp_path / "b.parquet")
    assert "no column of labels" in refused(tmp_path / "b.parquet")
    write(tmp_path / "c" / "train-0.parquet", [0, 1])
    write(tmp_path / "c" / "train-1.parquet", [0, 1], columns=("image", "klass"))
    assert "has no column 'label'" in refused(tmp_path / "c")


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b'{"info": {"features": 3}}', b'{"info": {"features": {"label": 3}}}']
)
def test_descriptions_that_make_no_sense_are_passed_over(tmp_path, metadata):
    path = write(tmp_path / "a.parquet", [0, 1] * 10)
    table = pq.read_table(path).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, path)
    assert opened(path).class_names == ["0", "1"]


def test_labels_outside_the_class_names(tmp_path):
    assert "a.parquet: label 2, but there are 2 class names" in refused(
        write(tmp_path / "a.parquet", [0, 1, 2], names=["x", "y"])
    )


def test_missing_labels(tmp_path, caplog):
    assert "no label" in refused(write(tmp_path / "a.parquet", [0, None, 1] * 5))
    assert "no label" in refused(write(tmp_path / "b.parquet", [0, -1, 1] * 5, names=["x", "y"]))
    write(tmp_path / "c" / "train.parquet", [0, 1] * 10, names=["x", "y"])
    write(tmp_path / "c" / "test.parquet", [-1] * 5, names=["x", "y"])
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(tmp_path / "c")
    assert "the test split has no labels" in caplog.text
    assert sum(len(split) for split in data.splits.values()) == 20


def test_one_class_map_for_all_splits(tmp_path):
    write(tmp_path / "train.parquet", ["a", "b", "c"] * 5)
    write(tmp_path / "test.parquet", ["c", "a"], start=50)
    assert opened(tmp_path).splits["test"].labels.tolist() == [2, 0]
    write(tmp_path / "test.parquet", ["c", "z"], start=50)
    assert "test has 'z'" in refused(tmp_path)


def test_each_file_numbers_its_classes_as_it_says(tmp_path):
    """One class map, train's: the same number may mean another class in a file that was made on its own."""
    write(tmp_path / "train-0.parquet", [0, 1, 2] * 5, names=["ant", "bee", "cat"])
    write(tmp_path / "train-1.parquet", [0, 1], start=20, names=["cat", "ant"])
    write(tmp_path / "test.parquet", [0, 1, 2], start=50, names=["cat", "ant", "bee"])
    data = opened(tmp_path, val_fraction=0.0)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.splits["train"].labels.tolist() == [0, 1, 2] * 5 + [2, 0]
    assert data.splits["test"].labels.tolist() == [2, 0, 1]
    assert values(data.splits["test"]) == [50, 51, 52]
    write(tmp_path / "test.parquet", [0, 1], names=["dog", "ant"])
    assert "test has 'dog'" in refused(tmp_path)
    write(tmp_path / "test.parquet", [0, 2], names=["cat", "ant"])
    assert "test.parquet: label 2, but there are 2 class names" in refused(tmp_path)
    write(tmp_path / "test.parquet", ["ant", "bee"])
    assert "test.parquet: label 'ant', but there are 3 class names" in refused(tmp_path)


def test_class_names_that_repeat_are_told_apart(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 2] * 5, names=["crane", "bee", "crane"])
    data = opened(tmp_path / "train.parquet", val_fraction=0.0, test_fraction=0.0)
    assert data.class_names == ["crane (0)", "bee", "crane (2)"]
    assert data.splits["train"].labels.tolist() == [0, 1, 2] * 5


def test_a_trained_model_brings_its_classes(tmp_path):
    write(tmp_path / "test.parquet", ["c", "a"], start=50)
    assert "train" in refused(tmp_path)
    data = opened(tmp_path, ["b", "c", "a"])
    assert data.splits["test"].labels.tolist() == [1, 2]
    assert "does not know 'c'" in refused(tmp_path, ["b", "a"])


# --- rows and files that are broken


def test_bad_rows_are_left_out_and_named(tmp_path, encoded, picture):
    images = [png(k) for k in range(100)]
    images[5], images[40], images[77] = None, b"", encoded(picture(40, 40))[:-200]
    data = opened(write(tmp_path / "a.parquet", [0, 1] * 50, images=images), max_bad_fraction=0.05)
    reasons = {int(path.rpartition(" ")[2]): reason for path, reason in data.bad_files}
    assert set(reasons) == {5, 40, 77}
    assert "no image bytes" in reasons[5]
    assert reasons[40] == "empty file"
    assert "truncated" in reasons[77]
    assert sorted(v for split in data.splits.values() for v in values(split)) == sorted(set(range(100)) - {5, 40, 77})
    assert "3 of 100" in refused(tmp_path / "a.parquet")


def test_the_scan_is_remembered(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [0, 1] * 10)
    opened(path)
    monkeypatch.setattr(room, "measure", lambda *a, **k: pytest.fail("looked at again"))
    opened(path)
    monkeypatch.undo()
    write(path, [0, 1] * 11)
    assert sum(len(split) for split in opened(path).splits.values()) == 22


@pytest.mark.parametrize("data", [b"", b"PAR1", b"nothing at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_files_that_are_no_parquet(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    assert "cannot be read as a Parquet file" in refused(tmp_path / "a.parquet")


def test_a_truncated_file(tmp_path):
    path = write(tmp_path / "a.parquet", [0, 1] * 10)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as a Parquet file" in refused(path)


def test_a_file_damaged_inside(tmp_path):
    path = write(tmp_path / "a.parquet", [0, 1] * 500, rows=100)
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(4).column(2)
    assert column.path_in_schema == "label"
    for name, damaged in (("label", 2), ("image.bytes", 0)):
        column = pq.ParquetFile(path).metadata.row_group(4).column(damaged)
        assert column.path_in_schema == name
        start = column.dictionary_page_offset or column.data_page_offset
        path.write_bytes(
            whole[:start] + bytes(column.total_compressed_size) + whole[start + column.total_compressed_size :]
        )
        assert "a.parquet cannot be read as a Parquet file" in refused(path)
        path.write_bytes(whole)


def test_nothing_there(tmp_path):
    with pytest.raises(VitError, match=r"data\.root=PATH"):
        open_data(DataConfig(name="parquet"))
    assert "no such file" in refused(tmp_path / "nothing")
    assert "no .parquet files" in refused(tmp_path)
    assert "no images with labels" in refused(write(tmp_path / "a.parquet", [], label_type=pa.int64()))


def test_without_pyarrow(tmp_path, monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert "pip install" in refused(tmp_path)


# --- memory


def test_more_than_memory_is_read_by_row_groups(tmp_path, monkeypatch, caplog):
    write(tmp_path / "train-0.parquet", [0, 1] * 40, rows=5)
    write(tmp_path / "train-1.parquet", [0, 1] * 40, rows=5, start=80)
    monkeypatch.setattr(room, "total_memory", lambda: 1000)
    with caplog.at_level(logging.WARNING, "vit"):
        data = opened(tmp_path, val_fraction=0.0, test_fraction=0.0)
    assert "does not fit in memory" in caplog.text
    train = data.splits["train"]
    order = np.random.default_rng(0).permutation(160)
    assert values(train.subset(order)) == order.tolist()
    assert len(train.images._cache) <= 8
    assert train.array(Preprocessing((6, 9)))[:, 0, 0, 0].tolist() == list(range(160))


def test_sent_to_another_process(tmp_path):
    data = opened(write(tmp_path / "a.parquet", [0, 1] * 100), val_fraction=0.0, test_fraction=0.0)
    train = data.splits["train"]
    values(train)
    sent = pickle.dumps(train)
    assert len(sent) < 20_000
    assert values(pickle.loads(sent).subset([3, 150])) == [3, 150]


def test_images_of_one_size_are_one_array(tmp_path):
    data = opened(write(tmp_path / "a.parquet", [0, 1] * 30))
    train = data.splits["train"]
    assert train.native_size == (6, 9)
    whole = train.array(Preprocessing((6, 9)), keep=True)
    assert whole.shape == (len(train), 6, 9, 3)
    assert whole[:, 0, 0, 0].tolist() == values(train)
    assert train.array(Preprocessing((6, 9))) is whole
    images = [png(k, (6 + k % 2, 9)) for k in range(60)]
    assert opened(write(tmp_path / "b.parquet", [0, 1] * 30, images=images)).splits["train"].native_size is None


def test_the_real_cifar10(shared_data):
    root = shared_data / "cifar10"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    config = DataConfig(
        name="parquet", root=str(root / "test-00000-of-00001.parquet"), image_size=32, test_fraction=0.5
    )
    data = open_data(config)
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    assert [len(data.splits[name]) for name in SPLITS] == [4000, 1000, 5000]
    assert data.counts()["test"].tolist() == [500] * 10
    assert data.splits["train"].native_size == (32, 32)
    preprocessing = preprocessing_for(config, data)
    assert np.allclose(preprocessing.mean, (0.494, 0.485, 0.450), atol=0.02)
    test = data.splits["test"]
    whole = test.array(preprocessing)
    for i in (0, 123, 4999):
        assert np.array_equal(whole[i], np.asarray(test.image(i)))
