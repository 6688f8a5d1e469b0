"""Training and classifying beside other busy programs, as a machine has them that somebody works on.

Each contestant is a process, alone and beside so many programs of one thread that never rest, in turn:
`python train.py`, the default; a plain loop of timm's model and AdamW on the same images, with the threads that torch
takes by itself; and `vit classify` on a folder of drawn photographs.  Images a second of training are those of its
steps, without start-up; of classifying those of the whole command.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.contest import PROGRAMS, ROOT, Ran, median, run
from benchmarks.results import parser, report, spread

ABOUT = {"train": "`python train.py`", "timm": "timm's model in a plain loop", "classify": "`vit classify`, ViT-Ti/16"}
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1_000_000): pass"
"""Given the process that started it, with which it ends."""


def main(arguments: list[str]) -> int:
    options = parser("busy", "Training and classifying beside busy programs.")
    options.add_argument("--contestants", default=",".join(ABOUT), help="of %(default)s")
    options.add_argument("--beside", default="0,1,2,4", help="so many busy programs (%(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options.add_argument("--epochs", type=int, default=5, help="of training (%(default)s)")
    options.add_argument("--photographs", type=int, default=200, help="to classify (%(default)s)")
    given = options.parse_args(arguments)
    counts = [int(count) for count in given.beside.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(given.contestants.split(","), Path(folder), given.epochs, given.photographs)
        found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in contestants}
        for round_ in range(given.rounds):
            for count in reversed(counts) if round_ % 2 else counts:
                for name, measure in contestants.items():
                    with busy(count):
                        found[name][count].append(measure())
                    print(f"{name} beside {count}: {found[name][count][-1]:.1f} images/s", file=sys.stderr, flush=True)
    first, *others = counts
    rows = [["images/s", f"beside {first}" if first else "alone", *(f"beside {count}" for count in others)]]
    for name, by_count in found.items():
        row = [ABOUT[name], spread(by_count[first], 0)]
        for count in others:
            part = 100 * median([a / b for a, b in zip(by_count[count], by_count[first], strict=True)])
            row.append(f"{spread(by_count[count], 0)}, {part:.0f}%")
        rows.append(row)
    report("busy", "Beside busy programs", rows, found, given)
    return 0


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many programs beside what is inside, each of which would use one processor whole."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for each in programs:
            each.kill()
        for each in programs:
            each.wait(60)


def _contestants(names: list[str], folder: Path, epochs: int, photographs: int) -> dict[str, Callable[[], float]]:
    """Functions that run a contestant once and return its images a second."""

    def train() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            length = [f"trainer.max_epochs={epochs}", "export.onnx=false"]
            run([sys.executable, ROOT / "train.py", f"run.root={runs}", *length], ours=True)
            (metrics,) = Path(runs).glob("*/*/metrics.json")
            return json.loads(metrics.read_text())["images_per_second"]

    def timm() -> float:
        return json.loads(run([sys.executable, PROGRAMS / "plain_timm.py", str(epochs)], ours=True).output)

    def classify() -> float:
        command = [sys.executable, "-m", "vit", "classify", folder / "bundle", folder / "photographs"]
        done: Ran = run([*command, "--format", "jsonl"], ours=True)
        assert len(done.output.splitlines()) == photographs
        return photographs / done.seconds

    every: dict[str, Callable[[], float]] = {"train": train, "timm": timm, "classify": classify}
    if "classify" in names:
        _prepare(folder, photographs)
    return {name: every[name] for name in names}


def _prepare(folder: Path, photographs: int) -> None:
    from benchmarks.material import draw
    from vit.data.preprocess import Preprocessing
    from vit.inference.bundle import write_bundle
    from vit.inference.description import Description
    from vit.model import VisionTransformer

    (folder / "photographs").mkdir()
    draw(folder / "photographs", photographs)
    model = VisionTransformer(image_size=224, patch_size=16, num_classes=10, size="tiny").eval()
    names: list[Any] = [f"class {k}" for k in range(10)]
    description = Description(
        architecture=model.architecture, class_names=names, preprocessing=Preprocessing(image_size=(224, 224))
    )
    write_bundle(folder / "bundle", model, description, onnx=True)
