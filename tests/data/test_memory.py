"""Images from Python: whatever form they come in, the same data set; whatever is wrong with them, one line."""

from __future__ import annotations

import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from vit.data.catalogue import DataConfig, open_data
from vit.data.memory import gather
from vit.errors import VitError

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (30, 10, 12, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
LABELS = [("cat", "dog", "emu")[i % 3] for i in range(30)]
NUMBERS = [i % 3 for i in range(30)]


class Items(Dataset):
    """A torch data set as people write them."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels = images, labels
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def opened(data, class_names=None, **options):
    found = gather(data)
    return open_data(DataConfig(**{**found.settings(), **options}), class_names, given=found)


def pixels_of(data, channels=3):
    """Every image with its class name, in the order of the splits."""
    return [
        (
            np.asarray(split.image(i)).reshape(*split.sizes[i], -1)[..., :channels].tolist(),
            data.class_names[split.labels[i]],
        )
        for split in data.splits.values()
        for i in range(len(split))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Thirty PNG files."""
    folder = tmp_path_factory.mktemp("files")
    for i, image in enumerate(COLOUR):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


def hub(label=None, images=None):
    images = images or [Image.fromarray(image) for image in COLOUR]
    features = datasets.Features(
        {"img": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog", "emu"])}
    )
    return datasets.Dataset.from_dict({"img": images, "label": NUMBERS}, features=features)


def forms(files):
    tensor = torch.from_numpy(COLOUR)
    floats = tensor.permute(0, 3, 1, 2) / 255
    pillow = [Image.fromarray(image) for image in COLOUR]
    yield "arrays", (COLOUR, LABELS)
    yield "array of labels", (COLOUR, np.array(LABELS))
    yield "channels first", (np.moveaxis(COLOUR, 3, 1), LABELS)
    yield "floating point", (COLOUR / 255, LABELS)
    yield "half precision", ((COLOUR / 255).astype(np.float16), LABELS)
    yield "int64", (COLOUR.astype(np.int64), LABELS)
    yield "tensor", (tensor, LABELS)
    yield "float tensor", (floats.requires_grad_(), LABELS)
    yield "a list of arrays", (list(COLOUR), LABELS)
    yield "pairs of images", list(zip(pillow, LABELS, strict=True))
    yield "pairs of paths", list(zip(files, LABELS, strict=True))
    yield "paths as text", [(str(path), label) for path, label in zip(files, LABELS, strict=True)]
    yield "encoded", [(path.read_bytes(), label) for path, label in zip(files, LABELS, strict=True)]
    yield "torch", Items(pillow, NUMBERS, ["cat", "dog", "emu"])
    yield "torch with tensors", Items(floats.detach(), torch.tensor(NUMBERS), ["cat", "dog", "emu"])
    yield "a subset", Subset(Items(COLOUR, NUMBERS, ["cat", "dog", "emu"]), range(30))
    yield "Hugging Face", hub()
    yield "Hugging Face for torch", hub().with_format("torch")


def test_every_form_is_the_same_data(files):
    expected = None
    for name, data in forms(files):
        found = opened(data)
        assert {split: len(part) for split, part in found.splits.items()} == {"train": 21, "val": 3, "test": 6}, name
        assert found.class_names == ["cat", "dog", "emu"], name
        if "half" not in name:  # which has no 256 values
            expected = expected or pixels_of(found)
            assert pixels_of(found) == expected, name
        assert found.source["name"] == "memory"
        assert found.source["content"] == gather(data).content, name


def test_they_are_split_as_a_folder_is(files, tmp_path):
    for path, label in zip(files, LABELS, strict=True):
        target = tmp_path / label / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    order = sorted(zip(LABELS, files, strict=True))
    ours = opened([(path, label) for label, path in order], split_seed=3, val_fraction=0.2)
    theirs = open_data(DataConfig(name="folder", root=tmp_path, split_seed=3, val_fraction=0.2))
    assert pixels_of(ours) == pixels_of(theirs)


def test_splits_that_are_given_stay(files):
    parts = {
        "train": (COLOUR[:15], LABELS[:15]),
        "Validation": list(zip(files[15:20], LABELS[15:20], strict=True)),
        "test": Items([Image.fromarray(image).resize((20 + i, 9)) for i, image in enumerate(COLOUR[20:])], LABELS[20:]),
    }
    found = opened(parts)
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 15, "val": 5, "test": 10}
    assert [image for image, _ in pixels_of(found)[:20]] == COLOUR[:20].tolist()
    assert found.splits["test"].image(3).size == (23, 9)
    assert found.splits["val"].name(0) == str(files[15])
    assert found.splits["test"].name(2) == "test/2"
    again = pickle.loads(pickle.dumps(found.splits["test"]))  # for worker processes
    assert again.image(3).tobytes() == found.splits["test"].image(3).tobytes()
    with_test = opened({"train": (COLOUR[:20], LABELS[:20]), "test": (COLOUR[20:], LABELS[20:])})
    assert [len(part) for part in with_test.splits.values()] == [18, 2, 10]  # validation is cut out of train


def test_a_dataset_dict(caplog):
    whole = hub()
    parts = {
        "train": whole.select(range(18)),
        "validation": whole.select(range(18, 24)),
        "test": whole.select(range(24, 30)),
    }
    found = opened(datasets.DatasetDict(parts))
    assert [len(part) for part in found.splits.values()] == [18, 6, 6]
    assert [image for image, _ in pixels_of(found)] == COLOUR.tolist()
    unlabelled = parts["test"].remove_columns("label").add_column("label", [-1] * 6, feature=whole.features["label"])
    found = opened(datasets.DatasetDict({**parts, "test": unlabelled, "extra": parts["test"]}))
    assert len(found.splits["test"]) == 0
    assert "no labels" in caplog.text
    assert "'extra'" in caplog.text


def test_hugging_face_columns():
    texts = hub(datasets.Value("string")).map(lambda row: {"label": f"class {row['label']}"})
    assert opened(texts).class_names == ["class 0", "class 1", "class 2"]
    two = hub().add_column("fine", NUMBERS)
    renamed = two.rename_column("label", "coarse").cast_column("coarse", datasets.Value("int64"))
    with pytest.raises(VitError, match=r"several columns of labels.*data\.label_column"):
        gather(renamed)
    assert gather(renamed, label_column="fine").class_names == ["0", "1", "2"]
    with pytest.raises(VitError, match="no column of images"):
        gather(datasets.Dataset.from_dict({"x": [1, 2], "label": [0, 1]}))
    with pytest.raises(VitError, match="streaming=True"):
        gather(hub().to_iterable_dataset())


def test_hugging_face_images_that_are_broken_or_elsewhere(files, tmp_path):
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:60])
    paths = [str(path) for path in [tmp_path / "broken.png", *files[1:]]]
    with pytest.raises(VitError, match="1 of 30 images cannot be read"):
        opened(hub(images=paths))
    found = opened(hub(images=paths), max_bad_fraction=0.1)
    assert found.bad_files[0][0] == "data/0"
    assert sum(len(part) for part in found.splits.values()) == 29


