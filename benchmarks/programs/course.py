"""What the contestants of `benchmarks/race.py` share: images, a clock that stands still while they validate, a curve.

Notable
- Images are decoded already, in memory: what they cost is what each contestant does with them.
- The budget is spent from the first batch on, on batches and steps alone.  Validation is not counted, for anyone, and
  is done in one way for all: the images whole, normalised, in batches of 256.
- The weights that validation liked best are those that are tested.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class Data:
    """The images of a folder that `benchmarks/race_data.py` wrote: uint8 (N, H, W, C), with labels, by split."""

    def __init__(self, folder: str) -> None:
        import numpy as np

        self.about: dict[str, Any] = json.loads(Path(folder, "about.json").read_text("utf-8"))
        self.mean, self.std = self.about["mean"], self.about["std"]
        self.classes: int = self.about["architecture"]["num_classes"]
        self._read = lambda name: np.load(Path(folder, f"{name}.npy"), mmap_mode="r")

    def images(self, split: str) -> Any:
        return self._read(f"{split}_images")

    def labels(self, split: str) -> Any:
        return self._read(f"{split}_labels")

    def dataset(self, transform: Any = None) -> Any:
        """The training images as torchvision's data sets of small images give them: Pillow images and labels."""
        return _dataset(self.images("train"), self.labels("train"), transform)

    def accuracy(self, model: Any, split: str) -> float:
        """The share of a split that `model` is right about; it is left training if it was."""
        import torch

        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        images, labels, right = self.images(split), self.labels(split), 0
        training = model.training
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(labels), 256):
                batch = torch.from_numpy(images[start : start + 256].copy()).permute(0, 3, 1, 2)
                answers = model((batch.float() / 255 - mean) / std).argmax(1)
                right += int((answers == torch.from_numpy(labels[start : start + 256].copy())).sum())
        model.train(training)
        return right / len(labels)


def _dataset(images: Any, labels: Any, transform: Any) -> Any:
    import torch
    from PIL import Image

    class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.transform = transform

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> Any:
            pixels = images[i]
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            return (self.transform(image) if self.transform else image), int(labels[i])

    return Pictures()


def transforms(data: Data, crop: Any, ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Any:
    """What tutorials put before a small ViT, of torchvision: a crop, mirroring, a tensor, normalised.

    `crop`: the shares of the image between which the part lies that is enlarged; "pad": one of the full size, out of
    the image with four pixels of margin; None: none.
    """
    from torchvision import transforms as T

    side = data.about["architecture"]["image_size"][0]
    first = [] if crop is None else [T.RandomCrop(side, padding=4)]
    if isinstance(crop, list):
        first = [T.RandomResizedCrop(side, scale=tuple(crop), ratio=ratio)]
    return T.Compose([*first, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(data.mean, data.std)])


class Course:
    """A budget of seconds, and what became of a model in them.

    Args:
        model: what is trained, given (B, C, H, W) images, normalised.
        given: what `benchmarks/race.py` hands to a contestant: `seconds`, `points` of the curve, whether to `test`.
    """

    def __init__(self, model: Any, data: Data, given: dict[str, Any]) -> None:
        self.model, self.data, self.given = model, data, given
        self.curve: list[tuple[float, float]] = []
        self.images = 0
        self.waited = 0.0
        self._began: float | None = None
        self._best: Any = None

    @property
    def spent(self) -> float:
        """Seconds of the budget that are gone."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    @property
    def progress(self) -> float:
        """The share of the budget that is gone: what schedules go by, so that each ends where the time does."""
        return min(1.0, self.spent / self.given["seconds"])

    @property
    def over(self) -> bool:
        return self.progress >= 1

    def watched(self, loader: Iterable[Any]) -> Iterator[Any]:
        """One pass over a loader; what is waited for its batches is put down.  The first batch starts the clock."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if self._began is None:
                self._began = time.perf_counter()
            else:
                self.waited += time.perf_counter() - asked
            yield batch

    def passed(self, images: int) -> None:
        """A step is done, of so many images; validates where the curve has its next point, and at the end."""
        self.images += images
        spent = self.spent
        if spent >= self.given["seconds"] * (len(self.curve) + 1) / self.given["points"] or self.over:
            stopped = time.perf_counter()
            self.curve.append((spent, self.data.accuracy(self.model, "val")))
            if self.curve[-1][1] == max(accuracy for _, accuracy in self.curve):
                self._best = copy.deepcopy(self.model.state_dict())
            assert self._began is not None
            self._began += time.perf_counter() - stopped

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches, pass after pass, until the budget is spent.  Counts a step whenever the next one is asked for."""
        while not self.over:
            before = self.images
            for batch in self.watched(loader):
                yield batch
                self.passed(len(batch[0]))
                if self.over:
                    return
            if self.images == before:
                raise SystemExit("a pass over the training images gives no batch: they are fewer than a batch has")

    def result(self) -> dict[str, Any]:
        """What the driver reads; with `test`, the test split is touched, here only."""
        self.model.load_state_dict(self._best)
        return {
            "curve": self.curve,
            "val": max(accuracy for _, accuracy in self.curve),
            "test": self.data.accuracy(self.model, "test") if self.given["test"] else None,
            "seconds": self.curve[-1][0],
            "images": self.images,
            "waiting": self.waited,
            **size(self.model, self.data),
        }


def contend(train: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What a contestant's program does: train by the JSON on its command line, and end with what came of it as JSON."""
    del sys.path[0]  # a module there may bear a library's name
    found = train(json.loads(sys.argv[1]))
    print("\n" + json.dumps(found))  # on a line of its own, whatever was printed before


def size(model: Any, data: Data) -> dict[str, float]:
    """Parameters, and operations of one image's forward pass, two for a multiplication with its addition.

    Counted as torch runs it, for all in one way: attention as its two matrix products.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    a = data.about["architecture"]
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that nothing counts
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, a["in_channels"], *a["image_size"]))
    parameters = sum(each.numel() for each in model.parameters())
    return {"parameters": parameters, "flops": float(counter.get_total_flops())}
