"""A forward pass without anything around it: this project's two backends beside timm, transformers, torchvision and
vit-pytorch, and the machine's own limit.

The same weights and images for all (vit-pytorch's model cannot take them: it has two norms more and no bias on
queries, keys and values).  The limit is a product of two 2048 x 2048 float32 matrices, measured in the same
rounds, whichever of torch and NumPy is faster at it; a share is of that, at the operations that `vit.model.cost`
counts.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contest import TOLERANCE, contest, difference, entered, limit, median, options, ratios
from benchmarks.material import material
from benchmarks.results import report, spread

ABOUT = {
    "vit_onnx": "vit, ONNX Runtime",
    "vit_torch": "vit, torch",
    "timm": "timm",
    "timm_compiled": "timm, torch.compile",
    "transformers": "transformers",
    "torchvision": "torchvision",
    "vit_pytorch": "vit-pytorch",
}
PRODUCT = 2048


def main(arguments: list[str]) -> int:
    about = "A forward pass alone, beside other libraries and the machine's limit."
    made = options("forward", about, (name for name in ABOUT if name != "timm_compiled"), rounds=9, least=0.7)
    made.add_argument("--sizes", default="tiny,small", help="of models: tiny, small (%(default)s)")
    made.add_argument("--batches", default="1,16", help="images at once (%(default)s)")
    given = made.parse_args(arguments)
    limit(given.processors)
    given_all = material(given.peers, given.image_size)
    rows = [["model", "batch", "", "ms an image", "images/s", "of the limit", "of timm's time", "logits", "MB"]]
    figures: dict[str, Any] = {}
    wrong = False
    for size in given.sizes.split(","):
        bundle = given_all.model(size)
        for batch in map(int, given.batches.split(",")):
            builds = {"model": str(bundle), "batch": batch}
            there = entered(given.contestants.split(","), "forward.py", builds, ("vit_onnx", "vit_torch"), given.peers)
            square = {"size": PRODUCT if given.image_size == 224 else 256}
            there += entered(["product"], "forward.py", square, ["product"], given.peers)
            contest(there, given.rounds, given.least)
            *runners, product = there
            peak = [2 * product.given["size"] ** 3 / seconds for seconds in product.seconds()]
            reference = next((each for each in runners if each.builder == "timm"), None)
            expected = next(each.answer for each in runners if each.answer is not None)
            for each in runners:
                apart = None if each.answer is None else difference(each.answer, expected)
                wrong |= apart is not None and not apart <= TOLERANCE
                work = batch * given_all.flops(size)
                share = [100 * work / seconds / limit_ for seconds, limit_ in zip(each.seconds(), peak, strict=True)]
                rows.append(
                    [
                        f"{size}/16",
                        str(batch),
                        ABOUT[each.builder],
                        spread([1000 * seconds / batch for seconds in each.seconds()], 1),
                        f"{batch / median(each.seconds()):.1f}",
                        "own model" if each.builder == "vit_pytorch" else spread(share, 0, "%"),
                        spread(ratios(each.seconds(), reference.seconds()), 2) if reference else "",
                        "not the same" if apart is None else f"{apart:.0e}" + ("" if apart <= TOLERANCE else " WRONG"),
                        f"{each.megabytes:.0f}",
                    ]
                )
            key = f"{size}/16 batch {batch}"
            figures[key] = {each.builder: each.figures() for each in there}
            rows.append([f"{size}/16", str(batch), "limit", "", "", f"{median(peak) / 1e9:.0f} GFLOP/s", "", "", ""])
    report("forward", "A forward pass alone", rows, figures, given)
    return int(wrong)