def test_files_that_are_not_there_are_counted(files):
    pairs = [("nowhere.png", "cat"), *zip(files, LABELS, strict=True)]
    with pytest.raises(VitError, match=r"1 of 31 images cannot be read.*nowhere\.png: no such file"):
        opened(pairs)
    assert len(opened(pairs, max_bad_fraction=0.5).bad_files) == 1


# --- labels


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_of_any_kind_keep_their_order(data):
    kind = data.draw(st.sampled_from(["text", "whole", "bool", "numpy", "torch", "zero-dimensional"]))
    if kind == "text":
        values = data.draw(
            st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, max_size=12)
        )
    elif kind == "bool":
        values = data.draw(st.lists(st.booleans(), min_size=2, max_size=12))
    else:
        values = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=12))
    convert = {
        "numpy": np.array,
        "torch": torch.tensor,
        "zero-dimensional": lambda given: [torch.tensor(each) for each in given],
    }.get(kind, list)
    found = gather((GREY[: len(values)], convert(values)))
    names = [str(value) for value in values]
    if kind == "text":
        from unicodedata import normalize

        names = [normalize("NFC", name) for name in names]
    assert found.labels == {"train": names}
    assert found.class_names == ([str(v) for v in sorted(set(values))] if kind != "text" else sorted(set(names)))


