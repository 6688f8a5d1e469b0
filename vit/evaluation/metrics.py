"""Compute the metrics of a classifier from its logits and the true labels.

Notes:
- NumPy computes in float64, in blocks: ImageNet's 50,000 x 1,000 logits need no second copy in memory.  torchmetrics
  takes seconds more to import and computes in float32; the tests compare both.
- Ties follow one rule everywhere: of equal logits the lower class index comes first, as in `argmax`.
- An undefined metric (the recall of a class without images) is None, JSON's null: never 0, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit.errors import VitError

BINS = 15
"""Bins of the expected calibration error: Guo et al., 2017."""

_BLOCK = 1 << 22  # logits in a block; 32 MiB in float64


def evaluate_logits(
    logits: Any, labels: Any, class_names: Sequence[str], temperature: float = 1.0, bins: int = BINS
) -> dict[str, Any]:
    """Compute all metrics of one evaluation, as plain JSON types: the `test` block of `metrics.json`.

    Args:
        logits: (N, K) raw outputs of the model; an array, or a tensor on any device.
        labels: (N,) whole numbers, the true classes.
        class_names: K names; names may repeat, since classes are identified by index.
        temperature: probabilities are softmax(logits / temperature).
        bins: the number of bins of the calibration error, of equal width over [0, 1].

    Returns:
        images: N.
        top1, top5: fraction of images whose class is the first, or among the first five, of the model's ranking.  With
            fewer than five classes `top5` is top-K, which is 1.
        loss, loss_uncalibrated: mean negative log-likelihood in nats, with the temperature and without.
        ece, ece_uncalibrated: expected calibration error, in [0, 1]: the mean distance between confidence and
            accuracy over bins of confidence, each weighted by its images (Guo et al., "On Calibration of Modern
            Neural Networks", 2017, equation 3).
        temperature: as given.
        macro_precision, macro_recall, macro_f1: means over the classes that have images, each with the same weight.  A
            class that is never predicted has precision 0 here: without it, never predicting a class would pay.
        per_class: K rows of class, index, support (images of the class), predicted (images predicted as the class),
            precision, recall, f1.  Precision is None for a class never predicted; recall and F1 are None for a class
            without images.
        confusion: K x K counts as lists: `confusion[i][j]` images of class i were predicted as class j.

        For N = 0 every fraction and mean is None.

    Raises:
        VitError: if the shapes do not match, a label is out of range, a logit is not finite, or the temperature is not
            above 0.
    """
    logits, labels = as_arrays(logits, labels)
    count, classes = logits.shape
    if len(class_names) != classes:
        raise VitError(f"{len(class_names)} class names for logits of {classes} classes")
    check_temperature(temperature)
    predictions = logits.argmax(axis=1) if count else np.zeros(0, np.int64)
    confusion = confusion_matrix(predictions, labels, classes)
    ranks = rank_labels(logits, labels)
    raw = compute_outcomes(logits, labels)
    calibrated = raw if temperature == 1 else compute_outcomes(logits, labels, temperature)
    rows = per_class_metrics(confusion, class_names)
    with_images = [row for row in rows if row["support"]]
    return {
        "images": count,
        "top1": _mean(ranks < 1),
        "top5": _mean(ranks < min(5, classes)),
        "loss": _mean(calibrated.losses),
        "loss_uncalibrated": _mean(raw.losses),
        "ece": compute_reliability(calibrated, bins).ece,
        "ece_uncalibrated": compute_reliability(raw, bins).ece,
        "temperature": float(temperature),
        "macro_precision": _mean([row["precision"] or 0.0 for row in with_images]),
        "macro_recall": _mean([row["recall"] for row in with_images]),
        "macro_f1": _mean([row["f1"] for row in with_images]),
        "per_class": rows,
        "confusion": confusion.tolist(),
    }


def scalars(block: dict[str, Any]) -> dict[str, Any]:
    """Select the scalar metrics of `evaluate_logits`, without the per-class rows and the confusion matrix."""
    return {key: value for key, value in block.items() if not isinstance(value, list | dict)}


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count images by class: int64 (K, K), entry (i, j) counts images of class i that were predicted as class j."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predictions, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Compute precision, recall, F1 and support of every class from a confusion matrix (K, K)."""
    hits = np.diag(confusion).tolist()
    support = confusion.sum(axis=1).tolist()
    predicted = confusion.sum(axis=0).tolist()
    return [
        {
            "class": str(name),
            "index": k,
            "support": support[k],
            "predicted": predicted[k],
            "precision": hits[k] / predicted[k] if predicted[k] else None,
            "recall": hits[k] / support[k] if support[k] else None,
            # the harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN)
            "f1": 2 * hits[k] / (support[k] + predicted[k]) if support[k] else None,
        }
        for k, name in enumerate(class_names)
    ]


def rank_labels(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count the classes that the model ranks before the true one: int64 (N,), 0 for a correct prediction.

    Classes rank by falling logit, and among equal logits by index.
    """
    ranks = np.empty(len(labels), np.int64)
    columns = np.arange(logits.shape[1])
    for part in blocks(logits):
        true = labels[part, None]
        true_logit = np.take_along_axis(logits[part], true, axis=1)
        ahead = (logits[part] > true_logit) | ((logits[part] == true_logit) & (columns < true))
        ranks[part] = ahead.sum(axis=1)
    return ranks


@dataclass(frozen=True)
class Outcomes:
    """Holds loss, confidence and correctness of each of N images.

    Attributes:
        losses: float64 (N,), negative log-likelihood of the true class, in nats.
        confidences: float64 (N,), probability of the predicted class.
        correct: bool (N,), whether the predicted class is the true one.
    """

    losses: np.ndarray
    confidences: np.ndarray
    correct: np.ndarray


def compute_outcomes(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Outcomes:
    """Compute loss, confidence and correctness of every image, with probabilities softmax(logits / temperature)."""
    losses = np.empty(len(labels))
    confidences = np.empty(len(labels))
    correct = np.empty(len(labels), bool)
    for part in blocks(logits):
        scaled = logits[part].astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        # the largest logit is now 0: its probability is 1 / sum, and nothing overflows
        total = np.exp(scaled).sum(axis=1)
        losses[part] = np.log(total) - np.take_along_axis(scaled, labels[part, None], axis=1)[:, 0]
        confidences[part] = 1.0 / total
        correct[part] = logits[part].argmax(axis=1) == labels[part]
    return Outcomes(losses, confidences, correct)


@dataclass(frozen=True)
class Reliability:
    """Holds confidence and accuracy in bins of confidence of equal width.

    Attributes:
        edges: float64 (bins + 1,); bin m holds confidences in (edges[m], edges[m + 1]].
        counts: int64 (bins,), number of images.
        confidence: float64 (bins,), mean confidence; 0 in an empty bin.
        accuracy: float64 (bins,), fraction of correct predictions; 0 in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float | None:
        """Compute the expected calibration error, in [0, 1]; None without images."""
        total = int(self.counts.sum())
        return float(np.sum(self.counts * np.abs(self.accuracy - self.confidence)) / total) if total else None

    def rows(self) -> list[dict[str, Any]]:
        """Convert the bins to plain JSON; confidence and accuracy of an empty bin are None."""
        return [
            {
                "from": float(self.edges[m]),
                "to": float(self.edges[m + 1]),
                "images": int(count),
                "confidence": float(self.confidence[m]) if count else None,
                "accuracy": float(self.accuracy[m]) if count else None,
            }
            for m, count in enumerate(self.counts)
        ]


def compute_reliability(results: Outcomes, bins: int = BINS) -> Reliability:
    """Bin images by confidence: bin m of M is the half-open ((m - 1) / M, m / M] of Guo et al., 2017, section 2."""
    if bins < 1:
        raise VitError(f"bins={bins}: expected at least 1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    bin_index = np.searchsorted(edges[1:-1], results.confidences, side="left")
    counts = np.bincount(bin_index, minlength=bins)
    divisors = np.maximum(counts, 1)  # empty bins divide 0 by 1
    confidence = np.bincount(bin_index, results.confidences, minlength=bins) / divisors
    accuracy = np.bincount(bin_index, results.correct.astype(np.float64), minlength=bins) / divisors
    return Reliability(edges, counts, confidence, accuracy)


def as_arrays(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Check logits (N, K) and labels (N,), arrays or tensors, and convert them to floating and int64 arrays.

    Raises `VitError` for what `evaluate_logits` refuses.
    """
    logits, labels = _array(logits), _array(labels)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise VitError(f"expected logits of shape (images, classes), got {logits.shape}")
    if logits.dtype not in (np.float32, np.float64):
        logits = logits.astype(np.float64)
    if labels.shape != (len(logits),):
        raise VitError(f"expected {len(logits)} labels, one for each row of logits, got shape {labels.shape}")
    if len(labels) and labels.dtype.kind not in "iu":
        raise VitError(f"expected labels as whole numbers, got {labels.dtype}")
    labels = labels.astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        wrong = int(np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))[0])
        raise VitError(f"label {labels[wrong]} of image {wrong} is not one of the model's {logits.shape[1]} classes")
    for part in blocks(logits):
        finite = np.isfinite(logits[part]).all(axis=1)
        if not finite.all():
            first = part.start + int(np.flatnonzero(~finite)[0])
            raise VitError(f"the model's output for image {first} is not finite: it cannot be evaluated")
    return logits, labels


def check_temperature(temperature: float) -> None:
    """Check that `temperature` is a finite number above 0.  Raises `VitError`."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise VitError(f"temperature={temperature}: expected a finite number above 0")


def blocks(logits: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows that together cover `logits` (N, K), each of a few million numbers."""
    rows = max(1, _BLOCK // max(1, logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, min(start + rows, len(logits)))


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor; bfloat16 has no NumPy type
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    return np.asarray(value)


def _mean(values: Any) -> float | None:
    values = np.asarray(values, np.float64)
    # fsum gives the same bits in any order of the images
    return math.fsum(values.tolist()) / values.size if values.size else None
