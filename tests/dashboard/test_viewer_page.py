"""The viewer as one file on a disk, without any server."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vit.cli.viewer import Viewer
from vit.dashboard.page import render_page
from vit.data.preprocess import Preprocessing
from vit.explain.maps import Mapper
from vit.model import VisionTransformer


@pytest.fixture
def data(board: str, chrome: Any, sample: ModuleType) -> dict[str, Any]:
    """What TensorBoard serves of one run, put into a page."""
    window = chrome.new_page()

    def get(route: str, **parameters: Any) -> Any:
        return window.request.get(f"{board}data/plugin/vit_attention/{route}", params=parameters).json()

    runs = get("runs")
    runs["runs"] = [run for run in runs["runs"] if run["run"] == sample.EVIL_RUN]
    probes = {f"{sample.EVIL_RUN}\n{i}": get("probe", run=sample.EVIL_RUN, probe=i) for i in range(2)}
    pairs = {f"{sample.EVIL_RUN}\n{i}\n0": get("pairs", run=sample.EVIL_RUN, probe=i, step=0) for i in range(2)}
    window.close()
    return {"runs": runs, "probe": probes, "pairs": pairs}


def test_one_file_shows_the_same_and_asks_nobody(
    tmp_path: Path, data: dict[str, Any], chrome: Any, sample: ModuleType
) -> None:
    path = tmp_path / "index.html"
    path.write_text(render_page("</title><script>alert(3)</script>", data), encoding="utf-8")
    context = chrome.new_context(color_scheme="dark")
    window = context.new_page()
    trouble: list[str] = []
    requests: list[str] = []
    window.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    window.on("pageerror", lambda error: trouble.append(str(error)))
    window.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    window.on("request", lambda request: requests.append(request.url))
    window.goto(path.as_uri())
    window.wait_for_selector(".run .meaning:not(:empty)")
    assert window.locator(".run h2").inner_text() == sample.EVIL_RUN
    assert window.locator(".vit-viewer").get_attribute("data-theme") == "dark"
    window.locator(".picture.main").focus()
    window.keyboard.press("ArrowRight")
    window.get_by_label("Method", exact=True).select_option(label="Rollout")
    window.wait_for_function("document.querySelector('.meaning').textContent.includes('whatever the class')")
    assert "#" in window.url
    assert "method=rollout" in window.url
    window.reload()
    window.wait_for_function("document.querySelector('.meaning')?.textContent.includes('whatever the class')")
    assert not trouble
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_one_layer_and_one_head_are_spoken_of_as_one(tmp_path: Path, chrome: Any) -> None:
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 2, "width": 8, "depth": 1, "heads": 1, "registers": 1}
    viewer = Viewer(Mapper(VisionTransformer(**sizes).eval(), Preprocessing(image_size=(16, 16))), ["a", "b"], "m", 1)
    viewer.add([("image.png", np.zeros((16, 16, 3), np.uint8))])
    viewer.write(tmp_path / "index.html")
    window = chrome.new_page()
    window.goto((tmp_path / "index.html").as_uri())
    window.wait_for_selector(".run .meaning:not(:empty)")
    assert (
        window.locator(".run header")
        .inner_text()
        .endswith("1 layer, 1 head, 4 \N{MULTIPLICATION SIGN} 4 patches and 1 register")
    )
    for method, words in (("Rollout", "through its one layer, whatever the class."), ("Relevance", "its one layer.")):
        window.get_by_label("Method", exact=True).select_option(label=method)
        window.wait_for_function("words => document.querySelector('.meaning').textContent.endsWith(words)", arg=words)
    window.close()
