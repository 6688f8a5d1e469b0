"""Compute the logits of a whole split: every image exactly once, in the split's order.

Imports torch; with an ONNX classifier only the loaders need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vit.data.augment import normalise
from vit.data.catalogue import DataConfig
from vit.data.dataset import Split
from vit.data.loaders import Batch, eval_loader
from vit.data.parallel import progress
from vit.data.preprocess import Preprocessing
from vit.data.streaming import workers_watched
from vit.errors import VitError
from vit.model import VisionTransformer
from vit.model.threads import same_threads, use_threads


class Scorer(Protocol):
    """Computes logits of normalised images, as `vit.inference.loading.Classifier` does."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits (B, K) of images float32 (B, C, H, W)."""
        ...


@torch.no_grad()
def collect_logits(
    model: nn.Module | Scorer,
    split: Split,
    preprocessing: Preprocessing,
    config: DataConfig | None = None,
    *,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    label: str = "Evaluating",
) -> tuple[Tensor, Tensor]:
    """Run `model` over `split`.

    Args:
        model: a torch model on `device`, which runs in evaluation mode; or a classifier with a method `logits`.
        split: the images.  They are read in batches; only a few batches are in memory unless `data.resident` is set.
        preprocessing: the preprocessing of the model.
        config: the loading options (`eval_batch_size`, `workers`, `resident`).
        batch_size: images in a batch; None: `config.eval_batch_size`.
        device: the device of a torch model.
        label: the label of the progress bar, which is drawn only on a terminal.

    Returns:
        logits float32 (N, K) and labels int64 (N,), on the CPU; row i belongs to image i of the split.

    Raises:
        VitError: if an image cannot be read (the message names it), or a batch does not fit into the device's memory.
    """
    config = config or DataConfig()
    if batch_size is not None:
        config = dataclasses.replace(config, eval_batch_size=batch_size)
    labels = torch.from_numpy(split.labels.copy())
    score = _make_scorer(model, preprocessing)
    loader_device = device if isinstance(model, nn.Module) else "cpu"
    loader = eval_loader(split, preprocessing, config, device=loader_device)
    training = isinstance(model, nn.Module) and model.training
    logits: Tensor | None = None
    seen = torch.zeros(len(split), dtype=torch.int64)
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with _full_precision(), same_threads(), workers_watched(), progress(label, len(split)) as advance:
            if isinstance(model, VisionTransformer):
                use_threads(model.architecture, config.eval_batch_size)
            for batch in loader:
                valid = batch.valid.cpu()
                index = batch.index.cpu()[valid]
                part = score(batch)[valid]
                if logits is None:
                    logits = torch.empty(len(split), part.shape[1])
                logits[index] = part
                seen[index] += 1
                advance(len(index))
    except torch.OutOfMemoryError:
        raise VitError(
            f"{device} has not enough memory for {config.eval_batch_size} images at a time: lower the batch size"
        ) from None
    finally:
        loader.close()
        if training and isinstance(model, nn.Module):
            model.train()
    if logits is None:
        return torch.zeros(0, _num_classes(model)), labels
    if not bool((seen == 1).all()):
        raise RuntimeError(f"the loader gave image {int((seen != 1).nonzero()[0])} {int(seen[seen != 1][0])} times")
    return logits, labels


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32, whatever training has set, so that one checkpoint always gives the same figures."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _make_scorer(model: nn.Module | Scorer, preprocessing: Preprocessing) -> Any:
    def score(batch: Batch) -> Tensor:
        if isinstance(model, nn.Module):
            return model(normalise(batch.images, preprocessing.mean, preprocessing.std)).float().cpu()
        images = preprocessing.normalise(batch.images.permute(0, 2, 3, 1).numpy())
        return torch.from_numpy(np.array(model.logits(images), np.float32))

    return score


def _num_classes(model: nn.Module | Scorer) -> int:
    """Read K from the model, for a split without batches."""
    if isinstance(model, nn.Module):
        return int(getattr(model, "num_classes", 0))
    return len(model.description.class_names) if hasattr(model, "description") else 0
