"""Where patches went, in the viewer: from a real model that reduces its tokens to the picture that a browser draws."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vit.cli.viewer import Viewer
from vit.dashboard.check import check
from vit.dashboard.format import PROBE, RUN, RecordError, pack_arrays
from vit.data.preprocess import Preprocessing
from vit.explain.attention_tab import run_info, summarise, token_assignments
from vit.explain.maps import Mapper
from vit.explain.methods import trace
from vit.explain.record import record_attention
from vit.model import VisionTransformer

SIZE, PATCH, GRID = 32, 4, (8, 8)


def model_that(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=SIZE, patch_size=PATCH, num_classes=3, size="nano", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(model: VisionTransformer, images: torch.Tensor) -> list[np.ndarray]:
    """After each layer, which token each patch is in: (B, P) of numbers that tell tokens apart, from the record."""
    with record_attention(model) as record, torch.no_grad():
        model(images)
    found, prefix = [], model.num_prefix_tokens
    place = torch.arange(prefix, prefix + GRID[0] * GRID[1]).expand(len(images), -1)
    for token_map in record.token_maps[1:]:
        place = place if token_map is None else token_map.index_BN.gather(1, place)
        found.append(place.numpy())
    return found


def followed(found: dict[str, str], layer: int) -> np.ndarray:
    """The first patch of each patch's token after `layer`, as the page works it out."""
    gone, into = (np.frombuffer(base64.b64decode(found[key]), "<u2").astype(int) for key in ("gone", "into"))
    first = []
    for patch in range(len(gone)):
        at = patch
        while gone[at] <= layer:
            at = into[at]
        first.append(at)
    return np.array(first)


