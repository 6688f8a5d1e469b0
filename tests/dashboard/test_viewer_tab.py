"""The Attention tab as a person uses it: a real `tensorboard` process, a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest

from vit.dashboard.format import pack, unpack

FIRST = {"runs": "shapes/first", "probe": "1"}


def colours(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What the large map shall look like: multiples of the average, in inferno up to three or the largest."""
    multiples = values / values.sum() * values.size
    index = np.round(255 * multiples / max(3.0, multiples.max())).astype(int)
    return matplotlib.colormaps["inferno"](index, bytes=True)[:, :3].reshape(*grid, 3)


def record(page: Any, address: str, run: str, probe: int, step: int) -> dict[str, Any]:
    """A probe's record as the server gives it."""
    answer = page.request.get(f"{address}data/plugin/vit_attention/probe", params={"run": run, "probe": probe}).json()
    return next(each for each in answer["steps"] if each["step"] == step)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for the rounding of a colour's number."""
    return bool(np.abs(found.astype(int) - wanted.astype(int)).max() <= 6)


def test_opens_with_a_mistake_at_the_last_step_and_explains_itself(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "shapes/first"})
    assert tab.page.locator("text=Attention").first.is_visible()  # the name of the tab
    assert "Wrong" in tab.text(".answer")
    assert re.match(r"Brighter patches did more for the class “.+” \(predicted\), through all 4 layers\.",
                    tab.text(".meaning"))  # fmt: skip
    assert "step 100 of 100 · latest" in tab.text(".timeline")
    assert tab.text(".verdict") == "More faithful than random."
    assert tab.texts(".measures b") == ["0.18", "0.80"]
    assert near(tab.pixels(), colours(unpack(record(tab.page, board, "shapes/first", 1, 100)["relevance"])[0], (8, 8)))


def test_names_from_a_log_stay_text(board: str, open_tab: Any, sample: ModuleType) -> None:
    tab = open_tab(board, {"runs": sample.EVIL_RUN, "probe": "1"})
    assert sample.EVIL_RUN in tab.texts(".run h2")
    assert sample.EVIL_CLASS in tab.text(".answer")
    assert sample.EVIL_CLASS in tab.texts(".top .name")
    assert tab.frame.locator("img[src='x'], [onclick], [onerror]").count() == 0


def test_slider_moves_through_training(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST | {"method": "rollout"})
    before = tab.pixels()
    tab.step(1)
    assert tab.text(".timeline output") == "step 20 of 100"
    assert "step 20" in tab.text(".facts")
    assert not near(tab.pixels(), before)
    wanted = unpack(record(tab.page, board, "shapes/first", 1, 20)["rollout"]["mean"])[-1]
    assert near(tab.pixels(), colours(wanted, (8, 8)))
    assert tab.parameters()["step"] == "20"
    assert "Measured at step 0" in tab.text(".details")  # the latest at or before
    assert "of step 0" in tab.text(".patch-panel")


def test_play_goes_to_the_end_and_stops(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, alone=True)
    tab.frame.get_by_label("Play through training").click()
    tab.wait_text(".timeline output", "step 0 of")
    assert tab.frame.get_by_label("Pause").is_visible()
    tab.wait_text(".timeline output", "latest")
    tab.frame.get_by_label("Play through training").wait_for()


def test_methods_layers_heads_and_fusion(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, alone=True)
    answer = record(tab.page, board, "shapes/first", 1, 100)
    for method, name in [("gradient_rollout", "Gradient rollout"), ("legrad", "LeGrad")]:
        tab.choose("Method", name)
        assert near(tab.pixels(), colours(unpack(answer[method])[0], (8, 8)))
        assert tab.parameters()["method"] == method
    tab.choose("Method", "Rollout")
    tab.choose("Through layer", "2")
    tab.choose("Head fusion", "largest")
    assert near(tab.pixels(), colours(unpack(answer["rollout"]["max"])[1], (8, 8)))
    assert "layers 1 to 2 of 4" in tab.text(".meaning")
    tab.choose("Method", "Raw attention")
    tab.choose("Head", "3")
    rows = unpack(answer["rows"])
    assert near(tab.pixels(), colours(rows[1, 2], (8, 8)))
    assert "in layer 2, head 3" in tab.text(".meaning")
    tab.choose("Head", "all")
    assert near(tab.pixels(), colours(rows[1].max(0), (8, 8)))


