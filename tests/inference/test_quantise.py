"""An ONNX file in integers: what is in it, what it says it costs, and when it is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from vit.data.catalogue import DataConfig, open_data, preprocessing_for
from vit.errors import VitError
from vit.explain.with_rollout import WithRollout
from vit.inference import quantise as module
from vit.inference import sample
from vit.inference.description import Description
from vit.inference.export import export_onnx
from vit.inference.loading import load, load_torch
from vit.inference.onnx_backend import OnnxBackend, open_session
from vit.inference.quantise import quantise
from vit.inference.sample import Sample, to_compare, to_quantise
from vit.model import VisionTransformer

CONFIG = DataConfig(name="digits")


@pytest.fixture(scope="module")
def data():
    return open_data(CONFIG)


@pytest.fixture(scope="module")
def classifier(data) -> tuple[VisionTransformer, Description]:
    """A model that tells digits apart, trained for seconds."""
    preprocessing = preprocessing_for(CONFIG, data)
    images = torch.from_numpy(preprocessing.normalise(data.splits["train"].array(preprocessing)))
    labels = torch.from_numpy(data.splits["train"].labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=16, patch_size=4, num_classes=10, in_channels=1, width=64, heads=4, depth=2, pool="mean"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(150):
            rows = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    return model, Description(model.architecture, data.class_names, preprocessing, data=CONFIG.to_dict())


@pytest.fixture(scope="module")
def files(classifier, tmp_path_factory):
    """The float32 file, that in integers, and its figures."""
    model, description = classifier
    folder = tmp_path_factory.mktemp("int8")
    export_onnx(folder / "float.onnx", model, description, with_rollout=WithRollout)
    figures = quantise(folder / "int8.onnx", folder / "float.onnx", *to_quantise(description))
    return folder / "float.onnx", folder / "int8.onnx", figures


def test_the_figures_are_those_of_the_test_split(files, data, classifier):
    """Recomputed from the two files and all of the test split, which has fewer images than are measured at most."""
    before, after, figures = files
    split, preprocessing = data.splits["test"], classifier[1].preprocessing
    images = preprocessing.normalise(split.array(preprocessing))
    was, is_ = (OnnxBackend(file).logits(images).argmax(1) for file in (before, after))
    assert figures["images"] == len(split)
    assert figures["agreement"] == pytest.approx((was == is_).mean())
    assert figures["top1"] == pytest.approx((is_ == split.labels).mean())
    assert figures["top1_float32"] == pytest.approx((was == split.labels).mean())
    assert figures["measured_on"] == "digits, test split"
    assert (figures["calibration_images"], figures["calibrated_on"]) == (128, "digits, train split")
    # and they are worth having
    assert figures["top1_float32"] > 0.8
    assert figures["agreement"] > 0.95
    assert 0.97 < figures["rollout_overlap"] <= 1


def test_the_file_carries_its_figures_and_is_a_model(files):
    before, after, figures = files
    assert load(after).description.metrics["int8"] == figures
    assert after.stat().st_size < 0.5 * before.stat().st_size
    with pytest.raises(VitError, match=r"int8\.onnx is in integers, so torch cannot use it: give the run or the bun"):
        load_torch(after)


def test_linear_layers_of_the_blocks_are_integers_of_seven_bits_with_a_scale_each_output(files):
    before, after, _ = files
    message = onnx.load(after)
    onnx.checker.check_model(message)
    held = {each.name: numpy_helper.to_array(each) for each in message.graph.initializer}
    integers = {name: value for name, value in held.items() if value.dtype == np.int8 and value.ndim == 2}
    assert len(integers) == 2 * 4  # qkv, proj, fc1, fc2 of two blocks
    for value in integers.values():
        # two products of an 8-bit activation never overflow 16 bits, as processors without VNNI add them
        assert 2 * 255 * np.abs(value.astype(int)).max() <= 2**15 - 1
    made = {output: node for node in message.graph.node for output in node.output}
    scales = [held[node.input[1]] for node in made.values() if node.input[0] in integers]
    assert sorted(scale.size for scale in scales) == sorted(value.shape[1] for value in integers.values())
    kinds = [node.op_type for node in message.graph.node]
    for kind in ("Conv", "LayerNormalization", "Softmax", "Gemm", "Erf"):  # the rest is as it was
        assert kinds.count(kind) == [node.op_type for node in onnx.load(before).graph.node].count(kind) > 0
    assert not [value for name, value in held.items() if "head" in name and value.dtype != np.float32]
    assert [node.name for node in message.graph.output] == ["logits", "rollout"]


def test_any_batch_size(files):
    images = np.random.default_rng(0).normal(size=(5, 1, 16, 16)).astype(np.float32)
    session = open_session(files[1])
    together = session.run(["logits", "rollout"], {"image": images})
    for i in range(5):
        alone = session.run(["logits", "rollout"], {"image": images[i : i + 1]})
        np.testing.assert_allclose(alone[0][0], together[0][i], rtol=0, atol=1e-4)
        np.testing.assert_allclose(alone[1].sum(), 1, rtol=0, atol=1e-5)


def test_a_file_that_agrees_too_rarely_is_refused(files, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLOOR", 1.01)
    with pytest.raises(VitError, match=r"was not written: in integers the model agrees with float32 on only \d\d\.\d%"):
        quantise(tmp_path / "x.onnx", files[0], *to_quantise(classifier[1]))
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_number_agrees_with_nothing(files, classifier):
    outputs = {"logits": np.array([[0, 1.0], [0, 1.0]], np.float32)}
    broken = {"logits": np.array([[0, 1.0], [0, np.nan]], np.float32)}
    sample = Sample(np.zeros((2, 1, 16, 16), np.float32), np.array([1, 1]), "two")
    assert module._figures(outputs, broken, sample, sample)["agreement"] == 0.5


def test_images_that_are_named_fit_and_where_the_data_is_gone_they_measure(classifier, photographs, tmp_path):
    _, description = classifier
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    fitted, measured = to_quantise(description, [str(folder)])
    assert (len(fitted), fitted.labels) == (20, None)
    assert measured.origin == "digits, test split"
    gone = Description(**{**vars(description), "data": {}})
    fitted, measured = to_quantise(gone, [str(folder)])
    assert (len(fitted), len(measured)) == (10, 10)
    assert measured.labels is None
    assert not {each.tobytes() for each in fitted.images} & {each.tobytes() for each in measured.images}
    with pytest.raises(VitError, match=r"at least 8 images each, not 6 and 6: name more with --calibration"):
        to_quantise(gone, [str(path) for path in photographs])
    with pytest.raises(VitError, match=r"name some with --calibration \(the model does not say which data"):
        to_quantise(gone)
    with pytest.raises(VitError, match="none of the 1 images"):
        to_quantise(gone, [str(folder / "broken.png")])


def test_the_same_images_are_taken_each_time_and_training_images_are_not_measured_on(classifier, data):
    _, description = classifier
    first, second = to_quantise(description), to_quantise(description)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
    only = Description(**{**vars(description), "data": {**description.data, "test_fraction": 0.0, "val_fraction": 0.0}})
    fitted, measured = to_quantise(only)
    assert measured.origin == "digits, train split"
    assert not {each.tobytes() for each in fitted.images} & {each.tobytes() for each in measured.images}
    assert to_compare(description).origin == "digits, test split"
    assert len(to_compare(description)) == 8


def test_nothing_is_downloaded_to_have_images(classifier):
    description = Description(**{**vars(classifier[1]), "data": {"name": "cifar10", "root": "/nowhere"}})
    with pytest.raises(VitError):
        to_compare(description)


def test_figures_are_plain_json(files):
    assert json.loads(json.dumps(files[2])) == files[2]


def test_large_images_are_fewer(classifier, monkeypatch):
    monkeypatch.setattr(sample, "_MAX_BYTES", 20 * 16 * 16 * 4)
    assert [len(part) for part in to_quantise(classifier[1])] == [20, 20]


def test_a_large_data_set_is_not_looked_through_for_a_few_images(classifier, tmp_path, monkeypatch):
    """Which files can be read decides the splits; where training left no memory of it, that would take hours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sample, "_SCAN_LIMIT", 39)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (16, 16), 5 * number).save(tmp_path / "photos" / label / f"{number}.png")
    config = DataConfig(name="folder", root=str(tmp_path / "photos"), image_size=16, channels=1)
    model = VisionTransformer(image_size=16, patch_size=4, num_classes=2, in_channels=1, size="nano")
    preprocessing = classifier[1].preprocessing
    description = Description(model.architecture, ["a", "b"], preprocessing, data=config.to_dict())
    with pytest.raises(VitError, match=r"^40 of its images would have to be looked at first"):
        to_compare(description)
    with pytest.raises(VitError, match=r"name some with --calibration \(40 of its images would have"):
        to_quantise(description)
    (tmp_path / "photos" / "a" / "0.png").unlink()
    assert len(to_compare(description)) == 8  # few enough
    monkeypatch.setattr(sample, "_SCAN_LIMIT", 0)
    assert len(to_compare(description)) == 8  # known, as training would have left it
