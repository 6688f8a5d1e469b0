"""Decoding and preprocessing beside timm, torchvision and transformers: photographs a second on one core.

From the file's name to a normalised array of 3 x 224 x 224, one photograph after another.  The arrays are compared with
timm's, which Pillow resizes as it does here; torchvision resizes tensors by another formula, and its decoder is another
build, so that its difference is shown and not judged.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contest import Contestant, contest, difference, interpreter, limit
from benchmarks.material import material
from benchmarks.results import parser, report, spread

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
    options = parser("preparing", "Decoding and preprocessing, photographs a second on one core.", peers=True)
    options.add_argument("--contestants", default=",".join(ABOUT))
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--least", type=float, default=1.0, help="seconds of a turn, at least (%(default)s)")
    options.add_argument("--image-size", type=int, default=224)
    given = options.parse_args(arguments)
    limit(1)
    stuff = material(given.peers, given.image_size)
    there = []
    for name in given.contestants.split(","):
        python = interpreter(name == "vit_classify", given.peers)
        if python is not None:
            builds = {"model": str(stuff.model("tiny")), "folder": str(stuff.photographs(100)), "count": 20}
            there.append(Contestant(name, "prepare.py", name, builds, python, name == "vit_classify"))
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
