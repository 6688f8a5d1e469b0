"""An epoch of training at 224 beside timm: photographs from their files, random-resized crops, forward, back, AdamW.

What `crops` and `step` measure apart, together on the same cores: workers that decode take from what computes.  With
`data.cache=true` photographs were decoded once, before; so they were for WebDataset, whose shards hold JPEGs of quality
95 with a shorter side of 256.  A turn is a whole epoch.  The same weights: the mean loss of
20 photographs' central squares before any step must agree.

With `--workers 0` nothing runs in other processes, and the time is the processor's: other programs hardly change it.

Each contestant is started several times: one process may be some percent faster than another of the same program from
beginning to end, which is as much as loading takes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contest import contest, difference, entered, limit, median, options, ratios
from benchmarks.crops import in_batches
from benchmarks.material import material
from benchmarks.results import report, spread

ABOUT = {
    "vit_cached": "vit, data.cache=true",
    "vit_streamed": "vit, from the files",
    "timm": "timm's loader, model and AdamW",
    "torchvision": "vit behind torchvision's decoder",
    "webdataset": "vit behind WebDataset's shards",
}
DEFAULT = ("vit_cached", "vit_streamed", "timm")
LARGEST = 0.01
"""Of losses, relative: crops are not resampled alike, see `benchmarks/crops.py`."""


def main(arguments: list[str]) -> int:
    made = options("epoch", "An epoch of training on photographs, beside timm.", DEFAULT, rounds=2, least=0.0)
    made.add_argument("--photographs", type=int, default=256, help="in the folder (%(default)s)")
    made.add_argument("--pixels", metavar="WxH", help="enlarge them to that, 1600x1200 say (as they are)")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--workers", type=int, default=2, help="processes that decode, or threads (%(default)s)")
    made.add_argument("--starts", type=int, default=3, help="processes of each, with as many rounds (%(default)s)")
    made.add_argument("--model", default="tiny", help="of the material's: nano, tiny, small (%(default)s)")
    given = made.parse_args(arguments)
    limit(given.processors)
    stuff = material(given.peers, given.image_size)
    builds = {
        "model": str(stuff.model(given.model)),
        "folder": str(stuff.photographs(given.photographs, given.pixels)),
        "few": str(stuff.photographs(20)),
        "size": given.image_size,
        "batch": given.batch_size,
        "workers": given.workers,
    }
    names = given.contestants.split(",")
    starts = [entered(names, "epoch.py", builds, ABOUT.keys() - {"timm"}, given.peers) for _ in range(given.starts)]
    for start in starts:
        contest(start, given.rounds, given.least)
    there = starts[0]
    for own, *others in zip(*starts, strict=True):
        own.turns += [turn for other in others for turn in other.turns]
    base = min(there, key=lambda each: (each.builder != "timm", each.builder != "vit_streamed"))
    seen = in_batches(given.photographs, given.batch_size)

    def times(each: Any) -> list[float]:
        return [turn["seconds" if given.workers else "cpu"] for turn in each.turns]

    rows = [["", "s an epoch", "images/s", f"times {ABOUT[base.builder]}", "first epoch, s", "loss differs by", "MB"]]
    figures: dict[str, Any] = {}
    wrong = False
    for each in there:
        apart = difference(each.answer, base.answer)
        bad = not apart <= LARGEST
        wrong |= bad
        row = [ABOUT[each.builder], spread(times(each), 2), f"{seen / median(times(each)):.1f}"]
        row.append(spread(ratios(times(base), times(each))))
        rows.append([*row, f"{each.first:.1f}", f"{apart:.1e}" + " WRONG" * bad, f"{each.megabytes:.0f}"])
        figures[each.builder] = {**each.figures(), "images": seen, "difference": apart}
    drawn = ", drawn images" * stuff.drawn
    large = f" of {given.pixels}" if given.pixels else ""
    title = f"An epoch of {given.model} at {given.image_size}, {given.photographs} photographs{large}{drawn}"
    title += f", batches of {given.batch_size}"
    report("epoch", title, rows, figures, given)
    return int(wrong)
