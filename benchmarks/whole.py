"""`vit classify` as a whole process beside what else labels a folder of images: what a person at a prompt waits for.

The contestants: `vit classify` with either backend; timm, by the steps of its inference.py; the image-classification
pipeline of transformers; and a bare loop of NumPy, Pillow and ONNX Runtime.  The same weights, photographs and
preprocessing for all.

Answers are compared photograph by photograph with those of timm, or else of the bare loop: the same label, and
probabilities to 1e-3, or the row says WRONG and the exit status is 1.  transformers resizes with torchvision on
tensors, which rounds otherwise than Pillow, so of it only the share of equal labels is asked, at least 95%.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contest import PROGRAMS, TOLERANCE, Ran, interpreter, limit, measured, median, options, ratios, run
from benchmarks.material import Material, material
from benchmarks.results import report, spread

ABOUT = {
    "onnx": "vit classify",
    "torch": "vit classify --backend torch",
    "timm": "timm, as inference.py",
    "transformers": "transformers, pipeline",
    "transformers_batched": "transformers, pipeline, batches of 16",
    "bare": "bare loop, ONNX Runtime",
    "import_torch": 'python -c "import torch"',
}
Answers = dict[str, tuple[str, float]]  # label and probability by the photograph's name


def _options(name: str, about: str, contestants: list[str], rounds: int) -> argparse.ArgumentParser:
    made = options(name, about, contestants, rounds=rounds)
    made.add_argument("--size", choices=("tiny", "small"), default="tiny", help="of the model (%(default)s)")
    return made


def main_cold(arguments: list[str]) -> int:
    """One photograph in a fresh process."""
    contestants = ["onnx", "torch", "timm", "transformers", "bare", "import_torch"]
    made = _options("cold", "One photograph, labelled by a fresh process.", contestants, rounds=9)
    given = made.parse_args(arguments)
    limit(given.processors)
    stuff = material(given.peers, given.image_size)
    rows = [["one photograph", "seconds", "of the processor", "MB", "of timm's", "of transformers'", "the same answer"]]
    found, answers = compare(stuff, stuff.photographs(1), given)
    verdicts, wrong = judge(answers)
    for name, runs in found.items():
        row = [ABOUT[name], spread([each.seconds for each in runs]), spread([each.cpu for each in runs])]
        row.append(f"{median([each.megabytes for each in runs]):.0f}")
        row += [_share(found, name, "timm"), _share(found, name, "transformers")]
        rows.append([*row, verdicts.get(name, "")])
    figures = {name: [each.figures() for each in runs] for name, runs in found.items()}
    report("cold", f"One photograph, fresh process, ViT-{given.size}/16", rows, figures, given)
    return int(wrong)


def main_folder(arguments: list[str]) -> int:
    """Folders of photographs, from the call to the last row."""
    contestants = ["onnx", "torch", "timm", "transformers", "transformers_batched", "bare"]
    made = _options("folder", "A folder of photographs from the call to the last row.", contestants, rounds=3)
    made.add_argument("--counts", default="100,1000", help="photographs (%(default)s)")
    given = made.parse_args(arguments)
    limit(given.processors)
    stuff = material(given.peers, given.image_size)
    rows = [["images", "", "seconds", "images/s", "of the processor", "MB", "times timm's", "the same answer"]]
    figures: dict[str, Any] = {}
    wrong = False
    for count in map(int, given.counts.split(",")):
        found, answers = compare(stuff, stuff.photographs(count), given)
        verdicts, bad = judge(answers)
        wrong |= bad
        for name, runs in found.items():
            seconds = [each.seconds for each in runs]
            row = [str(count), ABOUT[name], spread(seconds, 1), f"{count / median(seconds):.1f}"]
            row += [spread([each.cpu for each in runs], 1), f"{median([each.megabytes for each in runs]):.0f}"]
            faster = ratios([each.seconds for each in found["timm"]], seconds) if "timm" in found else []
            rows.append([*row, spread(faster) if faster else "", verdicts[name]])
        figures[str(count)] = {name: [each.figures() for each in runs] for name, runs in found.items()}
    drawn = ", drawn images" if stuff.drawn else ""
    report("folder", f"A folder of photographs{drawn}, end to end, ViT-{given.size}/16", rows, figures, given)
    return int(wrong)


def compare(
    stuff: Material, photographs: Path, given: argparse.Namespace
) -> tuple[dict[str, list[Ran]], dict[str, Answers]]:
    """Run the contestants in turn; their figures and their last answers."""
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(stuff, photographs, given, Path(folder))
        there = [name for name in given.contestants.split(",") if name in commands]
        if left := set(given.contestants.split(",")) - set(there):
            print(f"not here: {', '.join(sorted(left))}; `python -m benchmarks peers` makes them", file=sys.stderr)
        found = measured({name: commands[name] for name in there}, given.rounds)
        answers = {name: read(Path(folder) / f"{name}.csv") for name in there if name != "import_torch"}
    return found, answers


def read(path: Path) -> Answers:
    """The answers in a table of any contestant."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        Path(row.get("path") or row["filename"]).name: (row["label"], float(row.get("probability") or row["prob"]))
        for row in rows
    }


def judge(answers: dict[str, Answers]) -> tuple[dict[str, str], bool]:
    """What is said of each contestant's answers, and whether any is wrong."""
    expected = next(answers[name] for name in ("timm", "bare", *answers) if name in answers)
    said, wrong = {}, False
    for name, given in answers.items():
        same = sum(given.get(key, ("", 0.0))[0] == label for key, (label, _) in expected.items())
        apart = max(abs(given[key][1] - expected[key][1]) if key in given else 1.0 for key in expected)
        bad = len(given) != len(expected) or (
            same < 0.95 * len(expected)
            if name.startswith("transformers")
            else same < len(expected) or not apart <= TOLERANCE
        )
        said[name] = f"{same} of {len(expected)}, {apart:.0e}" + (" WRONG" if bad else "")
        wrong |= bad
    return said, wrong


def _commands(
    stuff: Material, photographs: Path, given: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Ran]]:
    bundle, theirs = stuff.model(given.size), interpreter(False, given.peers)
    ours = interpreter(True, given.peers)
    classify = [ours, "-m", "vit", "classify", bundle, photographs, "--top-k", "1", "--output"]
    made: dict[str, list[Any]] = {
        "onnx": [*classify, folder / "onnx.csv", "--backend", "onnx"],
        "torch": [*classify, folder / "torch.csv", "--backend", "torch", "--device", "cpu"],
        "import_torch": [ours, "-c", "import torch"],
    }
    if theirs is not None:
        hub = f"{bundle}-transformers"
        made["timm"] = [theirs, PROGRAMS / "classify_timm.py", bundle, photographs, folder / "timm.csv"]
        pipeline = [theirs, PROGRAMS / "classify_transformers.py", hub, photographs]
        made["transformers"] = [*pipeline, folder / "transformers.csv"]
        made["transformers_batched"] = [*pipeline, folder / "transformers_batched.csv", "--batch-size", "16"]
        made["bare"] = [theirs, PROGRAMS / "classify_bare.py", bundle, photographs, folder / "bare.csv"]
    mine = ("onnx", "torch", "import_torch")
    return {name: partial(run, command, ours=name in mine) for name, command in made.items()}


def _share(found: dict[str, list[Ran]], name: str, base: str) -> str:
    if base not in found:
        return ""
    values = ratios([each.seconds for each in found[name]], [each.seconds for each in found[base]])
    return f"1/{1 / median(values):.1f}"
