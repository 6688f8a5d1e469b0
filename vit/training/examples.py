"""Choose validation images to show while validation runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit.data.batches import Batch


@dataclass(frozen=True)
class Example:
    """An image with its prediction.

    Attributes:
        image: uint8 (C, H, W), on the CPU.
        index: index in the split.
        label, predicted: class indices.
        probability: probability of the prediction, before calibration.
        label_probability: probability of the label.
    """

    image: Tensor
    index: int
    label: int
    predicted: int
    probability: float
    label_probability: float


class Examples:
    """Keep the most confident mistakes and a fixed random sample of correct predictions.

    The sample depends only on the image indices, so the same images are shown each time, while they are classified
    correctly.  At most `2 * count` images are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Remove all examples."""
        self._right: list[tuple[float, Example]] = []
        self._wrong: list[tuple[float, Example]] = []

    def right(self) -> list[Example]:
        """Return at most `count` correct predictions, sorted by image index."""
        return sorted((example for _, example in self._right), key=lambda example: example.index)

    def wrong(self) -> list[Example]:
        """Return at most `count` mistakes, the most confident first."""
        return [example for _, example in self._wrong]

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Choose examples from a batch; `logits` (V, K) belong to its valid images."""
        if not len(logits) or not self.count:
            return
        rows = batch.valid.nonzero()[:, 0]
        labels = batch.labels[rows]
        softmax = logits.float().softmax(1)
        top, predicted = softmax.max(1)
        label_probabilities = softmax.gather(1, labels[:, None])[:, 0]
        # two small transfers; the rest runs on the CPU
        integers = torch.stack([rows, batch.index[rows], labels, predicted]).cpu().numpy()
        probabilities = torch.stack([top, label_probabilities]).cpu().numpy()
        right = integers[2] == integers[3]
        choices = ((self._right, right, _hash_score(integers[1])), (self._wrong, ~right, probabilities[0]))
        for examples, mask, score in choices:
            self._keep_best(examples, np.flatnonzero(mask), score, batch, integers, probabilities)

    def _keep_best(
        self,
        examples: list[tuple[float, Example]],
        candidates: np.ndarray,
        score: np.ndarray,
        batch: Batch,
        integers: np.ndarray,
        probabilities: np.ndarray,
    ) -> None:
        """Add `candidates` to `examples` that are among the `count` with the highest scores so far."""
        best = candidates[np.argsort(-score[candidates], kind="stable")[: self.count]]
        if len(examples) == self.count:
            best = best[score[best] > examples[-1][0]]
        if not len(best):
            return
        images = batch.images[torch.from_numpy(integers[0, best]).to(batch.images.device)].cpu()
        for column, image in zip(best.tolist(), images, strict=True):
            _, index, label, predicted = integers[:, column].tolist()
            examples.append(
                (float(score[column]), Example(image, index, label, predicted, *probabilities[:, column].tolist()))
            )
        examples.sort(key=lambda pair: -pair[0])
        del examples[self.count :]


def _hash_score(index: np.ndarray) -> np.ndarray:
    """Hash each index to a score in [0, 1) that looks random (Knuth's multiplicative hash)."""
    return (index.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(2**32) / 2**32