PLANS: dict[str, dict[str, Any]] = {
    "keep": dict(reduction="keep", reduction_rate=0.7),
    "merge": dict(reduction="merge", reduction_rate=0.7, registers=2),
    "merge in one layer": dict(reduction="merge", reduction_schedule=[0, 20, 0, 0], pool="mean"),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_fates_tell_which_patches_are_one_after_every_layer(plan):
    model, images = model_that(**plan), torch.randn(3, 3, SIZE, SIZE)
    t = trace(model, images, methods=["rollout"])
    for i in range(3):
        found = token_assignments(t, i)
        assert found is not None
        for layer, place in enumerate(tokens_of(model, images)):
            first = followed(found, layer)
            same = place[i][:, None] == place[i][None]
            np.testing.assert_array_equal(first[:, None] == first[None], same)
            np.testing.assert_array_equal(first, same.argmax(axis=1))


def test_a_model_that_keeps_all_tokens_has_nothing_to_tell():
    model = model_that()
    _, probes, _ = summarise(model, torch.randn(1, 3, SIZE, SIZE), [None])
    assert "reduced" not in probes[0]
    assert "reduction" not in run_info(model, ["a", "b", "c"], "x")


class TestCheck:
    @pytest.fixture
    def record(self) -> dict[str, Any]:
        _, probes, _ = summarise(model_that(**PLANS["merge"]), torch.randn(1, 3, SIZE, SIZE), [1])
        return pack_arrays({"v": 1, "step": 0, **probes[0]})

    def test_what_is_written_may_be_shown(self, record):
        check(f"{PROBE}00", record)
        info = run_info(model_that(**PLANS["merge"]), ["a", "b", "c"], "x")
        assert info["reduction"] == "merge"
        check(RUN, {"v": 1, **info, "probes": []})

    @pytest.mark.parametrize("change", [
        lambda reduced: reduced.pop("into"),
        lambda reduced: reduced.update(gone="AAAA"),
        lambda reduced: reduced.update(gone=7),
        # a patch that joins one behind it might be followed round in a circle
        lambda reduced: reduced.update(into=base64.b64encode(np.arange(1, 65, dtype="<u2").tobytes()).decode()),
    ])  # fmt: skip
    def test_what_is_damaged_is_refused(self, record, change: Callable[[dict[str, Any]], object]):
        change(record["reduced"])
        with pytest.raises(RecordError, match="damaged: reduced"):
            check(f"{PROBE}00", record)

    def test_a_run_says_it_in_words(self):
        info = run_info(model_that(**PLANS["merge"]), ["a", "b", "c"], "x")
        with pytest.raises(RecordError, match="damaged: reduction"):
            check(RUN, {"v": 1, **info, "probes": [], "reduction": 3})


class Page:
    """`index.html` of one image in a browser."""

    def __init__(self, chrome: Any, folder: Path, model: VisionTransformer, url: str = "") -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        preprocessing = Preprocessing(image_size=(SIZE, SIZE))
        viewer = Viewer(Mapper(model, preprocessing), ["a", "b", "c"], "model", 1)
        viewer.add([("image.png", self.pixels)])
        viewer.write(folder / "index.html")
        self.images = torch.from_numpy(preprocessing.normalise(self.pixels[None]))
        self.trouble: list[str] = []
        self.context = chrome.new_context()
        self.window = self.context.new_page()
        self.window.on("console", lambda each: self.trouble.append(each.text) if each.type == "error" else None)
        self.window.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.window.goto((folder / "index.html").as_uri() + url)
        self.window.wait_for_selector(".run .meaning:not(:empty)")

    def after(self, layer: str) -> None:
        self.window.locator(".token-section").get_by_label("After layer", exact=True).select_option(label=layer)
        self.window.wait_for_function(
            "layer => document.querySelector('.token-section .note').textContent.startsWith(`After layer ${layer} of`)",
            arg=layer.split()[0],
        )

    def note(self) -> str:
        return self.window.locator(".token-section .note").inner_text()

    def drawn(self) -> np.ndarray:
        """The canvas, uint8 (rows, columns, 16, 16, 4), patch by patch."""
        data = self.window.locator(".token-section canvas").evaluate(
            "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        )
        return np.array(data, np.uint8).reshape(8, 16, 8, 16, 4).swapaxes(1, 2)

    def close(self) -> None:
        self.context.close()
        assert not self.trouble


def test_what_was_not_kept_is_dark(tmp_path: Path, chrome: Any) -> None:
    model = model_that(reduction="keep", reduction_schedule=[0, 30, 0, 20])
    page = Page(chrome, tmp_path, model)
    by_layer = tokens_of(model, page.images)
    assert page.note() == "After layer 4 of 4, 13 of 64 patches are kept; the other 51, dark, have become one token."
    for layer, words in ((4, "13 of 64"), (2, "33 of 64")):
        page.after("4 (last)" if layer == 4 else str(layer))
        assert words in page.note()
        place = by_layer[layer - 1][0]
        rest = (place == place.max()).reshape(GRID)
        middle = page.drawn()[:, :, 8, 8]
        np.testing.assert_array_equal(middle[..., 3] > 120, rest)
    page.after("1")
    assert page.note() == "After layer 1 of 4, each of the 64 patches is still a token of its own."
    assert "after=1" in page.window.url
    page.close()


def test_patches_that_are_one_token_have_no_line_between_them(tmp_path: Path, chrome: Any) -> None:
    model = model_that(reduction="merge", reduction_schedule=[20, 10, 0, 10])
    page = Page(chrome, tmp_path, model, "#after=2")
    place = tokens_of(model, page.images)[1][0].reshape(GRID)
    assert page.note().startswith("After layer 2 of 4, the 64 patches have become 34 tokens, ")
    lines = page.drawn()[:, :, 8, 0, 3]  # halfway down the left side of each patch
    np.testing.assert_array_equal(lines[:, 1:] > 200, place[:, 1:] != place[:, :-1])
    above = page.drawn()[:, :, 0, 8, 3]
    np.testing.assert_array_equal(above[1:] > 200, place[1:] != place[:-1])
    # the cursor marks what is one with the patch under it
    sizes = np.array([(place == each).sum() for each in place.ravel()]).reshape(GRID)
    row, column = np.argwhere(sizes == sizes.max())[0]
    box = page.window.locator(".picture.main").bounding_box()
    page.window.locator(".picture.main").click(
        position={"x": (column + 0.5) / 8 * box["width"], "y": (row + 0.5) / 8 * box["height"]}
    )
    page.window.wait_for_function("document.querySelector('.main .cursor.chosen')")
    np.testing.assert_array_equal(page.drawn()[:, :, 8, 8, 3] > 60, place == place[row, column])
    page.close()


def test_without_reduction_there_is_no_such_part(tmp_path: Path, chrome: Any) -> None:
    page = Page(chrome, tmp_path, model_that())
    assert not page.window.locator(".token-section").is_visible()
    page.close()
