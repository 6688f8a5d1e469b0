"""An ONNX file without its weights: the outline says what the whole says, and no bytes make the reader fail oddly."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vit.inference.onnx_backend import open_session
from vit.inference.onnx_file import SMALLEST, read_outline


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A file with a large and a small tensor and metadata: y = x @ large + small."""
    random = np.random.default_rng(0)
    arrays = {"large": random.standard_normal((16, 32), dtype=np.float32), "small": np.arange(32, dtype=np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "large"], ["z"]), helper.make_node("Add", ["z", "small"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", n]) for name, n in (("x", 16), ("y", 32))]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"vit": "größe", "empty": ""})
    path = tmp_path_factory.mktemp("file") / "small.onnx"
    onnx.save(model, path)
    return path


def test_only_the_weights_are_left_out(small_bundle):
    path = small_bundle / "model.onnx"
    whole, content = onnx.load(path), path.read_bytes()
    message, metadata = read_outline(path)
    outline = onnx.load_model_from_string(message)
    assert len(message) < len(content) / 2
    assert metadata == {entry.key: entry.value for entry in whole.metadata_props}
    large = 0
    for own, other in zip(outline.graph.initializer, whole.graph.initializer, strict=True):
        if own.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in own.external_data}
            start, length = int(place["offset"]), int(place["length"])
            assert place["location"] == path.name
            assert content[start : start + length] == other.raw_data
            assert len(other.raw_data) > SMALLEST / 2
            large += 1
            own.data_location = TensorProto.DEFAULT
            del own.external_data[:]
            own.ClearField("data_location")
            own.raw_data = other.raw_data
    assert large > 10
    assert outline == whole


def test_the_session_is_that_of_the_whole_file(small_bundle, monkeypatch):
    path = small_bundle / "model.onnx"
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    given_to = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: given_to.append(a[0]) or real(*a, **k))
    (logits,) = open_session(path).run(None, {"image": images})
    assert [type(each) for each in given_to] == [bytes]  # at the first attempt, from the outline
    (expected,) = real(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": images})
    np.testing.assert_array_equal(logits, expected)


def test_a_runtime_that_takes_no_outline_reads_the_file(small_bundle, monkeypatch):
    real = onnxruntime.InferenceSession

    def older(model, *given, **more):
        if isinstance(model, bytes):
            raise RuntimeError("external data")
        return real(model, *given, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", older)
    assert open_session(small_bundle / "model.onnx").get_outputs()[0].name == "logits"


def test_the_current_folder_may_be_anywhere(small_bundle, monkeypatch):
    monkeypatch.chdir(small_bundle)
    session = open_session("model.onnx")
    monkeypatch.chdir("/")
    assert session.run(None, {"image": np.zeros((1, 3, 32, 32), np.float32)})[0].shape == (1, 5)


def test_weights_that_are_elsewhere_stay_there(small_file, tmp_path):
    whole = onnx.load(small_file)
    onnx.save(whole, tmp_path / "x.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    message, _ = read_outline(tmp_path / "x.onnx")
    assert onnx.load_model_from_string(message) == onnx.load(tmp_path / "x.onnx", load_external_data=False)


def test_metadata_need_not_be_ascii(small_file):
    assert read_outline(small_file)[1] == {"vit": "größe", "empty": ""}


@given(st.data())
def test_damaged_files_are_refused_or_read(small_file, tmp_path_factory, data):
    """Whatever the bytes, the reader gives an outline or ValueError; offsets never lie outside the file."""
    content = bytearray(small_file.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "changed", "any"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "changed":
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    else:
        content = data.draw(st.binary(max_size=64))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content)
    try:
        message, _ = read_outline(path)
    except ValueError:
        return
    try:
        outline = onnx.load_model_from_string(message)
    except Exception:  # deeper down it is for the runtime to read
        return
    for tensor in outline.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        if places.get("location") == path.name and places.get("offset", "").isdecimal():
            assert int(places["offset"]) + int(places["length"]) <= len(content)


def test_what_is_not_there(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        read_outline(tmp_path / "none.onnx")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        read_outline(tmp_path / "empty")
