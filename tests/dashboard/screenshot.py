"""Pictures of the Attention tab in a real TensorBoard.

    python tests/dashboard/screenshot.py LOGDIR OUT.png [--state 'method=rollout&step=40'] [--dark] [--width 1280]

`shoot` and `tensorboard` serve the tests as well.  Needs playwright and a chromium on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Frame, Page

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str | None:
    """Where a Chromium is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[str]:
    """A real TensorBoard on a free port of this machine, as its address; it is over when the block is."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, "--port", "0", "--reload_interval", "1", *options],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
        )
        try:
            for _ in range(1200):
                ended = process.poll() is not None
                said.seek(0)
                if found := re.search(r" at (http://\S+?/) ", text := said.read()):
                    break
                if ended:
                    raise RuntimeError(f"tensorboard ended with status {process.returncode}: {text}")
                time.sleep(0.1)
            else:
                raise RuntimeError(f"tensorboard is not up after two minutes: {text}")
            yield found[1]
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        try:
            yield running
        finally:
            running.close()


def tab_address(address: str, state: dict[str, str] | None = None) -> str:
    """The address of the Attention tab with parameters of its own."""
    own = [f"p.vit_attention.{name}={urllib.parse.quote(value, safe='')}" for name, value in (state or {}).items()]
    return f"{address}#" + "&".join(["vit_attention", *own])


def inside(page: Page) -> Frame:
    """The frame that TensorBoard makes for the tab."""
    node = page.wait_for_selector("iframe[src*=vit_attention]", state="attached", timeout=60_000)
    frame = node and node.content_frame()
    assert frame
    return frame


def viewer(page: Page) -> Frame:
    """The frame of the Attention tab, once there is a map, or a word on why not."""
    return ready(page.main_frame if "plugin_entry" in page.url else inside(page))


def ready(frame: Frame) -> Frame:
    """`frame` once the viewer in it has drawn what it fetched."""
    frame.wait_for_selector(".run .meaning:not(:empty), .run .message:not([hidden]):not(:empty)", timeout=60_000)
    frame.wait_for_function("!document.querySelector('.run[aria-busy=true]')")
    return frame


def shoot(logdir: Path, state: dict[str, str], out: Path, width: int = 1280, height: int = 860,
          dark: bool = False) -> None:  # fmt: skip
    """A picture of the tab with `state` (parameters of the URL) in a window of `width` x `height`."""
    with tensorboard(logdir) as address, browser() as running:
        page = running.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        wait_for_runs(page, address)
        page.goto(tab_address(address, state))
        viewer(page)
        page.wait_for_timeout(800)
        page.screenshot(path=out)


def wait_for_runs(page: Page, address: str) -> None:
    """Until TensorBoard has read something of the log."""
    for _ in range(200):
        answer: dict[str, Any] = page.request.get(f"{address}data/plugin/vit_attention/runs").json()
        if answer.get("runs"):
            return
        time.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--state", default="", help="as in the URL, without p.vit_attention.")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    wanted = dict(urllib.parse.parse_qsl(given.state))
    shoot(given.logdir, wanted, given.out, given.width, given.height, given.dark)