def test_names_that_repeat_get_their_number():
    assert gather(Items(COLOUR, NUMBERS, ["crane", "dog", "crane"])).class_names == ["crane (0)", "dog", "crane (2)"]


def test_an_accent_in_two_spellings_is_one_class():
    assert gather((GREY[:4], ["caf\u00e9", "cafe\u0301", "tea", "tea"])).class_names == ["caf\u00e9", "tea"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cat"] * 29 + [7], "two kinds, 'cat' and 7"),
        ([1] * 29 + [True], "two kinds"),
        (["cat"] * 28 + [None, "dog"], "image 28 has no label"),
        ([1.0, float("nan")] * 15, "label 1.0: expected a text or a whole number"),
        ([float("nan")] * 30, "image 0 has no label"),
        (np.eye(30), r"shape \(30\).*argmax"),
        ([["cat"]] * 30, r"label \['cat'\]"),
        ([b"cat"] * 30, "label b'cat'"),
        (["cat"] * 29, "30 images and 29 labels"),
        (5, "a label for each image, not a int"),
        ("cat", "a label for each image, not a str"),
        (["cat"] * 30, "one class only"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_labels_that_cannot_be(labels, words):
    with pytest.raises(VitError, match=words) as caught:
        opened((GREY, labels))
    assert "\n" not in str(caught.value)


def test_a_class_that_train_lacks():
    with pytest.raises(VitError, match="test has 'emu', which train does not have"):
        opened({"train": (GREY[:4], ["cat", "dog"] * 2), "test": (GREY[4:6], ["cat", "emu"])})
    with pytest.raises(VitError, match="label 3, but there are 3 class names"):
        gather(Items(COLOUR, [3] * 30, ["cat", "dog", "emu"]))


def test_labels_without_names_mean_the_models_classes():
    found = opened((GREY, NUMBERS), ["cat", "dog", "emu"], test_fraction=1.0)
    assert [found.class_names[label] for label in found.splits["test"].labels] == LABELS
    assert len(opened((GREY, LABELS), ["emu", "ant", "dog", "cat"], test_fraction=1.0).splits["test"]) == 30
    with pytest.raises(VitError, match="label 2: the model has 2 classes"):
        opened((GREY, NUMBERS), ["cat", "dog"])
    with pytest.raises(VitError, match="does not know 'emu'"):
        opened((GREY, LABELS), ["cat", "dog"])


# --- pixels


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(5, 20),
    width=st.integers(5, 20),
    channels=st.sampled_from([None, 1, 3, 4]),
    first=st.booleans(),
    kind=st.sampled_from(["uint8", "bool", "float32", "float64", "float16", "bfloat16", "int16", "uint16", "int64"]),
    tensor=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_arrays_of_any_type_and_layout(height, width, channels, first, kind, tensor, seed):
    shape = (4, height, width) if channels is None else (4, height, width, channels)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if kind == "bool":
        values = np.where(values > 127, 255, 0).astype(np.uint8)
    floating = "float" in kind
    exact = kind not in ("float16", "bfloat16")
    given_ = values / 255 if floating else values > 0 if kind == "bool" else values
    given_ = given_.astype("float32" if kind == "bfloat16" else kind)
    if first and channels is not None:
        given_ = np.moveaxis(given_, 3, 1)
    if kind == "bfloat16":
        given_ = torch.from_numpy(np.ascontiguousarray(given_)).bfloat16()
    elif tensor:
        given_ = torch.from_numpy(np.ascontiguousarray(given_))
    found = gather((given_, [0, 1, 0, 1]))
    pixels = found.images.pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (4, height, width, channels or 1)
    assert np.abs(pixels.astype(int) - values.reshape(pixels.shape)).max() <= (0 if exact else 1)
    assert found.settings()["channels"] == {None: 1, 4: 3}.get(channels, channels)
    config = DataConfig(**found.settings())
    assert config.size[0] % config.patch_size == 0
    assert config.size[1] % config.patch_size == 0


def test_many_channels():
    values = RANDOM.integers(0, 256, (6, 20, 24, 7), dtype=np.uint8)
    for images in (values, np.moveaxis(values, 3, 1)):
        data = opened((images, [0, 1] * 3), val_fraction=0, test_fraction=0)
        assert data.channels == 7
        np.testing.assert_array_equal(data.splits["train"].image(2), values[2])


def _nan(count=30):
    images = GREY[:count] / 255
    images[count // 2, 3, 3] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((0, 8, 8)), "the data is empty"),
        (np.zeros((30, 0, 8)), "have no pixels"),
        (np.zeros((30, 8)), r"shape \(30, 8\): expected \(N, H, W\)"),
        (np.zeros((30, 2, 8, 8, 3)), r"shape \(30, 2, 8, 8, 3\)"),
        (np.zeros((30, 3, 9, 3)), r"not plain which axis of \(30, 3, 9, 3\) has the channels"),
        (np.zeros((30, 9, 9, 9)), "not plain which axis"),
        (COLOUR.astype(np.float32), "values from 0 to 255: expected uint8, or 0 to 1; divide by 255"),
        ((COLOUR / 255 - 0.5) / 0.2, "leave out the normalisation"),
        (_nan(), "image 15, holds NaN"),
        (np.full((30, 8, 8), np.inf), "NaN or infinity"),
        (np.full((30, 8, 8), 300), "values from 300 to 300: expected 0 to 255"),
        (np.full((30, 8, 8), -1), "values from -1 to -1"),
        (np.zeros((30, 8, 8), complex), "type complex128"),
        (np.full((30, 8, 8), "x"), "type <U1"),
        (np.full((30, 8, 8), None), "type object"),
        (torch.zeros(30, 8, 8).to_sparse(), "cannot be read as an array"),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_images_that_cannot_be(images, words):
    with pytest.raises(VitError, match=words) as caught:
        gather((images, NUMBERS[: len(images)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "the data is empty"),
        ({}, "keys train, val and test, not none"),
        ({"model.size": "tiny"}, "keys train, val and test, not 'model.size'"),
        ({"val": (GREY, NUMBERS), "valid": (GREY, NUMBERS)}, "two splits called val"),
        (GREY, "an array without labels"),
        ([(GREY[0], 1, 2)], "item 0 of the data is a tuple"),
        ([{"image": GREY[0], "label": 1}], "item 0 of the data is a dict"),
        ([GREY[0]], "item 0 of the data is a ndarray"),
        ([(3, "cat")], "image 0 of the data is a int"),
        ([("a.png", "cat"), (GREY[0], "dog")], "mixes paths and images"),
        (TensorDataset(torch.zeros(3, 8, 8)), "item 0 of the data is a tuple"),
        (3, "a int is no data"),
        (iter([]), "is no data"),
        (object(), "a object is no data"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_is_no_data(data, words):
    with pytest.raises(VitError, match=words) as caught:
        gather(data)
    assert "\n" not in str(caught.value)


def test_a_table_is_told_how():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"path": ["a.png"], "label": ["cat"]})
    with pytest.raises(VitError, match="list\\(zip"):
        gather(table)
    with pytest.raises(VitError, match="1 of 1 images cannot be read"):
        opened((table["path"], table["label"]))


def test_an_item_that_fails_is_named():
    class Broken(Items):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("disk gone")
            return super().__getitem__(i)

    with pytest.raises(VitError, match="item 7 of the data cannot be read: OSError: disk gone"):
        gather(Broken(COLOUR, NUMBERS))


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("vit.data.memory.total_memory", lambda: 2 * COLOUR[:10].nbytes)
    with pytest.raises(VitError, match="more than half of this machine's memory"):
        gather(Items(COLOUR, NUMBERS))


def test_a_pillow_image_that_is_truncated_is_a_bad_image(files):
    images = [Image.open(path) for path in files]
    images[4] = Image.open(io.BytesIO(files[4].read_bytes()[:60]))
    found = opened(list(zip(images, LABELS, strict=True)), max_bad_fraction=0.1)
    assert len(found.bad_files) == 1
    assert "data/4" in found.bad_files[0][0]


def test_pillow_modes_become_one():
    images = [Image.fromarray(GREY[0]), Image.fromarray(COLOUR[1]), Image.fromarray(GREY[2]).convert("I;16")]
    found = opened(list(zip(images * 4, ["a", "b", "a"] * 4, strict=True)))
    assert found.channels == 3
    assert found.splits["train"].image(0).mode == "RGB"
    assert opened(list(zip(images[::2] * 4, ["a", "b"] * 4, strict=True))).channels == 1


# --- the fingerprint


def test_the_fingerprint_is_of_what_is_in_it(files, tmp_path):
    content = gather((COLOUR, LABELS)).content
    assert gather((COLOUR / 255, LABELS)).content == content
    assert gather((torch.from_numpy(COLOUR), np.array(LABELS))).content == content
    changed = COLOUR.copy()
    changed[29, 9, 11, 2] ^= 1
    others = [(changed, LABELS), (COLOUR, ["emu", *LABELS[1:]]), (COLOUR[::-1], LABELS), (COLOUR[:29], LABELS[:29])]
    assert content not in [gather(data).content for data in others]
    pairs = list(zip(files, LABELS, strict=True))
    moved = [(tmp_path / path.name, label) for path, label in pairs]
    for (source, _), (target, _) in zip(pairs, moved, strict=True):
        target.write_bytes(source.read_bytes())
    assert gather(moved).content == gather(pairs).content
    Image.fromarray(changed[29]).save(moved[29][0])
    assert gather(moved).content != gather(pairs).content


def test_other_images_than_those_of_a_run_are_refused():
    found = gather((COLOUR, LABELS))
    config = DataConfig(**found.settings())
    with pytest.raises(VitError, match="not the images and labels that the run was trained on"):
        open_data(config, given=gather((COLOUR[:20], LABELS[:20])))
    with pytest.raises(VitError, match=r"given from Python .*vit\.evaluate\(MODEL, data=\.\.\.\)"):
        open_data(config)
    with pytest.raises(VitError, match="trained on data=digits"):
        open_data(DataConfig(name="digits"), given=found)


def test_their_own_size_is_the_models_where_it_is_small():
    def chosen(*shape):
        return gather((np.zeros((2, *shape), np.uint8), [0, 1])).settings()

    found = chosen(28, 28)
    assert found.pop("content")
    keys = ("name", "image_size", "patch_size", "batch_size", "channels", "workers")
    assert found == dict(zip(keys, ("memory", 28, 4, 128, 1, 0), strict=True))
    assert (chosen(8, 8)["image_size"], chosen(8, 8)["patch_size"]) == (8, 2)
    assert (chosen(30, 65, 3)["image_size"], chosen(30, 65, 3)["patch_size"]) == ([32, 72], 8)
    assert (chosen(256, 256, 3)["image_size"], chosen(256, 256, 3)["patch_size"]) == (224, 16)
