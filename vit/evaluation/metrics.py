"""The figures of a classifier, from its logits and the true labels.

Notable:
- NumPy, in float64, in blocks: ImageNet's 50,000 x 1,000 logits need no second copy in memory.  The same figures from
  torchmetrics take seconds more to import and are float32 inside; the tests hold the two against each other.
- Ties are broken by one rule everywhere: of equal logits the lower class index comes first, as in `argmax`.
- A figure that the images cannot give (the recall of a class without images) is None, JSON's null: never 0, never NaN.
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

_BLOCK = 1 << 22  # logits a block; 32 MiB in float64


def evaluate_logits(
    logits: Any, labels: Any, class_names: Sequence[str], temperature: float = 1.0, bins: int = BINS
) -> dict[str, Any]:
    """All figures of one evaluation, as plain JSON types: the `test` block of `metrics.json`.

    Args:
        logits: (N, K) raw outputs of the model; an array, or a tensor on any device.
        labels: (N,) whole numbers, the true classes.
        class_names: K names; they may repeat, the index tells classes apart.
        temperature: probabilities are softmax(logits / temperature).
        bins: of the calibration error, of equal width over [0, 1].

    Returns:
        images: N.
        top1, top5: share of images whose class is the first, or among the first five, of the model's ranking.  With
            fewer than five classes `top5` is top-K, which is 1.
        loss, loss_uncalibrated: mean negative log-likelihood in nats, with the temperature and without.
        ece, ece_uncalibrated: expected calibration error, in [0, 1]: the mean distance between confidence and
            accuracy over bins of confidence, each weighted by its images (Guo et al., "On Calibration of Modern
            Neural Networks", 2017, equation 3).
        temperature: as given.
        macro_precision, macro_recall, macro_f1: means over the classes that have images, each counting the same.  A
            class that is never predicted counts with precision 0 here: leaving it out would reward not predicting it.
        per_class: K rows of class, index, support (images of it), predicted (images called it), precision, recall,
            f1.  Precision is None for a class never predicted; recall and F1 for a class without images.
        confusion: K x K counts as lists, `confusion[i][j]` images of class i that were called j.

        For N = 0 every share and mean is None.

    Raises:
        VitError: shapes that do not fit together, labels out of range, logits that are not finite, or a temperature
            that is not above 0.
    """
    logits, labels = as_arrays(logits, labels)
    count, classes = logits.shape
    if len(class_names) != classes:
        raise VitError(f"{len(class_names)} class names for logits of {classes} classes")
    check_temperature(temperature)
    predictions = logits.argmax(axis=1) if count else np.zeros(0, np.int64)
    confusion = confusion_matrix(predictions, labels, classes)
    ranks = label_ranks(logits, labels)
    raw = outcomes(logits, labels)
    calibrated = raw if temperature == 1 else outcomes(logits, labels, temperature)
    rows = per_class(confusion, class_names)
    held = [row for row in rows if row["support"]]
    return {
        "images": count,
        "top1": _mean(ranks < 1),
        "top5": _mean(ranks < min(5, classes)),
        "loss": _mean(calibrated.losses),
        "loss_uncalibrated": _mean(raw.losses),
        "ece": reliability(calibrated, bins).ece,
        "ece_uncalibrated": reliability(raw, bins).ece,
        "temperature": float(temperature),
        "macro_precision": _mean([row["precision"] or 0.0 for row in held]),
        "macro_recall": _mean([row["recall"] for row in held]),
        "macro_f1": _mean([row["f1"] for row in held]),
        "per_class": rows,
        "confusion": confusion.tolist(),
    }


def scalars(block: dict[str, Any]) -> dict[str, Any]:
    """The single figures of `evaluate_logits`, without the per-class rows and the confusion matrix."""
    return {key: value for key, value in block.items() if not isinstance(value, list | dict)}


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (K, K): entry (i, j) counts images of class i that were called j."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predictions, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `evaluate_logits` for a confusion matrix (K, K): precision, recall, F1, support of every class."""
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
            # the harmonic mean of the two, written so that it needs neither: 2 TP / (2 TP + FP + FN)
            "f1": 2 * hits[k] / (support[k] + predicted[k]) if support[k] else None,
        }
        for k, name in enumerate(class_names)
    ]


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 (N,): how many classes the model ranks before the true one (0: it is right).

    Classes with a greater logit come before, and of those with an equal one the ones with a lower index.
    """
    ranks = np.empty(len(labels), np.int64)
    columns = np.arange(logits.shape[1])
    for part in blocks(logits):
        true = labels[part, None]
        own = np.take_along_axis(logits[part], true, axis=1)
        ahead = (logits[part] > own) | ((logits[part] == own) & (columns < true))
        ranks[part] = ahead.sum(axis=1)
    return ranks


@dataclass(frozen=True)
class Outcomes:
    """What the model made of each of N images.

    Attributes:
        losses: float64 (N,), negative log-likelihood of the true class, in nats.
        confidences: float64 (N,), probability of the predicted class.
        right: bool (N,), whether the predicted class is the true one.
    """

    losses: np.ndarray
    confidences: np.ndarray
    right: np.ndarray


def outcomes(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Outcomes:
    """Loss, confidence and correctness of every image, with probabilities softmax(logits / temperature)."""
    losses = np.empty(len(labels))
    confidences = np.empty(len(labels))
    right = np.empty(len(labels), bool)
    for part in blocks(logits):
        scaled = logits[part].astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        # the greatest is now 0: its probability is 1 / sum, and nothing overflows
        total = np.exp(scaled).sum(axis=1)
        losses[part] = np.log(total) - np.take_along_axis(scaled, labels[part, None], axis=1)[:, 0]
        confidences[part] = 1.0 / total
        right[part] = logits[part].argmax(axis=1) == labels[part]
    return Outcomes(losses, confidences, right)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, over bins of confidence of equal width.

    Attributes:
        edges: float64 (bins + 1,); bin m holds confidences in (edges[m], edges[m + 1]].
        counts: int64 (bins,), images.
        confidence: float64 (bins,), mean confidence; 0 in an empty bin.
        accuracy: float64 (bins,), share of right predictions; 0 in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float | None:
        """Expected calibration error, in [0, 1]; None without images."""
        total = int(self.counts.sum())
        return float(np.sum(self.counts * np.abs(self.accuracy - self.confidence)) / total) if total else None

    def rows(self) -> list[dict[str, Any]]:
        """The bins as plain JSON; confidence and accuracy of an empty bin are None."""
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


def reliability(results: Outcomes, bins: int = BINS) -> Reliability:
    """Bin images by confidence: bin m of M is the half-open ((m - 1) / M, m / M] of Guo et al., 2017, section 2."""
    if bins < 1:
        raise VitError(f"bins={bins}: expected at least 1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.searchsorted(edges[1:-1], results.confidences, side="left")
    counts = np.bincount(which, minlength=bins)
    # empty bins divide 0 by 1
    filled = np.maximum(counts, 1)
    confidence = np.bincount(which, results.confidences, minlength=bins) / filled
    accuracy = np.bincount(which, results.right.astype(np.float64), minlength=bins) / filled
    return Reliability(edges, counts, confidence, accuracy)


def as_arrays(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Check logits (N, K) and labels (N,), arrays or tensors, and give them as floating and int64 arrays.

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
    """Raise `VitError` unless `temperature` is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise VitError(f"temperature={temperature}: expected a finite number above 0")


def blocks(logits: np.ndarray) -> Iterator[slice]:
    """Slices of rows that together cover `logits` (N, K), each a few million numbers."""
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
    # fsum: the same to the last bit whatever the order of the images
    return math.fsum(values.tolist()) / values.size if values.size else None
