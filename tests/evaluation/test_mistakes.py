"""The most confident mistakes: which they are, and how they are shown."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit.data.dataset import ArrayImages, FileImages, Split
from vit.evaluation.mistakes import Mistake, _format_percent, find_mistakes, mistakes_figure, to_rgb, write_mistakes


def grey(count: int) -> Split:
    return Split(np.zeros(count), ArrayImages(np.full((count, 8, 8, 1), 120, np.uint8), "grey"), 1)


def test_mistakes_by_falling_confidence():
    logits = np.log([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    found = find_mistakes(logits, np.array([0, 0, 0, 1, 0]))
    # images 1 and 4 are equally sure: the earlier one first
    assert [mistake.index for mistake in found] == [1, 4, 2]
    assert found[0] == Mistake(1, 0, 1, pytest.approx(0.8), pytest.approx(0.2))
    assert find_mistakes(logits, logits.argmax(1)) == []


def test_probabilities_have_the_temperature():
    logits = np.array([[2.0, 4.0, 0.0]])
    expected = np.exp(logits[0] / 3) / np.exp(logits[0] / 3).sum()
    (mistake,) = find_mistakes(logits, np.array([2]), temperature=3.0)
    assert mistake.probability == pytest.approx(expected[1])
    assert mistake.true_probability == pytest.approx(expected[2])


def test_csv_keeps_names_and_paths_exactly(tmp_path: Path):
    names = ["a,b", 'say "x"', "line\nbreak"]
    paths = [b"/photos/plain.jpg", b"/photos/\xff\xfe.jpg", b"/photos/new\nline.jpg"]
    split = Split(np.arange(3), FileImages([Path(p.decode("utf-8", "surrogateescape")) for p in paths]), 3)
    mistakes = [Mistake(2, 2, 0, 0.75, 1 / 3), Mistake(1, 1, 2, 0.5, 0.1)]
    write_mistakes(tmp_path / "mistakes.csv", mistakes, split, names)
    with open(tmp_path / "mistakes.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert [row["path"].encode("utf-8", "surrogateescape") for row in rows] == [paths[2], paths[1]]
    assert [(row["true"], row["predicted"]) for row in rows] == [(names[2], names[0]), (names[1], names[2])]
    assert float(rows[0]["true_probability"]) == 1 / 3


@pytest.mark.parametrize("count", [0, 1, 3, 20, 45])
def test_a_sheet_of_any_length(count):
    mistakes = [Mistake(k % 30, 0, 1, 0.9, 0.05) for k in range(count)]
    image = mistakes_figure(mistakes, grey(30), ["$a$", "b" * 80])
    assert image.dtype == np.uint8
    assert image.shape[1] <= 1000
    assert image.shape[0] <= 1000


def test_the_images_are_in_the_sheet(tmp_path: Path):
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for colour, path in zip(colours, paths, strict=True):
        Image.new("RGB", (300, 200), colour).save(path)
    mistakes = [Mistake(k, 0, 1, 0.9, 0.05) for k in range(3)]
    sheet = mistakes_figure(mistakes, Split(np.zeros(3), FileImages(paths), 3), ["a", "b"])
    places = [np.nonzero((sheet == colour).all(axis=2))[1].mean() for colour in colours]
    assert places == sorted(places)


def test_an_image_that_has_gone_is_named_in_its_place(tmp_path: Path):
    split = Split(np.zeros(2), FileImages([tmp_path / "gone $1.jpg", tmp_path / "gone too.jpg"]), 3)
    assert mistakes_figure([Mistake(0, 0, 1, 0.9, 0.1)], split, ["a", "b"]).std() > 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_images_of_any_channels_can_be_shown(channels):
    assert to_rgb(np.zeros((5, 6, channels), np.uint8)).shape == (5, 6, 3)


def test_large_images_are_made_small():
    assert max(to_rgb(Image.new("L", (2000, 10))).shape) == 256


@pytest.mark.parametrize(
    ("probability", "text"),
    [(0.5, "50.0%"), (0.9312, "93.1%"), (0.9996, "99.96%"), (0.999999, "> 99.99%"), (1e-9, "< 0.01%"), (0.004, "0.4%")],
)
def test_a_probability_is_never_rounded_to_certainty(probability, text):
    assert _format_percent(probability) == text
