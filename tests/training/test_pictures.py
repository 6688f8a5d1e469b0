"""Pictures: what is drawn where, and names that try to get in the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit.training import pictures
from vit.training.examples import Example


def squares(*shapes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 200, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    image = squares((8, 8))[0]
    sheet = np.asarray(pictures.draw_grid([image], [[("seven", "")]]))
    expected = np.asarray(image).repeat(12, 0).repeat(12, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, expected.shape)[:, :, 0]
    assert (windows == expected).all(axis=(2, 3, 4)).sum() == 1


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (28, 28), (64, 64), (224, 224), (500, 20), (20, 500), (3, 1)])
def test_a_tile_is_of_readable_size(shape: tuple[int, int]) -> None:
    sheet = pictures.draw_grid(squares(shape), [[("name", "100%")]])
    assert 100 <= sheet.width <= 170
    assert sheet.height <= 170


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4), (17, 5, 4)])
def test_grids_are_square_like(n: int, columns: int, rows: int) -> None:
    sheet = pictures.draw_grid(squares((8, 8)) * n, [[("a", "")]] * n)
    one = pictures.draw_grid(squares((8, 8)), [[("a", "")]])
    assert sheet.width == columns * (one.width - 8) + 8
    assert sheet.height == rows * (one.height - 8) + 8


def test_long_names_do_not_widen_a_tile_for_ever() -> None:
    wide = pictures.draw_grid(squares((8, 8)), [[("a very long name of a class " * 9, "99%")]])
    assert wide.width <= 170


def test_mistakes_are_red_and_hits_green() -> None:
    def colours(good: bool | None) -> set[str]:
        sheet = np.asarray(pictures.draw_grid([Image.new("L", (8, 8))], [[("name", "50%")]], good=good)).reshape(-1, 3)
        inked = sheet[(sheet.max(1).astype(int) - sheet.min(1)) > 60]
        return {("red", "green", "blue")[k] for k in inked.argmax(1)}

    assert colours(True) == {"green"}
    assert colours(False) == {"red"}
    assert colours(None) == set()


@given(st.lists(st.text(max_size=12), min_size=1, max_size=9))
def test_any_names_can_be_drawn_and_tagged(names: list[str]) -> None:
    counts = np.ones((len(names), len(names)), dtype=np.int64)
    pictures.draw_confusion(counts, names)
    pictures.draw_accuracy_bars(counts, names)
    pictures.draw_grid(squares((8, 8)) * len(names), [[(name, "5%")] for name in names])
    tags = pictures.make_tags(names)
    assert len(tags) == len(names)
    assert all(tag.isprintable() and "/" not in tag for tag in tags)
    "".join(tags).encode()


def test_tags_tell_classes_apart() -> None:
    assert pictures.make_tags(["cat", "a\nb", "a\tb", "x/y"]) == ["cat", "a?b (1)", "a?b (2)", "x_y"]
    assert pictures.clean_text("caf\udce9 \x1b[31m") == "caf? ?[31m"


def test_class_accuracy_is_the_diagonals_share_of_its_row() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [1, 1, 2]])
    np.testing.assert_allclose(pictures.class_accuracy(counts), [0.75, np.nan, 0.5])


def test_the_confusion_matrix_is_dark_where_the_images_are() -> None:
    counts = np.array([[9, 1], [0, 10]])
    sheet = np.asarray(pictures.draw_confusion(counts, ["a", "b"]).convert("L")).astype(int)
    corner = 40 * 2 + 12
    cells = sheet[-corner:-12, -corner:-12].reshape(2, 40, 2, 40)[:, 5:9, :, 5:9].mean((1, 3))
    assert cells[1, 1] < cells[0, 0] < cells[0, 1] < cells[1, 0]
    assert cells[1, 0] == pytest.approx(255)


@pytest.mark.parametrize("k", [1, 2, 10, 11, 24, 25, 50, 51, 200, 1000])
def test_any_number_of_classes_fits_a_screen(k: int) -> None:
    counts = np.eye(k, dtype=np.int64) * 12_345
    names = [f"class number {i}" for i in range(k)]
    assert max(pictures.draw_confusion(counts, names).size) <= 1100
    bars = pictures.draw_accuracy_bars(counts, names)
    assert bars.height == 12 + 18 * min(k, 40)


def test_of_many_classes_the_worst_are_shown() -> None:
    counts = np.eye(60, dtype=np.int64)
    counts[7, 7], counts[7, 8] = 0, 1
    counts[9, 9] = 0  # no images: nothing to rank
    few = pictures.draw_accuracy_bars(counts, ["hit"] * 7 + ["miss"] + ["hit"] * 52)
    pixels = np.asarray(few.convert("L"))
    bar = pixels[6 + 9, -110 - 260 : -110]
    assert (bar > 200).all(), "the first bar is the empty one of the class that was missed"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (0.001, "<1%"), (0.004999, "<1%"), (0.0123, "1%"), (0.5, "50%"), (0.9951, ">99%"), (1.0, "100%")],
)
def test_percentages_claim_no_certainty(share: float, text: str) -> None:
    assert pictures.format_percent(share) == text


def test_captions_of_examples() -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    right = Example(image, 0, label=1, predicted=1, probability=0.9, label_probability=0.9)
    wrong = Example(image, 0, label=1, predicted=0, probability=0.7, label_probability=0.2)
    assert pictures.example_caption(right, ["cat", "dog"]) == [("dog", "90%")]
    assert pictures.example_caption(wrong, ["cat", "dog"]) == [("dog", "20%"), ("→ cat", "70%")]


def test_captions_of_targets() -> None:
    names = ["a", "b", "c", "d"]
    assert pictures.target_caption(torch.tensor(2), names) == [("c", "")]
    smooth = torch.full((4,), 0.025)
    smooth[1] += 0.9
    assert pictures.target_caption(smooth, names) == [("b", "")]
    mixed = torch.tensor([0.0, 0.3, 0.0, 0.7])
    assert pictures.target_caption(mixed, names) == [("d", "70%"), ("b", "30%")]
    assert pictures.target_caption(torch.tensor([0.5, 0.5]), names) == [("a", "50%"), ("b", "50%")]
    assert pictures.target_caption(torch.tensor([1.0]), names) == [("a", "")]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (5, "RGB")])
def test_channels(channels: int, mode: str) -> None:
    pixels = torch.randint(0, 256, (channels, 4, 6), dtype=torch.uint8)
    image = pictures.to_rgb(pixels)
    assert (image.mode, image.size) == (mode, (6, 4))
    np.testing.assert_array_equal(np.asarray(image).reshape(4, 6, -1)[:, :, 0], pixels[0].numpy())
