"""Random-resized crops beside timm's loader: photographs a second, as a training step takes them.

From a folder to normalised batches of 3 x 224 x 224: decoded again in every epoch, or once (`data.cache=true`).  A turn
is a whole epoch or several, pauses between two included; the files are in memory.  The first epoch, in which workers
start and images are decoded for the cache, stands beside the others, and so does decoding for the cache alone.
The central squares of 20 photographs, block by block, have to be timm's.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contest import contest, difference, entered, limit, options, ratios
from benchmarks.material import material
from benchmarks.results import report, spread

ABOUT = {
    "vit_cached": "vit, data.cache=true",
    "vit_streamed": "vit, from the files",
    "vit_decoding": "vit, decoding for the cache",
    "timm": "timm's loader",
}
LARGEST = 0.1
"""Of means over 16 x 16 pixels, in units of the model's input (-2 to 2.6).  What is stored was resampled once before
and is a little softer than the original; a shift by a pixel changes more."""


def main(arguments: list[str]) -> int:
    made = options("crops", "Random-resized crops, photographs a second.", ABOUT, rounds=7, least=1.0)
    made.add_argument("--photographs", type=int, default=1000, help="in the folder (%(default)s)")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--workers", type=int, default=2, help="processes that decode, or threads (%(default)s)")
    given = made.parse_args(arguments)
    limit(given.processors)
    stuff = material(given.peers, given.image_size)
    builds = {
        "folder": str(stuff.photographs(given.photographs)),
        "few": str(stuff.photographs(20)),
        "size": given.image_size,
        "batch": given.batch_size,
        "workers": given.workers,
    }
    there = entered(given.contestants.split(","), "crops.py", builds, ABOUT.keys() - {"timm"}, given.peers)
    contest(there, given.rounds, given.least)
    reference = next((each for each in there if each.builder == "timm"), None)
    expected = reference or next(each for each in there if each.answer is not None)
    rows = [["", "images/s", "times timm's", "first epoch, s", "differs by"]]
    figures: dict[str, Any] = {}
    wrong = False
    for each in there:
        apart = None if each.answer is None else difference(each.answer, expected.answer)
        bad = apart is not None and not apart <= LARGEST
        wrong |= bad
        seen = given.photographs if each.builder == "vit_decoding" else in_batches(given.photographs, given.batch_size)
        rate = [seen / seconds for seconds in each.seconds()]
        row = [ABOUT[each.builder], spread(rate, 0)]
        if reference is None:
            row.append("")
        else:
            base = [in_batches(given.photographs, given.batch_size) / seconds for seconds in reference.seconds()]
            row.append(spread(ratios(rate, base)))
        row.append(f"{each.first:.1f}")
        row.append("" if apart is None else f"{apart:.1e}" + " WRONG" * bad)
        rows.append(row)
        figures[each.builder] = {**each.figures(), "images": seen, "difference": apart}
    drawn = ", drawn images" * stuff.drawn
    title = f"Random-resized crops, {given.photographs} photographs{drawn}, batches of {given.batch_size}"
    report("crops", title, rows, figures, given)
    return int(wrong)


def in_batches(count: int, batch: int) -> int:
    """How many of `count` images an epoch of training takes: timm leaves out the last, partial batch, and so does this
    project."""
    return count // batch * batch or count
