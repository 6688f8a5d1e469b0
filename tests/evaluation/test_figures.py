"""Figures: what is drawn where, with names that would like to be something else."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit.errors import VitError
from vit.evaluation.figures import _group_max, confusion_figure, reliability_figure, save_png
from vit.evaluation.metrics import Outcomes, compute_reliability
from vit.evaluation.names import readable

ODD_NAMES = ["$x^2$", "50$", "\\alpha $", "a\nb\tc", "\udcff\udcfe.jpg", "", "\u202etxt", "x" * 300, "漢字", "<b>&amp;"]


def check_image(image: np.ndarray) -> None:
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert image.std() > 1


def test_names_of_every_kind_are_drawn_without_a_word():
    confusion = np.eye(10, dtype=int) * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_image(confusion_figure(confusion, ODD_NAMES, title="$ and $"))


@pytest.mark.parametrize("classes", [1, 2, 20, 21, 40, 41, 1000])
def test_every_number_of_classes(classes):
    image = confusion_figure(np.eye(classes, dtype=int), [str(k) for k in range(classes)])
    check_image(image)
    assert max(image.shape) < 1800


def test_every_cell_of_a_thousand_classes_is_seen():
    # three single cells, the rest without images: each is a dark dot of its own
    confusion = np.zeros((1000, 1000), int)
    for i, j in ((100, 850), (850, 100), (500, 250)):
        confusion[i, j] = 3
    image = confusion_figure(confusion, [""] * 1000, title=" ")
    dark = (image.astype(int).sum(axis=2) < 120)[30:-100, 80:-180]
    rows, columns = np.nonzero(dark)
    found = {(round(y / 50), round(x / 50)) for y, x in zip(rows, columns, strict=True)}
    assert len(found) == 3, found


def test_colour_is_a_share_of_the_row():
    # both rows are all wrong, one with 1 image and one with 1,000: equal colours
    few_and_many = confusion_figure(np.array([[0, 1], [1000, 0]]), ["a", "b"], title=" ")
    height, width = few_and_many.shape[:2]
    # beside the middle of each cell, clear of its number
    upper, lower = few_and_many[height // 5, int(width * 0.55)], few_and_many[int(height * 0.6), int(width * 0.3)]
    assert upper.tolist() == lower.tolist()
    assert upper.astype(int).sum() < 150


def test_a_class_without_images_is_grey_not_white():
    image = confusion_figure(np.array([[4, 0], [0, 0]]), ["a", "b"], title=" ")
    assert (image == 0xE0).all(axis=2).mean() > 0.1


def test_groups_keep_the_greatest_cell():
    shares = np.full((5, 5), np.nan)
    shares[0, 0], shares[4, 1] = 0.25, 1.0
    grouped = _group_max(shares, 2)
    assert grouped.shape == (3, 3)
    assert grouped[0, 0] == 0.25
    assert grouped[2, 0] == 1.0
    assert np.isnan(grouped[1, 1])


def test_more_classes_than_pixels():
    check_image(confusion_figure(np.eye(3001, dtype=np.int32), [str(k) for k in range(3001)]))


@pytest.mark.parametrize("count", [0, 1, 500])
def test_reliability_of_few_and_many(count):
    draw = np.random.default_rng(0)
    confidences = draw.uniform(0.1, 1, count)
    table = compute_reliability(Outcomes(np.zeros(count), confidences, draw.uniform(size=count) < confidences))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_image(reliability_figure(table, table, 1.3))


def test_overconfidence_and_underconfidence_look_different():
    sure = Outcomes(np.zeros(10), np.full(10, 0.95), np.arange(10) < 3)
    shy = Outcomes(np.zeros(10), np.full(10, 0.4), np.arange(10) < 9)
    pink, light = np.array([0xE8, 0x90, 0x9C]), np.array([0x8F, 0xC0, 0xD8])

    def share(image: np.ndarray, colour: np.ndarray) -> float:
        return float((image[80:] == colour).all(axis=2).mean())

    over, under = (
        reliability_figure(compute_reliability(each), compute_reliability(each), 1.0) for each in (sure, shy)
    )
    assert share(over, pink) > 0.01 > share(over, light)
    assert share(under, light) > 0.01 > share(under, pink)


def test_png_is_whole_or_not_there(tmp_path: Path):
    image = confusion_figure(np.eye(3, dtype=int), ["a", "b", "c"])
    save_png(tmp_path / "x.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), image)
    (tmp_path / "file").write_text("")
    with pytest.raises(VitError, match="cannot write"):
        save_png(tmp_path / "file" / "x.png", image)


@given(st.text(st.characters(exclude_categories=[]), max_size=60), st.integers(3, 40))
def test_readable_is_one_short_line_for_any_name(name, limit):
    # names of files that are no text carry lone surrogates in this range
    name = "".join(char for char in name if not 0xD800 <= ord(char) < 0xDC80 and not 0xDD00 <= ord(char) < 0xE000)
    text = readable(name, limit)
    assert 0 < len(text) <= max(limit, len("(no name)"))
    assert text.splitlines() == [text]
    text.encode()


def test_readable_keeps_both_ends_of_a_long_name():
    assert readable("n02123045_tabby_cat_with_stripes", 20).startswith("n02123045")
    assert readable("n02123045_tabby_cat_with_stripes", 20).endswith("stripes")
    assert readable("short") == "short"


def test_light_imports():
    code = (
        "import sys, vit.evaluation.metrics, vit.evaluation.calibration, vit.evaluation.figures\n"
        "heavy = {'torch', 'matplotlib', 'torchmetrics', 'lightning', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_window_and_no_pyplot():
    code = (
        "import sys, numpy as np\n"
        "from vit.evaluation import confusion_figure\n"
        "confusion_figure(np.eye(2, dtype=int), ['a', 'b'])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
