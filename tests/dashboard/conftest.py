"""A real TensorBoard on a synthetic log, and a real browser that looks at its Attention tab."""

from __future__ import annotations

import importlib.util
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def beside(name: str) -> ModuleType:
    """A module of this folder, which is a program as well."""
    spec = importlib.util.spec_from_file_location(f"dashboard_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    if spec.name not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
    return sys.modules[spec.name]


@pytest.fixture(scope="session")
def sample() -> ModuleType:
    """The module `sample.py`: writes synthetic logs."""
    return beside("sample")


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    """The module `screenshot.py`: starts TensorBoard and the browser."""
    return beside("screenshot")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, sample: ModuleType) -> Path:
    """A log with every kind of run there is in `sample.RUNS`.  Read only."""
    folder = tmp_path_factory.mktemp("log")
    sample.write_log(folder)
    return folder


@pytest.fixture(scope="module")
def board(log: Path, tools: ModuleType) -> Iterator[str]:
    """The address of a TensorBoard that shows `log`."""
    with tools.tensorboard(log) as address:
        yield address


@pytest.fixture(scope="module")
def chrome(tools: ModuleType) -> Iterator[Any]:
    """A running browser.  Not for the session: while it is there, this thread has a running event loop."""
    pytest.importorskip("playwright", reason="playwright is not installed: python -m pip install -e '.[dev]'")
    if tools.chromium() is None:
        pytest.skip("there is no chromium on the path: apt-get install chromium")
    with tools.browser() as running:
        yield running


@dataclass
class Tab:
    """The Attention tab in a window, and how to use it."""

    page: Any
    frame: Any
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.frame.locator(selector).all_inner_texts()]

    def text(self, selector: str) -> str:
        return self.frame.locator(selector).first.inner_text().strip()

    def wait_text(self, selector: str, part: str) -> None:
        """Until the first `selector` says `part`."""
        self.frame.wait_for_function(
            "([s, part]) => document.querySelector(s)?.textContent.includes(part)", arg=[selector, part]
        )

    def choose(self, label: str, option: str, within: str = ".controls") -> None:
        """Pick `option`, as it reads, from the list labelled `label`."""
        self.frame.locator(within).first.get_by_label(label, exact=True).select_option(label=option)
        self.settle()

    def press(self, label: str) -> None:
        """Pick one of a few alternatives."""
        self.frame.locator(".controls").get_by_label(label, exact=True).check()
        self.settle()

    def run(self, name: str, on: bool) -> None:
        """Choose a run, or leave it out."""
        self.frame.get_by_role("checkbox", name=name, exact=True).set_checked(on)
        self.settle()

    def step(self, index: int) -> None:
        """Move the slider."""
        self.frame.locator(".timeline input").fill(str(index))
        self.settle()

    def settle(self) -> None:
        """Until all that was to be fetched is fetched, and drawn."""
        # what a choice needs is asked for when it is drawn, in the next picture
        self.frame.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.frame.wait_for_function("!document.querySelector('.run[aria-busy=true]')")

    def pixels(self, selector: str = ".picture.main canvas", nth: int = 0) -> np.ndarray:
        """The colours of a map, (rows, columns, 3)."""
        size, data = (
            self.frame.locator(selector)
            .nth(nth)
            .evaluate(
                "(c) => [[c.height, c.width],"
                " Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
            )
        )
        return np.array(data, np.uint8).reshape(*size, 4)[..., :3]

    def patch(self, row: int, column: int, grid: tuple[int, int], nth: int = 0) -> tuple[float, float]:
        """Where the middle of a patch of the large map is in the window."""
        node = self.frame.locator(".picture.main").nth(nth)
        node.scroll_into_view_if_needed()
        box = node.bounding_box()
        return (box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"])

    def parameters(self) -> dict[str, str]:
        """What the address of the window says about the tab."""
        # sliding is written to the address a moment later, by this frame's clock and then by the page around it
        self.frame.evaluate("() => new Promise((done) => setTimeout(done, 450))")
        self.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
        parts = [part.split("=") for part in urllib.parse.urlsplit(self.page.url).fragment.split("&")]
        return {
            part[0].removeprefix("p.vit_attention."): urllib.parse.unquote(part[1]) for part in parts if len(part) == 2
        }


@pytest.fixture
def open_tab(chrome: Any, tools: ModuleType) -> Iterator[Any]:
    """`open_tab(address, state={}, **context)` gives a `Tab`; errors on its console fail the test in the end.

    With `alone` only the tab is loaded, without the rest of TensorBoard's page around it: that is quicker.
    """
    contexts, tabs = [], []

    def opened(
        address: str, state: dict[str, str] | None = None, link: str | None = None, alone: bool = False, **options: Any
    ) -> Tab:
        options.setdefault("viewport", {"width": 1280, "height": 1100})
        contexts.append(chrome.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        tab = Tab(page, None)
        tabs.append(tab)
        page.on("console", lambda message: tab.errors.extend(_error(message)))
        page.on("pageerror", lambda error: tab.errors.append(str(error)))
        page.on("dialog", lambda dialog: (tab.dialogs.append(dialog.message), dialog.dismiss()))
        tools.wait_for_runs(page, address)
        own = f"{address}data/plugin_entry.html?name=vit_attention#{urllib.parse.urlencode(state or {})}"
        page.goto(link or (own if alone else tools.tab_address(address, state)))
        tab.frame = tools.viewer(page)
        return tab

    yield opened
    for context in contexts:
        context.close()
    for tab in tabs:
        assert not tab.errors
        assert not tab.dialogs


def _error(message: Any) -> list[str]:
    url = message.location["url"]
    # a browser asks for an icon of its own accord
    return [f"{message.text} ({url})"] if message.type == "error" and not url.endswith("/favicon.ico") else []
