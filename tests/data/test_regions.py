"""Random rectangles: distributions against torchvision's and timm's own loops, limits, and areas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vit.data import regions
from vit.data.random import uniform


def numbers(count: int, n: int = regions.NUMBERS, seed: int = 0) -> torch.Tensor:
    return uniform(seed, 0, torch.arange(count), 0, n)


@pytest.mark.parametrize(
    ("size", "scale"),
    [((32, 32), (0.08, 1.0)), ((224, 224), (0.08, 1.0)), ((60, 20), (0.5, 1.0)), ((10, 90), (0.9, 1.0))],
)
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    ratio = (3 / 4, 4 / 3)
    got = regions.crop_boxes(numbers(3000), *size, scale, ratio)
    torch.manual_seed(0)
    image = torch.zeros(1, *size)
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(3000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs])
    for column in range(4):
        assert stats.ks_2samp(got[:, column].numpy(), theirs[:, column]).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_crops_lie_inside_and_are_whole(height, width, low, high, seed) -> None:
    boxes = regions.crop_boxes(numbers(50, seed=seed), height, width, (min(low, high), max(low, high)), (0.75, 1.5))
    left, top, w, h = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()


def test_crops_of_images_of_different_sizes() -> None:
    drawn = numbers(3)
    sizes = [(30, 40), (500, 20), (7, 7)]
    height, width = torch.tensor(sizes, dtype=torch.float32).unbind(1)
    together = regions.crop_boxes(drawn, height, width, (0.1, 1.0), (0.75, 1.33))
    for row, (h, w) in enumerate(sizes):
        alone = regions.crop_boxes(drawn[row : row + 1], h, w, (0.1, 1.0), (0.75, 1.33))
        assert torch.equal(together[row : row + 1], alone)


def test_where_nothing_fits_the_crop_is_central() -> None:
    # whole area at ratio 1 never fits into a strip
    tall = regions.crop_boxes(numbers(4), 100, 10, (1.0, 1.0), (1.0, 1.0))
    assert (tall == torch.tensor([0.0, 45.0, 10.0, 10.0])).all()
    wide = regions.crop_boxes(numbers(4), 10, 100, (1.0, 1.0), (1.0, 1.0))
    assert (wide == torch.tensor([45.0, 0.0, 10.0, 10.0])).all()


def test_the_largest_draw_stays_inside() -> None:
    most = torch.full((2, regions.NUMBERS), 1 - 2.0**-24)
    left, top, w, h = regions.crop_boxes(most, 500, 500, (0.1, 0.2), (1.0, 1.0)).unbind(1)
    assert (left + w <= 500).all()
    assert (top + h <= 500).all()


def test_erased_boxes_are_timms() -> None:
    timm_erasing = pytest.importorskip("timm.data.random_erasing")
    import random

    got = regions.erased_boxes(numbers(3000), (32, 48))
    random.seed(0)
    erase = timm_erasing.RandomErasing(probability=1.0, device="cpu")
    theirs = []
    for _ in range(3000):
        hole = erase(torch.ones(1, 32, 48))[0] == 0
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        theirs.append((int(columns[0]), int(rows[0]), len(columns), len(rows)) if len(rows) else (0, 0, 0, 0))
    for column in range(4):
        assert stats.ks_2samp(got[:, column].numpy(), np.array(theirs)[:, column]).pvalue > 1e-3


def test_erasing_never_covers_a_side_and_tiny_images_are_spared() -> None:
    boxes = regions.erased_boxes(numbers(500), (16, 16))
    assert (boxes[:, 2:] < 16).all()
    assert (regions.erased_boxes(numbers(50), (1, 1))[:, 2:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_pasted_boxes_are_cut_mixs(height, width, seed) -> None:
    drawn = numbers(30, 3, seed)
    share = drawn[:, 2]
    boxes, covered = regions.pasted_boxes(drawn[:, :2], share, (height, width))
    for row in range(30):
        # the paper's r_w = W sqrt(1 - lambda) about a uniform centre, in timm's whole pixels
        side = np.sqrt(np.float32(share[row]))
        h, w = int(np.float32(height) * side), int(np.float32(width) * side)
        y, x = int(drawn[row, 0] * height), int(drawn[row, 1] * width)
        top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
        left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
        assert boxes[row].tolist() == [left, top, right - left, bottom - top]
        assert float(covered[row]) == pytest.approx((right - left) * (bottom - top) / (height * width))


def test_coverage_draws_the_box() -> None:
    boxes = torch.tensor([[1.0, 2.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    drawn = regions.coverage(boxes, (4, 6), torch.tensor([0.25, 1.0]))
    expected = torch.zeros(2, 1, 4, 6)
    expected[0, 0, 2, 1:4] = 0.25
    assert torch.equal(drawn, expected)
