"""A classifier as an object to pass around: it explains its answers, and another process opens it again."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor

import joblib
import numpy as np
import pytest
from PIL import Image

import vit
from vit.cli import main
from vit.errors import VitError


@pytest.fixture(scope="module", params=["onnx", "torch"])
def classifier(request, small_bundle):
    return vit.load(small_bundle, backend=request.param, device="cpu")


def test_an_explanation_is_what_the_command_saves(classifier, small_bundle, photographs, tmp_path):
    for method, target in (("rollout", None), ("relevance", "größe"), ("legrad", 1)):
        out = tmp_path / method
        typed = [] if target is None else ["--target", str(target)]
        arguments = ["explain", small_bundle, photographs[3], "--output", out, "--save-maps", "--method", method]
        assert main([str(each) for each in [*arguments, *typed]]) == 0
        saved = np.load(out / "03.npz")
        found = classifier.explain(photographs[3], method=method, target=target)
        np.testing.assert_array_equal(found.map, saved["map"])
        assert found.map.dtype == np.float32
        assert found.map.shape == (4, 4)
        assert (found.label, found.method) == (str(saved["label"]), method) == (found.label, str(saved["method"]))
        assert found.probability == pytest.approx(float(saved["probability"]), abs=1e-12)
        assert found.label == classifier.description.class_names[found.index]
        np.testing.assert_array_equal(np.asarray(found.overlay()), np.asarray(Image.open(out / "03.png")))


def test_it_explains_what_it_classifies(classifier, photographs):
    results = classifier.classify(photographs)
    for path, result in zip(photographs, results, strict=True):
        found = classifier.explain(path)
        assert (found.label, found.index) == (result.label, result.index)
        assert found.probability == pytest.approx(result.probability, abs=1e-5)


def test_an_explanation_shows_itself(classifier, photographs):
    found = classifier.explain(Image.open(photographs[0]))
    shown = Image.open(io.BytesIO(found._repr_png_()))
    assert shown.width > 2 * found.overlay().width
    assert repr(found.label) in repr(found)
    assert "4 x 4" in repr(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "rolout"}, "did you mean 'rollout'"),
        ({"target": "dgo"}, "did you mean 'dog'"),
        ({"target": 5}, "0 to 4"),
        ({"target": "-1"}, "no class"),
        ({"method": "raw", "layer": 9}, "layer"),
    ],
)
def test_what_cannot_be_explained(classifier, photographs, arguments, words):
    with pytest.raises(VitError, match=words) as caught:
        classifier.explain(photographs[0], **arguments)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_used(classifier, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    for image, words in ((tmp_path / "broken.jpg", "broken.jpg"), (tmp_path / "none.jpg", "no such file")):
        with pytest.raises(vit.ImageError, match=words):
            classifier.explain(image)
    with pytest.raises(vit.ImageError, match="channels last"):
        classifier.explain(np.zeros((3, 32, 32), np.uint8))


def test_a_bare_onnx_file_explains_by_the_weights_in_it(small_bundle, photographs, tmp_path):
    shutil.copy(small_bundle / "model.onnx", tmp_path / "bare.onnx")
    found = vit.load(tmp_path / "bare.onnx").explain(photographs[1])
    want = vit.load(small_bundle, backend="torch").explain(photographs[1])
    np.testing.assert_allclose(found.map, want.map, atol=1e-7)


def test_an_onnx_file_without_weights_for_torch_is_one_line(small_bundle, photographs, tmp_path):
    import onnx

    message = onnx.load(small_bundle / "model.onnx")
    kept = [entry for entry in message.metadata_props if entry.key == "vit"]
    del message.metadata_props[:]
    message.metadata_props.extend(kept)
    onnx.save(message, tmp_path / "bare.onnx")
    classifier = vit.load(tmp_path / "bare.onnx")
    assert classifier.classify(photographs[1])[0].label
    with pytest.raises(VitError, match=r"bare\.onnx .*torch cannot use it"):
        classifier.explain(photographs[1])


# --- pickling


def _labels(classifier, paths):
    return [result.to_dict() for result in classifier.classify(paths)]


def test_a_copy_gives_the_same_answers(classifier, photographs, tmp_path, monkeypatch):
    want = _labels(classifier, photographs[:3])
    classifier.logits(np.zeros((40, 3, 32, 32), np.float32))  # what it has started for itself stays behind
    classifier.explain(photographs[0])
    pickled = pickle.dumps(classifier)
    copied = copy.deepcopy(classifier)
    monkeypatch.chdir(tmp_path)
    for each in (copied, pickle.loads(pickled)):
        assert repr(each) == repr(classifier)
        assert _labels(each, photographs[:3]) == want
        assert each.explain(photographs[0]).label == want[0]["label"]


def test_a_relative_path_is_found_from_another_folder(small_bundle, photographs, tmp_path, monkeypatch):
    shutil.copytree(small_bundle, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(vit.load("model", backend="onnx"))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).classify(photographs[0])[0].label
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(VitError, match=r"cannot read .*model\.onnx"):
        pickle.loads(pickled)


def test_the_way_it_uses_threads_is_pickled(small_bundle):
    many = vit.load(small_bundle, backend="onnx", throughput=True)
    few = vit.load(small_bundle, backend="onnx")
    for each in (many, few):
        backend, again = each._backend, pickle.loads(pickle.dumps(each))._backend
        assert again.threads == backend.threads
        again.ready()
        counts = [found._session.get_session_options().intra_op_num_threads for found in (backend, again)]
        assert counts[0] == counts[1]


def test_other_processes_open_it_again(small_bundle, photographs):
    classifier = vit.load(small_bundle, backend="onnx")
    want = [_labels(classifier, [path]) for path in photographs[:4]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        futures = [pool.submit(classifier.classify, [path]) for path in photographs[:4]]
        assert [[row.to_dict() for row in future.result(timeout=120)] for future in futures] == want
    jobs = (joblib.delayed(classifier.classify)([path]) for path in photographs[:4])
    found = joblib.Parallel(n_jobs=2, timeout=120)(jobs)
    assert [[row.to_dict() for row in rows] for rows in found] == want
