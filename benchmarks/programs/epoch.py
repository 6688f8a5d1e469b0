"""An epoch of training on photographs, from files to updated weights: a contestant of `benchmarks/epoch.py`.

A plain loop around each library's loader, model and optimiser: crops of `crops.py`, steps of `step.py`.
The answer is the mean loss of a few photographs' central squares before any step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crops import SQUARE, TIMM_SQUARE, Loaded, timm_loader
from served import serve
from step import own, timms

Built = tuple[Callable[[], Any], Callable[[], Any] | None]


def contestant(model: Any, optimizer: Any, passes: Callable[[], Iterator[Any]], few: Iterator[Any]) -> Built:
    """`passes()` gives normalised batches (B, 3, H, W), `few` one of what answers; the class of all is the first."""
    import torch
    from torch.nn import functional as F

    def loss_of(images: Any) -> Any:
        return F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))

    (images,) = few
    with torch.inference_mode():
        before = float(loss_of(images))
    model.train()

    def epoch() -> None:
        for images in passes():
            optimizer.zero_grad(set_to_none=True)
            loss_of(images).backward()
            optimizer.step()

    return epoch, lambda: [[before]]


def count(folder: str) -> int:
    """All of a folder, as one batch: a loader for training leaves out what does not fill one."""
    return len(list(Path(folder).iterdir()))


def images_of(run: Callable[[], Iterator[tuple[Any, Any]]]) -> Callable[[], Iterator[Any]]:
    return lambda: (images for images, _ in run())


def vit_streamed(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's, decoding in every epoch."""
    whole, part = Loaded(folder, size, batch, workers, None), Loaded(few, size, count(few), workers, None)
    return contestant(*own(model, "adamw"), images_of(whole.passes()), images_of(part.passes(**SQUARE))())


def vit_cached(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """This project's with `data.cache=true`; the photographs are decoded before the first epoch."""
    cache = tempfile.TemporaryDirectory(prefix="epoch-", dir=Path(folder).parent)
    whole, part = Loaded(folder, size, batch, workers, cache.name), Loaded(few, size, count(few), workers, cache.name)
    run = images_of(whole.passes())
    epoch, answer = contestant(*own(model, "adamw"), run, images_of(part.passes(**SQUARE))())
    return lambda: (epoch(), cache)[0], answer


def timm(model: str, folder: str, few: str, size: int, batch: int, workers: int) -> Built:
    """timm's."""
    loader = timm_loader(folder, size, batch, workers)
    part = timm_loader(few, size, count(few), 0, **TIMM_SQUARE)
    return contestant(*timms(model), images_of(lambda: iter(loader)), images_of(lambda: iter(part))())


if __name__ == "__main__":
    del sys.path[0]  # a module there may bear a library's name
    serve({builder.__name__: builder for builder in (vit_cached, vit_streamed, timm)})
