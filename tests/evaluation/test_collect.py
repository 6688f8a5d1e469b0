"""Logits of a whole split: each image once, in order, whatever loads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vit.data.catalogue import DataConfig
from vit.data.dataset import ArrayImages, FileImages, Split
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.evaluation.collect import collect_logits

PREPROCESSING = Preprocessing((4, 4), channels=1, mean=(0.3,), std=(0.6,))


def numbered(count: int) -> Split:
    """Images whose grey says which they are."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1)).copy()
    return Split(np.arange(count) % 3, ArrayImages(pixels, "numbered"), 1, native_size=(4, 4))


class Grey(nn.Module):
    """Logit k is k times the image's grey before normalisation; dropout shows whether it is in training mode."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        grey = (self.dropout(images).mean(dim=(1, 2, 3)) * 0.6 + 0.3) * 255
        return grey[:, None] * torch.arange(3.0)


class GreyScorer:
    """The same without torch."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        assert images.shape[1:] == (1, 4, 4)
        return (images.mean(axis=(1, 2, 3)) * 0.6 + 0.3)[:, None] * 255 * np.arange(3.0)


@pytest.mark.parametrize("scorer", [Grey(), GreyScorer()], ids=["torch", "numpy"])
@pytest.mark.parametrize("resident", [True, False])
def test_each_image_once_and_in_order(scorer, resident):
    split = numbered(23)
    config = DataConfig(resident=resident, workers=0, eval_batch_size=5)
    logits, labels = collect_logits(scorer, split, PREPROCESSING, config)
    assert logits.shape == (23, 3)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, torch.arange(23.0)[:, None] * torch.arange(3.0), atol=1e-3)
    assert labels.tolist() == split.labels.tolist()


def test_batch_size_wins_over_the_configuration():
    model = Grey()
    collect_logits(model, numbered(23), PREPROCESSING, DataConfig(eval_batch_size=5), batch_size=10)
    assert model.batches == [10, 10, 3]


def test_the_model_is_left_in_the_mode_it_was_in():
    model = Grey().train()
    logits, _ = collect_logits(model, numbered(6), PREPROCESSING)
    assert model.training
    assert torch.allclose(logits[:, 1], torch.arange(6.0), atol=1e-3)
    assert not logits.requires_grad
    model.eval()
    collect_logits(model, numbered(6), PREPROCESSING)
    assert not model.training


def test_precision_settings_are_left_as_they_were():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        collect_logits(Grey(), numbered(3), PREPROCESSING)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_empty_split_gives_no_rows():
    logits, labels = collect_logits(Grey(), numbered(3).subset([]), PREPROCESSING)
    assert logits.shape == (0, 3)
    assert len(labels) == 0


@pytest.mark.parametrize("resident", [True, False])
def test_a_file_gone_bad_is_named_and_never_replaced(tmp_path: Path, resident: bool):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)
    paths[4].write_bytes(paths[4].read_bytes()[:40])
    split = Split(np.zeros(6, np.int64), FileImages(paths), 1)
    config = DataConfig(resident=resident, workers=0, eval_batch_size=2)
    with pytest.raises(VitError, match=r"4\.png"):
        collect_logits(Grey(), split, PREPROCESSING, config)
