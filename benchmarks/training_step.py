"""A step of training beside timm, transformers and vit-pytorch: forward, backward and AdamW, data at hand.

Small images (ViT-Ti/4 at 32) and large ones (ViT-Ti/16 at 224).  The same weights and images: the losses of the first
three steps must agree to 1e-3 (vit-pytorch's model cannot take the weights).  A share is of the machine's product of
two matrices, at three times the arithmetic of a forward pass; the optimiser's own is not counted.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.contest import TOLERANCE, contest, difference, entered, limit, median, options, ratios
from benchmarks.material import material
from benchmarks.results import report, spread

ABOUT = {
    "vit": "vit, AdamW",
    "vit_muon": "vit, Muon",
    "timm": "timm, AdamW",
    "transformers": "transformers, AdamW",
    "vit_pytorch": "vit-pytorch, AdamW",
}
CASES = {"32": ("tiny32", 128), "224": ("tiny", 16)}
"""Model and images a step, by the side of an image."""


def main(arguments: list[str]) -> int:
    made = options("step", "A step of training, beside other libraries.", ABOUT, rounds=7, least=1.0)
    made.add_argument("--cases", default=",".join(CASES), help="of images' sides: 32, 224 (%(default)s)")
    made.add_argument("--batch-size", type=int, help="instead of 128 and 16")
    given = made.parse_args(arguments)
    limit(given.processors)
    stuff = material(given.peers, given.image_size)
    rows = [["model", "", "ms a step", "images/s", "of the limit", "of timm's time", "losses", "MB"]]
    figures: dict[str, Any] = {}
    wrong = False
    for case in given.cases.split(","):
        name, batch = CASES[case]
        batch = given.batch_size or batch
        model = stuff.model(name)
        architecture = json.loads((model / "config.json").read_text("ascii"))["vit"]["architecture"]
        side = architecture["image_size"][0]
        about = f"Ti/{architecture['patch_size'][0]} at {side}, batch {batch}"
        builds = {"model": str(model), "batch": batch, "size": side}
        there = entered(given.contestants.split(","), "step.py", builds, ("vit", "vit_muon"), given.peers)
        there += entered(["product"], "step.py", {"size": 2048}, ["product"], given.peers)
        contest(there, given.rounds, given.least)
        *runners, product = there
        peak = [2 * 2048**3 / seconds for seconds in product.seconds()]
        reference = next((each for each in runners if each.builder == "timm"), None)
        expected = next(each.answer for each in runners if each.answer is not None)
        for each in runners:
            apart = None if each.answer is None else difference(each.answer, expected)
            wrong |= apart is not None and not apart <= TOLERANCE
            work = batch * 3 * stuff.flops(name)  # forward, and back for the gradients of inputs and of weights
            share = [100 * work / seconds / top for seconds, top in zip(each.seconds(), peak, strict=True)]
            row = [about, ABOUT[each.builder], spread([1000 * seconds for seconds in each.seconds()], 0)]
            row += [f"{batch / median(each.seconds()):.1f}", spread(share, 0, "%")]
            row.append(spread(ratios(each.seconds(), reference.seconds())) if reference else "")
            row.append("not the same" if apart is None else f"{apart:.0e}" + ("" if apart <= TOLERANCE else " WRONG"))
            rows.append([*row, f"{each.megabytes:.0f}"])
        rows.append([about, "limit", "", "", f"{median(peak) / 1e9:.0f} GFLOP/s", "", "", ""])
        figures[about] = {each.builder: each.figures() for each in there}
    report("step", "A step of training", rows, figures, given)
    return int(wrong)