def test_thumbnails_show_every_head_and_pick_one(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, alone=True)
    rows = unpack(record(tab.page, board, "shapes/first", 1, 100)["rows"])
    assert tab.frame.locator(".heads button").count() == 12
    assert near(tab.pixels(".heads canvas", nth=4 * 2 + 1), colours(rows[1, 2], (8, 8)))
    tab.frame.get_by_role("button", name="Layer 2, head 3", exact=True).click()
    tab.settle()
    assert "in layer 2, head 3" in tab.text(".meaning")
    assert near(tab.pixels(), colours(rows[1, 2], (8, 8)))
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowUp")
    tab.page.keyboard.press("Enter")
    tab.settle()
    assert "in layer 3, head 2" in tab.text(".meaning")


def test_classes_and_their_difference(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, alone=True)
    both = unpack(record(tab.page, board, "shapes/first", 1, 100)["relevance"])
    tab.press("True")
    assert near(tab.pixels(), colours(both[1], (8, 8)))
    assert "(the true class)" in tab.text(".meaning")
    tab.press("Difference")
    shares = both / both.sum(-1, keepdims=True) * both.shape[-1]
    difference = shares[0] - shares[1]
    index = np.round(127.5 + 127.5 * difference / max(3.0, np.abs(difference).max())).astype(int)
    wanted = matplotlib.colormaps["coolwarm"](index, bytes=True)[:, :3].reshape(8, 8, 3)
    assert near(tab.pixels(), wanted)
    assert tab.text(".meaning").startswith("Red patches speak for")
    assert "not for a difference" in tab.text(".verdict")
    tab.frame.get_by_label(re.compile("Image 1,")).click()
    tab.settle()
    assert "no difference to show" in tab.text(".message")


def test_while_it_fetches_it_says_so(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, alone=True)
    tab.frame.evaluate(
        "() => { const own = window.fetch; window.fetch = async (...rest) => {"
        " await new Promise((done) => setTimeout(done, 500)); return own(...rest); }; }"
    )
    tab.frame.get_by_label(re.compile("Image 1,")).click()
    tab.wait_text(".message", "Fetching the maps")
    assert tab.frame.locator(".run").get_attribute("aria-busy") == "true"
    tab.settle()
    assert not tab.frame.locator(".message").is_visible()
    assert tab.text(".meaning").startswith("Brighter patches")


def test_hover_shows_where_a_patch_looks_and_who_looks_at_it(board: str, open_tab: Any, sample: ModuleType) -> None:
    tab = open_tab(board, FIRST | {"layer": "2", "head": "1"})
    pairs = tab.page.request.get(
        f"{board}data/plugin/vit_attention/pairs", params={"run": "shapes/first", "probe": 1, "step": 100}
    ).json()
    attention = unpack(pairs["attention"])[1, 0]
    tab.page.mouse.move(*tab.patch(2, 3, (8, 8)))
    tab.wait_text(".where", "Row 3, column 4")
    index = 1 + 2 * 8 + 3
    assert near(tab.pixels(".small-map canvas", 0), colours(attention[index, 1:], (8, 8)))
    assert near(tab.pixels(".small-map canvas", 1), colours(attention[1:, index], (8, 8)))
    assert "patch" not in tab.parameters()  # a look leaves nothing behind
    tab.page.mouse.click(*tab.patch(2, 3, (8, 8)))
    tab.page.mouse.move(2, 200)
    tab.settle()
    assert "Row 3, column 4" in tab.text(".where")
    assert tab.parameters()["patch"] == str(2 * 8 + 3 + 1)


def test_arrow_keys_move_from_patch_to_patch(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST | {"patch": "1"}, alone=True)
    tab.frame.locator(".picture.main").focus()
    for key in ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"]:
        tab.page.keyboard.press(key)
    tab.settle()
    assert "Row 1, column 2" in tab.text(".where")  # the edge is an edge
    tab.page.keyboard.press("Escape")
    tab.settle()
    assert "patch" not in tab.parameters()


def test_two_runs_side_by_side(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST)
    tab.run("shapes/registers", True)
    tab.frame.wait_for_function("document.querySelectorAll('.run .meaning:not(:empty)').length === 2")
    assert tab.texts(".run h2") == ["shapes/first", "shapes/registers"]
    first, second = [tab.frame.locator(".picture.main").nth(i).bounding_box() for i in range(2)]
    assert second["x"] > first["x"] + first["width"]
    assert second["y"] == pytest.approx(first["y"], abs=1)
    assert "and 4 registers" in tab.texts(".facts")[1]
    tab.step(2)  # of both runs' steps together: 0 20 25 40 ...
    assert [re.match(r"step \d+", text)[0] for text in tab.texts(".facts")] == ["step 20", "step 25"]
    tab.page.mouse.move(*tab.patch(5, 6, (8, 8), nth=1))
    tab.settle()
    assert all("Row 6, column 7" in text for text in tab.texts(".where"))
    assert tab.parameters()["runs"] == "shapes/first,shapes/registers"
    tab.run("shapes/first", False)
    tab.settle()
    assert tab.texts(".run h2") == ["shapes/registers"]


