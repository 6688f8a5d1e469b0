"""Every figure against its formula written out, against torchmetrics, and against what must hold of any input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vit.errors import VitError
from vit.evaluation import metrics
from vit.evaluation.metrics import compute_outcomes, compute_reliability, evaluate_logits, scalars

SHARES = ("top1", "top5", "ece", "ece_uncalibrated", "macro_precision", "macro_recall", "macro_f1")


def names(count: int) -> list[str]:
    return [f"class {k}" for k in range(count)]


def example(count: int = 300, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    return draw.normal(size=(count, classes)) * 2 + 3 * np.eye(classes)[labels], labels


def softmax(row: np.ndarray) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def ece_by_hand(logits: np.ndarray, labels: np.ndarray, temperature: float, bins: int = 15) -> float:
    """Guo et al., 2017, equation 3, one bin at a time."""
    probabilities = [softmax(row / temperature) for row in logits]
    confidence = [max(p) for p in probabilities]
    right = [p.index(max(p)) == label for p, label in zip(probabilities, labels, strict=True)]
    total = 0.0
    for m in range(bins):
        members = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins]
        if members:
            accuracy = sum(right[i] for i in members) / len(members)
            mean = sum(confidence[i] for i in members) / len(members)
            total += len(members) / len(labels) * abs(accuracy - mean)
    return total


def test_figures_follow_their_formulas():
    logits, labels = example()
    block = evaluate_logits(logits, labels, names(7), temperature=1.7)
    order = [sorted(range(7), key=lambda k, row=row: (-row[k], k)) for row in logits]
    assert block["images"] == 300
    assert block["top1"] == pytest.approx(np.mean([o[0] == y for o, y in zip(order, labels, strict=True)]), abs=1e-12)
    assert block["top5"] == pytest.approx(np.mean([y in o[:5] for o, y in zip(order, labels, strict=True)]), abs=1e-12)
    for key, temperature in (("loss", 1.7), ("loss_uncalibrated", 1.0)):
        nll = [-math.log(softmax(row / temperature)[y]) for row, y in zip(logits, labels, strict=True)]
        assert block[key] == pytest.approx(np.mean(nll), rel=1e-12)
    assert block["ece"] == pytest.approx(ece_by_hand(logits, labels, 1.7), rel=1e-10)
    assert block["ece_uncalibrated"] == pytest.approx(ece_by_hand(logits, labels, 1.0), rel=1e-10)


def test_per_class_rows_follow_their_formulas():
    logits, labels = example(120, 4, seed=2)
    block = evaluate_logits(logits, labels, names(4))
    predicted = logits.argmax(1)
    for k, row in enumerate(block["per_class"]):
        tp = sum(int(p == k and y == k) for p, y in zip(predicted, labels, strict=True))
        fp = sum(int(p == k and y != k) for p, y in zip(predicted, labels, strict=True))
        fn = sum(int(p != k and y == k) for p, y in zip(predicted, labels, strict=True))
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        assert row == {
            "class": f"class {k}",
            "index": k,
            "support": tp + fn,
            "predicted": tp + fp,
            "precision": precision,
            "recall": recall,
            "f1": pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12),
        }
    for i in range(4):
        for j in range(4):
            assert block["confusion"][i][j] == sum((labels == i) & (predicted == j))


@pytest.mark.parametrize("classes", [3, 12])
def test_agrees_with_torchmetrics(classes):
    reference = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = example(500, classes, seed=1)
    block = evaluate_logits(logits, labels, names(classes))
    z, y = torch.tensor(logits), torch.tensor(labels)
    common = {"num_classes": classes}

    def close(key: str, value: torch.Tensor) -> None:
        assert block[key] == pytest.approx(value.item(), abs=2e-6), key

    close("top1", reference.multiclass_accuracy(z, y, average="micro", **common))
    close("top5", reference.multiclass_accuracy(z, y, average="micro", top_k=min(5, classes), **common))
    close("ece", reference.multiclass_calibration_error(z, y, n_bins=15, norm="l1", **common))
    close("loss", torch.nn.functional.cross_entropy(z, y))
    close("macro_precision", reference.multiclass_precision(z, y, average="macro", **common))
    close("macro_recall", reference.multiclass_recall(z, y, average="macro", **common))
    close("macro_f1", reference.multiclass_f1_score(z, y, average="macro", **common))
    assert block["confusion"] == reference.multiclass_confusion_matrix(z, y, **common).tolist()


def test_a_class_without_images_has_no_recall():
    # class 2 never occurs but is predicted once; class 3 occurs and is never predicted; class 4 is in neither
    logits = np.eye(5)[[0, 1, 2, 0]] * 4
    block = evaluate_logits(logits, np.array([0, 1, 1, 3]), names(5))
    rows = block["per_class"]
    assert (rows[2]["support"], rows[2]["precision"], rows[2]["recall"], rows[2]["f1"]) == (0, 0.0, None, None)
    assert (rows[3]["support"], rows[3]["precision"], rows[3]["recall"], rows[3]["f1"]) == (1, None, 0.0, 0.0)
    assert (rows[4]["precision"], rows[4]["recall"], rows[4]["f1"]) == (None, None, None)
    # the means are over the classes that have images: 0, 1 and 3
    assert block["macro_recall"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert block["macro_precision"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert block["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert json.loads(json.dumps(block, allow_nan=False)) == block


def test_ties_go_to_the_lower_index():
    flat = np.zeros((6, 6))
    block = evaluate_logits(flat, np.arange(6), names(6))
    # class 0 is ranked first, class 5 sixth
    assert block["top1"] == pytest.approx(1 / 6)
    assert block["top5"] == pytest.approx(5 / 6)
    assert [row["predicted"] for row in block["per_class"]] == [6, 0, 0, 0, 0, 0]
    assert metrics.rank_labels(np.array([[1.0, 3.0, 3.0, 2.0]] * 4), np.arange(4)).tolist() == [3, 0, 1, 2]


def test_fewer_than_five_classes():
    logits, labels = example(50, 3)
    assert evaluate_logits(logits, labels, names(3))["top5"] == 1.0
    assert evaluate_logits(np.ones((2, 1)), np.zeros(2, int), ["only"])["top1"] == 1.0


def test_bins_are_closed_above():
    # confidence exactly 0.5 with two bins belongs to the lower one: (0, 0.5], (0.5, 1]
    results = compute_outcomes(np.array([[0.0, 0.0], [0.0, 50.0]]), np.array([0, 1]))
    table = compute_reliability(results, bins=2)
    assert table.counts.tolist() == [1, 1]
    assert table.confidence.tolist() == [0.5, 1.0]
    assert table.rows()[0] == {"from": 0.0, "to": 0.5, "images": 1, "confidence": 0.5, "accuracy": 1.0}
    assert compute_reliability(results, bins=10).rows()[0]["accuracy"] is None


def test_no_images_give_nulls():
    block = evaluate_logits(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), names(3))
    assert block["images"] == 0
    assert all(block[key] is None for key in (*SHARES, "loss", "loss_uncalibrated"))
    json.dumps(block, allow_nan=False)


def test_extreme_logits_do_not_overflow():
    block = evaluate_logits(np.array([[1e4, -1e4], [1e4, -1e4]]), np.array([0, 1]), names(2))
    assert block["loss"] == pytest.approx(1e4)
    assert block["ece"] == pytest.approx(0.5)


def test_tensors_of_every_precision_are_taken():
    logits, labels = example(40, 4)
    exact = evaluate_logits(logits, labels, names(4))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        block = evaluate_logits(torch.tensor(logits, dtype=dtype, requires_grad=True), torch.tensor(labels), names(4))
        assert block["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_blocks_change_nothing(monkeypatch):
    logits, labels = example()
    whole = evaluate_logits(logits, labels, names(7), 0.8)
    monkeypatch.setattr(metrics, "_BLOCK", 20)
    assert evaluate_logits(logits, labels, names(7), 0.8) == whole


def test_scalars_leave_the_tables_out():
    logits, labels = example(30, 3)
    block = scalars(evaluate_logits(logits, labels, names(3)))
    assert {"top1", "top5", "loss", "ece"} <= block.keys()
    assert all(isinstance(value, int | float) for value in block.values())


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "message"),
    [
        (np.zeros(3), np.zeros(3, int), 3, "shape"),
        (np.zeros((3, 2)), np.zeros(2, int), 2, "3 labels"),
        (np.zeros((3, 2)), np.zeros(3), 2, "whole numbers"),
        (np.zeros((3, 2)), np.array([0, 2, 1]), 2, "label 2 of image 1"),
        (np.zeros((3, 2)), np.array([0, 0, -1]), 2, "label -1 of image 2"),
        (np.zeros((3, 2)), np.zeros(3, int), 3, "3 class names"),
        (np.array([[0.0, np.inf]]), np.zeros(1, int), 2, "image 0 is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, classes, message):
    with pytest.raises(VitError, match=message):
        evaluate_logits(logits, labels, names(classes))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_be_is_refused(temperature):
    with pytest.raises(VitError, match="temperature"):
        evaluate_logits(np.zeros((1, 2)), np.zeros(1, int), names(2), temperature)


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray, float]:
    count, classes = draw(st.integers(1, 15)), draw(st.integers(1, 8))
    # few distinct values, so that ties are common
    values = st.one_of(st.sampled_from([-1.0, 0.0, 2.0]), st.floats(-80, 80, width=32))
    logits = draw(hnp.arrays(np.float32, (count, classes), elements=values))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    return logits, labels, draw(st.floats(0.05, 20))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_bounds_and_sums(case):
    logits, labels, temperature = case
    count, classes = logits.shape
    block = evaluate_logits(logits, labels, names(classes), temperature)
    json.dumps(block, allow_nan=False)
    assert all(0 <= block[key] <= 1 for key in SHARES)
    assert block["top1"] <= block["top5"]
    assert block["loss"] >= 0
    confusion = np.array(block["confusion"])
    assert confusion.sum() == count
    assert np.trace(confusion) == round(block["top1"] * count)
    assert [row["support"] for row in block["per_class"]] == np.bincount(labels, minlength=classes).tolist()
    assert sum(row["predicted"] for row in block["per_class"]) == count
    for key, t in (("ece", temperature), ("ece_uncalibrated", 1.0)):
        table = compute_reliability(compute_outcomes(logits, labels, t))
        assert table.counts.sum() == count
        assert block[key] == table.ece
    # only losses and calibration see the temperature
    cold = evaluate_logits(logits, labels, names(classes))
    moved = {"loss", "ece", "temperature"}
    assert {k: v for k, v in block.items() if k not in moved} == {k: v for k, v in cold.items() if k not in moved}


@settings(max_examples=100, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(case, random):
    logits, labels, temperature = case
    rows = list(range(len(labels)))
    random.shuffle(rows)
    one = evaluate_logits(logits, labels, names(logits.shape[1]), temperature)
    other = evaluate_logits(logits[rows], labels[rows], names(logits.shape[1]), temperature)
    for key, value in one.items():
        assert other[key] == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), key
