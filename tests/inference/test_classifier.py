"""Answers: right, in order, the same by every backend, batch and neighbour, and never stopped by a bad input."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vit
from vit.data.decode import decode
from vit.errors import VitError
from vit.inference.classifier import Classifier, Flush, InvalidInput, softmax
from vit.inference.loading import load, load_torch
from vit.processors import count_cpus


@pytest.fixture(scope="module")
def onnx(small_bundle) -> Classifier:
    return load(small_bundle, device="cpu", backend="onnx")


@pytest.fixture(scope="module")
def torch_(small_bundle) -> Classifier:
    return load(small_bundle, device="cpu", backend="torch")


def by_hand(small_bundle, path) -> np.ndarray:
    """Probabilities of one file, each step written out, in float64."""
    model, description = load_torch(small_bundle, device="cpu")
    pixels = np.asarray(description.preprocessing.resize(decode(path, channels=3)), dtype=np.float64) / 255
    image = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.double()(image)[0] / 1.5
    return (logits.exp() / logits.exp().sum()).numpy()


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=20), st.floats(0.05, 20))
def test_softmax_is_the_formula(logits, temperature):
    z = np.array(logits, dtype=np.float64) / temperature
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    np.testing.assert_allclose(softmax(np.array(logits), temperature), expected, rtol=1e-12, atol=1e-300)
    assert abs(softmax(np.array(logits), temperature).sum() - 1) < 1e-12


def test_answers_are_those_computed_by_hand(small_bundle, onnx, torch_, photographs):
    for classifier in (onnx, torch_):
        for path, result in zip(photographs, classifier.classify(photographs), strict=True):
            expected = by_hand(small_bundle, path)
            order = np.argsort(-expected)
            assert result.path == str(path)
            assert result.error is None
            assert [one["index"] for one in result.top] == list(order)
            assert [one["label"] for one in result.top] == [classifier.description.class_names[i] for i in order]
            np.testing.assert_allclose([one["probability"] for one in result.top], expected[order], atol=1e-5)
            assert (result.label, result.index, result.probability) == tuple(result.top[0].values())


def test_both_backends_agree_on_real_photographs(small_bundle, onnx, torch_, real_photographs):
    ours, theirs = onnx.classify(real_photographs), torch_.classify(real_photographs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.path, a.error, b.error) == (b.path, None, None)
        by_index = {one["index"]: one["probability"] for one in b.top}
        assert all(abs(one["probability"] - by_index[one["index"]]) < 1e-4 for one in a.top)
    assert len({result.label for result in ours}) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_a_result_does_not_depend_on_batch_or_neighbours(onnx, torch_, photographs, tmp_path, batch_size):
    (tmp_path / "broken.jpg").write_bytes(photographs[0].read_bytes()[:300])
    mixed = list(itertools.chain.from_iterable((path, tmp_path / "broken.jpg") for path in photographs))
    for classifier in (onnx, torch_):
        alone = [classifier.classify([path])[0] for path in photographs]
        together = classifier.classify(mixed, batch_size=batch_size)
        assert [result.path for result in together] == [str(path) for path in mixed]
        assert all(result.error for result in together[1::2])
        for one, other in zip(alone, together[::2], strict=True):
            assert one.index == other.index
            assert abs(one.probability - other.probability) < 1e-6


def test_many_at_once_answer_as_one_does(small_bundle, onnx, photographs):
    """In order, whichever thread is done first; and no more threads than processors compute."""
    many = load(small_bundle, device="cpu", backend="onnx", throughput=True)
    computing, most, lock = 0, 0, threading.Lock()
    real = many._backend.logits

    def logits(images):
        nonlocal computing, most
        with lock:
            computing += 1
            most = max(most, computing)
        time.sleep(0.02 * (len(images) % 2))  # so that later ones overtake
        out = real(images)
        with lock:
            computing -= 1
        return out

    many._backend.logits = logits
    inputs = [photographs[i * i % 12] for i in range(60)]
    for batch_size in (None, 1, 3):
        results = list(many.stream(inputs, batch_size=batch_size))
        assert [result.path for result in results] == [str(path) for path in inputs]
        for one, other in zip(results, onnx.classify(inputs), strict=True):
            assert one.index == other.index
            assert abs(one.probability - other.probability) < 1e-6
    assert most == many._backend.threads == count_cpus()


def test_rows_come_with_their_pixels(onnx, torch_, photographs, tmp_path):
    for classifier in (onnx, torch_):
        (tmp_path / "empty.jpg").touch()
        batches = list(classifier.classify_batches([*photographs, tmp_path / "empty.jpg"]))
        assert sum(len(rows) for rows, _ in batches) == 13
        for rows, results in batches:
            for (path, pixels), result in zip(rows, results, strict=True):
                assert path == result.path
                if isinstance(pixels, str):
                    assert (Path(path).name, pixels, result.error) == ("empty.jpg", "empty file", "empty file")
                else:
                    resize = classifier.description.preprocessing.resize
                    np.testing.assert_array_equal(pixels, resize(decode(path, channels=3)))


def test_a_stream_that_is_left_stops_its_threads(onnx, photographs):
    before = threading.active_count()
    stream = onnx.stream(itertools.cycle(photographs))
    next(stream)
    stream.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_images_may_be_paths_bytes_pillow_images_and_arrays(onnx, photographs):
    image = Image.open(photographs[3])
    inputs = [photographs[3], str(photographs[3]), photographs[3].read_bytes(), image, np.asarray(image)]
    results = onnx.classify(inputs)
    assert [result.path for result in results] == [str(photographs[3])] * 2 + [None] * 3
    assert len({result.probability for result in results}) == 1
    assert onnx.classify(photographs[3]) == results[:1]
    assert onnx.classify(str(photographs[3])) == results[:1]
    assert onnx.classify(np.asarray(image)) == results[4:]


def test_bad_inputs_are_rows(onnx, photographs, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    odd = [tmp_path / "empty.jpg", tmp_path / "none.jpg", tmp_path, tmp_path / "text.jpg", None, 3, np.zeros(4), b""]
    results = onnx.classify([*odd, photographs[0]])
    assert all(result.error and result.label is None and result.top == [] for result in results[:-1])
    assert results[-1].error is None
    assert results[1].to_dict() == {"path": str(tmp_path / "none.jpg"), "error": "no such file"}


def test_top_k_beyond_the_classes_gives_all(onnx, photographs):
    assert len(onnx.classify(photographs[:1], top_k=99)[0].top) == 5
    assert len(onnx.classify(photographs[:1], top_k=1)[0].top) == 1


def test_equally_probable_classes_come_in_the_order_of_the_class_list(onnx):
    many = copy.copy(onnx)
    many.description = dataclasses.replace(onnx.description, class_names=[f"class {i}" for i in range(200)])
    result = many._result(None, np.tile([0.0, 1.0, 0.0, 2.0], 50), 200)
    likeliest, second, rest = range(3, 200, 4), range(1, 200, 4), range(0, 200, 2)
    assert [entry["index"] for entry in result.top] == [*likeliest, *second, *rest]
    assert result.label == "class 3"
    assert [entry["index"] for entry in many._result(None, np.zeros(200), 5).top] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 1.5}, {"batch_size": -1}, {"batch_size": True}])
def test_impossible_numbers(onnx, options):
    with pytest.raises(VitError, match=next(iter(options))):
        onnx.classify([], **options)


def test_nothing_gives_nothing(onnx):
    assert onnx.classify([]) == []
    assert onnx.probabilities(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 5)


def test_logits_of_a_large_batch_are_those_of_its_images(small_bundle, onnx, torch_):
    images = np.random.default_rng(0).standard_normal((70, 3, 32, 32), dtype=np.float32)
    expected = torch_.logits(images)
    for classifier in (onnx, load(small_bundle, device="cpu", backend="onnx", throughput=True)):
        np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-4)
        np.testing.assert_allclose(classifier.logits(images[:1]), expected[:1], atol=1e-4)
        probabilities = classifier.probabilities(images)
        np.testing.assert_allclose(probabilities, softmax(expected, 1.5), atol=1e-5)


def test_logits_of_the_wrong_shape_name_the_right_one(onnx, torch_):
    for classifier in (onnx, torch_):
        with pytest.raises(VitError, match=r"\(B, 3, 32, 32\)"):
            classifier.logits(np.zeros((1, 3, 16, 16), np.float32))
        probabilities = classifier.probabilities(np.zeros((2, 3, 32, 32), np.float32))
        assert probabilities.dtype == np.float64
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)


def test_a_model_that_gives_no_numbers_says_so(onnx, photographs, monkeypatch):
    real = onnx._backend.logits

    def sometimes(images):
        logits = real(images)
        logits[0, 0] = np.nan
        return logits

    monkeypatch.setattr(onnx._backend, "logits", sometimes)
    first, second = onnx.classify(photographs[:2], batch_size=2)
    assert "no number" in first.error
    assert second.error is None


def test_memory_is_bounded_whatever_the_stream(onnx, torch_, photographs):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield photographs[taken % 12]

    for classifier, most in ((torch_, 8), (onnx, 4 * (2 * count_cpus() + 1))):  # two batches; two a thread and one more
        taken, stream = 0, classifier.stream(endless(), batch_size=4)
        for given_ in range(1, 200):
            next(stream)
            assert taken - given_ <= most
        stream.close()


def test_a_pause_answers_what_came(onnx, photographs):
    steps = []

    def inputs():
        yield photographs[0]
        yield photographs[1]
        steps.append("pause")
        yield Flush()
        steps.append("went on")
        yield InvalidInput("x", "because")

    stream = onnx.stream(inputs(), batch_size=32)
    first, second = next(stream), next(stream)
    assert (first.path, second.path) == (str(photographs[0]), str(photographs[1]))
    assert steps == ["pause"]
    assert [result.to_dict() for result in stream] == [{"path": "x", "error": "because"}]


def test_an_error_of_the_iterable_is_not_swallowed(onnx, photographs):
    def inputs():
        yield photographs[0]
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        onnx.classify(inputs())


def test_the_public_names_lead_here(small_bundle, photographs):
    classifier = vit.load(str(small_bundle), device="cpu")
    assert isinstance(classifier, vit.Classifier)
    assert classifier.backend == "onnx"
    assert "5 classes" in repr(classifier)
    assert isinstance(classifier.classify([photographs[0]])[0], vit.Result)
