"""Which validation images to show, chosen while validation runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit.data.batches import Batch


@dataclass(frozen=True)
class Example:
    """One image and what the model makes of it.

    Attributes:
        image: uint8 (C, H, W), on the CPU.
        index: its place in the split.
        label, predicted: class indices.
        probability: of the prediction, before calibration.
        label_probability: of the label.
    """

    image: Tensor
    index: int
    label: int
    predicted: int
    probability: float
    label_probability: float


class Examples:
    """Keep the most confident mistakes and a fixed, mixed sample of the images that were classified right.

    The sample is fixed by the images' indices: as long as the model gets them right, the same images are shown again.
    At most `2 * count` images are held, however many are added.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._right: list[tuple[float, Example]] = []
        self._wrong: list[tuple[float, Example]] = []

    def right(self) -> list[Example]:
        """At most `count` examples, in the order of their images' indices."""
        return sorted((example for _, example in self._right), key=lambda example: example.index)

    def wrong(self) -> list[Example]:
        """At most `count` mistakes, the most confident first."""
        return [example for _, example in self._wrong]

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Choose from a batch; `logits` (V, K) are those of its valid images."""
        if not len(logits) or not self.count:
            return
        rows = batch.valid.nonzero()[:, 0]
        labels = batch.labels[rows]
        probabilities = logits.float().softmax(1)
        top, predicted = probabilities.max(1)
        own = probabilities.gather(1, labels[:, None])[:, 0]
        # two small transfers; the choosing itself does not use the device
        whole = torch.stack([rows, batch.index[rows], labels, predicted]).cpu().numpy()
        shares = torch.stack([top, own]).cpu().numpy()
        right = whole[2] == whole[3]
        for kept, chosen, score in ((self._right, right, _mixed(whole[1])), (self._wrong, ~right, shares[0])):
            self._keep(kept, np.flatnonzero(chosen), score, batch, whole, shares)

    def _keep(
        self,
        kept: list[tuple[float, Example]],
        places: np.ndarray,
        score: np.ndarray,
        batch: Batch,
        whole: np.ndarray,
        shares: np.ndarray,
    ) -> None:
        """Put those at `places` into `kept` that are among the `count` of highest score seen so far."""
        best = places[np.argsort(-score[places], kind="stable")[: self.count]]
        if len(kept) == self.count:
            best = best[score[best] > kept[-1][0]]
        if not len(best):
            return
        images = batch.images[torch.from_numpy(whole[0, best]).to(batch.images.device)].cpu()
        for place, image in zip(best.tolist(), images, strict=True):
            _, index, label, predicted = whole[:, place].tolist()
            kept.append((float(score[place]), Example(image, index, label, predicted, *shares[:, place].tolist())))
        kept.sort(key=lambda pair: -pair[0])
        del kept[self.count :]


def _mixed(index: np.ndarray) -> np.ndarray:
    """A score for each index that looks random and never changes (Knuth's multiplicative hash)."""
    return (index.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(2**32) / 2**32
