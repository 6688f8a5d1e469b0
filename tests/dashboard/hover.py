"""From the pointer's event to the picture: how long a person waits for what a patch looks at.

    python tests/dashboard/hover.py LOGDIR

Moves a real pointer over the large map of the Attention tab in a real TensorBoard, and prints two times in ms, as
median and largest of 100 moves: until all is drawn (the page's own work) and until the browser has put the next
picture together.  `python tests/dashboard/sample.py LOGDIR --full` writes a log of the size of a ViT-Ti/16.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path

# Listeners at the window run before and after the page's own; the picture is there after the next animation frame
MARKS = """() => {
  window.vitTimes = [];
  window.addEventListener("pointermove", () => performance.mark("event"), true);
  window.addEventListener("pointermove", () => {
    const drawn = performance.measure("drawn", "event").duration;
    const channel = new MessageChannel();
    requestAnimationFrame(() => {
      channel.port1.onmessage = () => window.vitTimes.push([drawn, performance.measure("shown", "event").duration]);
      channel.port2.postMessage(null);
    });
  });
}"""


def main(logdir: Path) -> None:
    spec = importlib.util.spec_from_file_location("screenshot", Path(__file__).with_name("screenshot.py"))
    assert spec is not None
    assert spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    with tools.tensorboard(logdir) as address, tools.browser() as running:
        page = running.new_page(viewport={"width": 1280, "height": 1100})
        tools.wait_for_runs(page, address)
        page.goto(tools.tab_address(address))
        frame = tools.viewer(page)
        frame.wait_for_selector(".small-map")
        frame.evaluate(MARKS)
        box = frame.locator(".picture.main").bounding_box()
        for move in range(100):
            x, y = (0.37 * move) % 1, (0.61 * move) % 1
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            page.wait_for_timeout(30)
        times = list(zip(*frame.evaluate("window.vitTimes"), strict=True))
        facts = frame.locator(".facts").inner_text()
    print(f"{facts}: {len(times[0])} moves")
    for name, found in zip(("drawn", "shown"), times, strict=True):
        print(f"{name}  median {statistics.median(found):.1f} ms  largest {max(found):.1f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