def test_another_grid_without_labels_and_without_pairs(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "wide,shapes/first", "probe": "0", "patch": "14"}, alone=True)
    box = tab.frame.locator(".picture.main").first.bounding_box()
    assert box["width"] == pytest.approx(2 * box["height"], rel=0.02)
    assert tab.pixels().shape == (4, 8, 3)
    assert tab.text(".answer").startswith("Predicted ")
    assert "logged no attention between patches" in tab.text(".patch-panel")
    tab.frame.locator(".where").nth(1).wait_for()
    assert ["Row 2, column 6" in text or "Row 4, column 6" in text for text in tab.texts(".where")] == [True, True]
    tab.run("shapes/first", False)
    tab.settle()
    assert tab.frame.get_by_label("Only mistakes").is_disabled()
    assert tab.frame.locator(".controls").get_by_label("True", exact=True).is_disabled()


def test_damaged_and_newer_records_are_said_and_the_rest_is_shown(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "worn", "probe": "0"}, alone=True)
    said = tab.text(".problems")
    assert "cannot be shown" in said
    assert "format 2" in said
    tab.step(2)
    assert "step 20" in tab.text(".facts")
    assert tab.text(".meaning").startswith("Brighter patches")
    tab.step(5)
    assert tab.text(".verdict") == "No better than random: do not trust this map."


def test_a_run_of_another_version_says_so_beside_one_that_is_shown(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "shapes/first,next", "probe": "1"}, alone=True)
    assert "format 2" in tab.texts(".problems")[-1]
    assert tab.frame.get_by_text("Nothing of this run can be shown.").is_visible()
    assert tab.text(".meaning").startswith("Brighter patches")
    tab.run("shapes/first", False)
    assert tab.texts(".run h2") == ["next"]
    assert "No images." in tab.text(".images")


def test_an_image_that_a_run_does_not_have(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "shapes/first,worn", "probe": "4"}, alone=True)
    assert tab.frame.get_by_text("This run has 2 images: there is no image 5.").is_visible()


def test_images_filtered_to_mistakes_and_sorted(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "shapes/first", "probe": "0"}, alone=True)
    marks = tab.texts(".thumb .mark")
    assert sum(mark.startswith("✗") for mark in marks) == 2
    tab.frame.get_by_label("Only mistakes").check()
    tab.settle()
    assert all(mark.startswith("✗") for mark in tab.texts(".thumb .mark"))
    assert "Wrong" in tab.text(".answer")  # the image that is shown is one of them
    tab.frame.get_by_label("Only mistakes").uncheck()
    tab.choose("Sort", "least confident first", within=".images")
    sure = [int(re.search(r"\d+", mark)[0]) for mark in tab.texts(".thumb .mark")]
    assert sure == sorted(sure)
    assert len(sure) == 6


def test_sink_is_said_with_its_share(board: str, open_tab: Any) -> None:
    tab = open_tab(board, {"runs": "shapes/first", "probe": "0"}, alone=True)
    assert "one patch takes 63% of the attention" in tab.text(".sink.warns")
    tab.frame.get_by_label(re.compile("Image 2,")).click()
    tab.settle()
    assert "No sink" in tab.text(".sink")


def test_the_address_is_the_view(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST | {"method": "raw"})
    tab.frame.get_by_role("button", name="Layer 2, head 3", exact=True).click()
    tab.step(3)
    tab.frame.locator(".controls input[type=range]").fill("30")
    tab.press("Map")
    tab.page.mouse.click(*tab.patch(1, 1, (8, 8)))
    tab.parameters()
    again = open_tab(board, link=tab.page.url)
    for selector in (".meaning", ".timeline output", ".where", ".answer"):
        assert again.text(selector) == tab.text(selector)
    assert near(again.pixels(), tab.pixels())
    assert again.page.url == tab.page.url


