"""Decoding and preprocessing beside timm, torchvision and transformers: photographs a second on one core.

From the file's name to a normalised array of 3 x 224 x 224, one photograph after another.  The arrays are compared with
timm's, which Pillow resizes as it does here; torchvision resizes tensors by another formula, and its decoder is another
build, so that its difference is shown and not judged.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contest import contest, difference, entered, limit, options
from benchmarks.material import material
from benchmarks.results import report, spread

ABOUT = {
    "vit_classify": "vit",
    "timm": "timm, Pillow",
    "torchvision_pillow": "torchvision, Pillow",
    "torchvision": "torchvision v2, tensors",
    "transformers": "transformers, processor",
}
LARGEST = 2e-2
"""Of means over 16 x 16 pixels, in units of the model's input (-1 to 1); a shift by a pixel changes them by more."""


def main(arguments: list[str]) -> int:
    about = "Decoding and preprocessing, photographs a second on one core."
    given = options("preparing", about, ABOUT, rounds=9, least=1.0).parse_args(arguments)
    limit(1)
    stuff = material(given.peers, given.image_size)
    builds = {"model": str(stuff.model("tiny")), "folder": str(stuff.photographs(100)), "count": 20}
    there = entered(given.contestants.split(","), "prepare.py", builds, ("vit_classify",), given.peers)
    contest(there, given.rounds, given.least)
    expected = next((each for each in there if each.builder == "timm"), there[0])
    rows = [["", "images/s", "times timm's", "differs from timm by", "MB"]]
    figures: dict[str, Any] = {}
    wrong = False
    for each in there:
        apart = difference(each.answer, expected.answer)
        bad = each.builder in ("vit_classify", "torchvision_pillow") and not apart <= LARGEST
        wrong |= bad
        faster = [base / own for base, own in zip(expected.seconds(), each.seconds(), strict=True)]
        rate = [1 / seconds for seconds in each.seconds()]
        row = [ABOUT[each.builder], spread(rate, 0), spread(faster), f"{apart:.1e}" + (" WRONG" if bad else "")]
        rows.append([*row, f"{each.megabytes:.0f}"])
        figures[each.builder] = {**each.figures(), "difference": apart}
    report("preparing", f"Decoding and preprocessing, one core{', drawn images' * stuff.drawn}", rows, figures, given)
    return int(wrong)