def test_back_and_forward(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST | {"method": "rollout"})
    tab.step(1)
    tab.choose("Method", "Raw attention")
    tab.frame.get_by_label(re.compile("Image 3,")).click()
    tab.wait_text(".meaning", "layer 4")
    tab.page.go_back()
    tab.frame.wait_for_function("document.querySelectorAll('.thumb')[1].getAttribute('aria-pressed') === 'true'")
    assert "step 20" in tab.text(".timeline output")
    tab.page.go_back()
    tab.wait_text(".meaning", "whatever the class")
    assert "step 20" in tab.text(".timeline output")
    tab.page.go_forward()
    tab.wait_text(".meaning", "one layer alone")


def test_copied_link_says_everything(board: str, open_tab: Any) -> None:
    tab = open_tab(board, permissions=["clipboard-read", "clipboard-write"])
    tab.frame.get_by_role("button", name="Copy link").click()
    tab.wait_text(".controls .link", "Copied")
    link = tab.page.evaluate("navigator.clipboard.readText()")
    assert "#vit_attention&p.vit_attention.runs=" in link
    assert "method=relevance" in link
    assert "probe=" in link


def test_nonsense_in_the_address_does_no_harm(board: str, open_tab: Any) -> None:
    state = {"runs": "nobody,shapes/first", "probe": "-1", "layer": "999", "head": "x", "step": "1e9"}
    state |= {"method": "<b>", "opacity": "7000", "patch": "99999", "target": "%%%"}
    tab = open_tab(board, state, alone=True)
    assert tab.texts(".run h2") == ["shapes/first"]
    assert tab.text(".meaning").startswith("Brighter patches")


def test_dark_and_light_follow_tensorboard(board: str, open_tab: Any) -> None:
    tab = open_tab(board, FIRST, color_scheme="dark")
    assert tab.frame.locator(".vit-viewer").get_attribute("data-theme") == "dark"
    tab.page.evaluate("document.body.classList.remove('dark-mode')")
    tab.frame.wait_for_selector(".vit-viewer[data-theme=light]")


@pytest.mark.parametrize("width", [1280, 375])
def test_fits_the_window_and_is_reached_by_keyboard(board: str, open_tab: Any, width: int) -> None:
    tab = open_tab(board, FIRST, viewport={"width": width, "height": 800})
    scroll = tab.frame.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert scroll[0] <= scroll[1]
    map_width = tab.frame.locator(".picture.main").bounding_box()["width"]
    assert map_width > 300
    tab.frame.locator(".run-list input").first.focus()
    reached = set()
    for _ in range(45):
        reached.add(tab.frame.evaluate(
            "(e => e.getAttribute('aria-label') || e.closest('label')?.textContent || e.textContent)"
            "(document.activeElement)"))  # fmt: skip
        tab.page.keyboard.press("Tab")
    for control in ["Only mistakes", "Opacity", "Copy link", "Training step", "Play through training"]:
        assert control in reached
    assert any(name.startswith("Attention map of 8 by 8 patches") for name in reached)
    assert any(name.startswith("Method") for name in reached)


def test_new_steps_come_in_without_disturbing(
    tmp_path: Path, open_tab: Any, sample: ModuleType, tools: ModuleType
) -> None:
    run = sample.Run("live", probes=2, steps=(0, 20, 40, 60))
    sample.write_run(tmp_path, run, steps=(0, 20))
    with tools.tensorboard(tmp_path) as address:
        following = open_tab(address)
        staying = open_tab(address, {"step": "0"})
        following.wait_text(".timeline output", "20 · latest")
        sample.write_run(tmp_path, run, steps=(40, 60))
        following.wait_text(".facts", "step 60")
        staying.wait_text(".timeline output", "of 60")
        assert staying.text(".timeline output") == "step 0 of 60"
        assert "step 0" in staying.text(".facts")
        for tab in (following, staying):
            tab.page.close()


def test_without_data_it_says_what_to_do(tmp_path: Path, chrome: Any, tools: ModuleType) -> None:
    with tools.tensorboard(tmp_path) as address:
        page = chrome.new_page()
        page.goto(tools.tab_address(address))
        tools.inside(page).wait_for_selector("text=run “vit train”")
        page.close()


def test_pack_and_the_page_agree_on_an_empty_row(chrome: Any, board: str) -> None:
    packed = pack(np.array([[0, 0, 0], [1, 0.25, 0]], np.float32))
    page = chrome.new_page()
    page.goto(f"{board}data/plugin_entry.html?name=vit_attention")
    found = page.evaluate(
        "async (p) => { const {rowOf, shares} = await import('./unpack.js');"
        " return [0, 1].map((i) => Array.from(shares(rowOf(p, i)))); }", packed)  # fmt: skip
    np.testing.assert_allclose(found, [[0, 0, 0], [0.8, 0.2, 0]], atol=0.01)
    page.close()
