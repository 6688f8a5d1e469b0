"""Training at equal wall-clock: `train.py` beside timm's, vit-pytorch's documented recipe and a plain Lightning loop.

    python -m benchmarks race --data fashion_mnist
    python -m benchmarks race --data cifar10 --cifar FOLDER       a folder of Parquet files

What is compared is products, so each peer first runs through a small search on validation images: from what it
documents, one decision after another, keeping what is better (`SEARCH`).  This project runs `experiment=..._cpu` as it
stands.  Then all train on the same images for the same time, in turn, several seeds each.

Notable
- The clock runs from the first batch to the last step, and stands still during validation.  Every schedule is a
  function of the time that is left, so all reach their end.
- All models are as wide and deep as this project's recipe, with its patches; parameters and operations are printed.
- Validation images are cut from train, by this project's own split.  They choose decisions in the search, and weights
  at the end; the test split is touched once a run, and never in the search.
- Every run is written down as soon as it is over: `--go-on` takes what is in the JSON file already.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contest import PROGRAMS, ROOT, interpreter, limit, run
from benchmarks.results import HERE, parser, report, spread
from vit.files import atomic_write

ABOUT = {
    "vit": "`train.py`",
    "timm": "timm, as its train.py",
    "vit_pytorch": "vit-pytorch, as documented",
    "lightning": "a plain Lightning loop",
}
RECIPES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "fashion_mnist": ("experiment=fashion_mnist_cpu",),
    "cifar10": ("experiment=cifar10_cpu", "data=parquet"),
}
TITLES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
TARGETS = {"digits": (80, 90), "fashion_mnist": (80, 85), "cifar10": (50, 60)}
"""Validation accuracies in percent, to which the seconds are told."""

Choices = dict[str, Any]
START: dict[str, Choices] = {
    # what train.py does where nothing is said, but for its SGD, with which no ViT is trained, and workers for 2 cores
    "timm": {
        **{"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "batch_size": 128, "sched": "cosine", "warmup": 0.05},
        **{"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3], "color_jitter": 0.4, "smoothing": 0.1, "mixup": 0.0},
        **{"gp": "token", "qk_norm": False, "patch_drop": 0.0, "workers": 2, "fallback_lr_scale": 1.0},
    },
    "vit_pytorch": {
        **{"model": "ViT", "patch_dropout": 0.0, "lr": 3e-5, "schedule": "step", "batch_size": 64},
        **{"crop": [0.08, 1.0], "workers": 0},
    },
    "lightning": {
        **{"lr": 3e-4, "batch_size": 128, "dropout": 0.2, "schedule": "steps", "clip": 1.0, "pool": "token"},
        **{"crop": [0.8, 1.0], "workers": 2},
    },
}
SEARCH: dict[str, list[list[Choices]]] = {
    "timm": [
        [{"color_jitter": None, "scale": [0.6, 1.0]}, {"color_jitter": None, "scale": [1, 1], "ratio": [1, 1]}],
        [
            *({"lr": 3e-3}, {"opt": "muon", "lr": 2e-3}, {"opt": "nmuon", "lr": 6e-3}),
            {"opt": "nmuon", "lr": 6e-3, "fallback_lr_scale": 1 / 3},  # about what this project's recipes come to
        ],
        [{"batch_size": 64}, {"batch_size": 256}],
        [{"gp": "avg"}],
        [{"qk_norm": True}],
        [{"patch_drop": 0.25}, {"patch_drop": 0.5}],
        [{"mixup": 0.2}],
        [{"workers": 1}],
    ],
    "vit_pytorch": [
        [{"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3}],
        [{"crop": None}, {"crop": "pad"}],
        [{"schedule": "cosine"}],
        [{"model": "ViT mean"}, {"model": "SimpleViT"}, {"model": "SimpleViT QK norm"}],
        [{"batch_size": 128}],
        [{"model": "ViT mean", "patch_dropout": 0.25}, {"model": "SimpleViT", "patch_dropout": 0.25}],
        [{"workers": 1}],
    ],
    "lightning": [
        [{"lr": 1e-3}, {"lr": 3e-3}],
        [{"crop": None}, {"crop": "pad"}],
        [{"schedule": "cosine"}],
        [{"dropout": 0.0}],
        [{"pool": "mean"}],
        [{"batch_size": 64}, {"batch_size": 256}],
        [{"workers": 1}],
    ],
}
"""Decisions in order; of each, what is tried beside what is best so far."""

SEARCH_SEED = 1000


def main(arguments: list[str]) -> int:
    options = parser("race", "Training at equal wall-clock, beside other tools.", peers=True)
    options.add_argument("--data", choices=tuple(RECIPES), default="fashion_mnist", help="(%(default)s)")
    options.add_argument("--cifar", type=Path, metavar="FOLDER", help="Parquet files of CIFAR-10")
    options.add_argument("--seconds", type=float, default=180, help="of training (%(default)s)")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--points", type=int, default=12, help="of the curve (%(default)s)")
    options.add_argument("--search-seconds", type=float, help="of a trial of the search (a quarter of --seconds)")
    options.add_argument("--chosen", type=Path, metavar="FILE", help="choices instead of a search; a race's JSON too")
    options.add_argument("--contestants", default=",".join(ABOUT), help="of %(default)s")
    options.add_argument("--go-on", action="store_true", help="keep the runs that the JSON file has")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for train.py and its data")
    given = options.parse_args(arguments)
    if given.data == "cifar10" and given.cifar is None:
        options.error("--data cifar10 needs --cifar FOLDER")
    names = given.contestants.split(",")
    if unknown := sorted(set(names) - set(ABOUT)):
        options.error(f"--contestants: no {unknown[0]!r}; there are {', '.join(ABOUT)}")
    if any(interpreter(name == "vit", given.peers) is None for name in names):
        options.error(f"--peers: no environment in {given.peers}; make one: python -m benchmarks peers --peers FOLDER")
    given.json = given.json or HERE / "measured" / f"race-{given.data}.json"
    given.search_seconds = given.search_seconds or given.seconds / 4
    limit(given.processors)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(given, Path(folder))
        race.prepare()
        for name in names:
            if name != "vit":
                race.search(name)
        seeds = [int(seed) for seed in given.seeds.split(",")]
        for round_, seed in enumerate(seeds):
            for name in reversed(names) if round_ % 2 else names:
                race.finals(name, seed)
    about = race.figures["data"]
    copy = f" ({about['copy']})" if about["copy"] else ""
    title = f"Training for {given.seconds:g} s: {TITLES[given.data]}{copy}"
    rows = table(race.figures, names, seeds, given.seconds, TARGETS[given.data])
    report("race", title, rows, race.figures, given)
    return 0


class Race:
    """All runs of a race, each written down when it is over.

    Attributes:
        figures: "data" as `benchmarks/race_data.py` has it; "search" by contestant, every trial in order; "chosen";
            "runs" by contestant and seed.
    """

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.figures: dict[str, Any] = {"data": {}, "search": {}, "chosen": {}, "runs": {}}
        if given.go_on and given.json.exists():
            self.figures |= json.loads(given.json.read_text("utf-8"))["figures"]
        if given.chosen is not None:
            kept = json.loads(given.chosen.read_text("utf-8"))
            kept = kept.get("figures", {"chosen": kept})
            self.figures["chosen"] |= kept["chosen"]
            self.figures["search"] |= kept.get("search", {})
        self.typed = [*RECIPES[given.data], *([f"data.root={given.cifar.resolve()}"] if given.cifar else [])]
        self.typed += given.set

    def prepare(self) -> None:
        (self.folder / "data").mkdir()
        command = [sys.executable, "-m", "benchmarks.race_data", str(self.folder / "data"), *self.typed]
        subprocess.run(command, check=True, cwd=ROOT)
        self.figures["data"] = json.loads((self.folder / "data" / "about.json").read_text("utf-8"))

    def search(self, name: str) -> None:
        """Take one decision after another on validation images; what is not better by them is left as it was."""
        if name in self.figures["chosen"]:
            return
        trials: list[dict[str, Any]] = []
        before = self.figures["search"].get(name, [])

        def trial(choices: Choices) -> float:
            known = next((each for each in (*before, *trials) if each["choices"] == choices), None)
            if known is None:
                known = self.train(name, SEARCH_SEED, self.given.search_seconds, choices, points=1, test=False)
            if known not in trials:
                trials.append(known)
            self.figures["search"][name] = trials + [each for each in before if each not in trials]
            self.write()
            return known["val"]

        best = START[name]
        highest = trial(best)
        for alternatives in SEARCH[name]:
            tried = [(trial(best | each), best | each) for each in alternatives if best | each != best]
            for val, choices in tried:
                if val > highest:
                    highest, best = val, choices
        self.figures["chosen"][name] = best
        self.write()

    def finals(self, name: str, seed: int) -> None:
        """One run that counts."""
        runs = self.figures["runs"].setdefault(name, {})
        if str(seed) not in runs:
            choices = self.figures["chosen"].get(name, {})
            runs[str(seed)] = self.train(name, seed, self.given.seconds, choices, self.given.points, test=True)
            self.write()

    def train(
        self, name: str, seed: int, seconds: float, choices: Choices, points: int, *, test: bool
    ) -> dict[str, Any]:
        """A process of a contestant; what it found, with the seconds that it took as a whole."""
        python = interpreter(name == "vit", self.given.peers)
        assert python is not None
        asked: dict[str, Any] = {"data": str(self.folder / "data"), "seconds": seconds, "points": points, "seed": seed}
        asked |= {"choices": choices, "test": test}
        with tempfile.TemporaryDirectory(dir=self.folder) as root:
            if name == "vit":
                budget = [f"trainer.max_time={seconds:g}", "trainer.max_epochs=null", "trainer.patience=null"]
                asked["typed"] = [*self.typed, *budget, f"seed={seed}", f"run.root={root}", "export.onnx=false"]
                asked["root"] = root
            ran = run([python, PROGRAMS / f"train_{name}.py", json.dumps(asked)], ours=name == "vit")
        found: dict[str, Any] = json.loads(ran.output.splitlines()[-1])
        figure = f"val {100 * found['val']:.2f}" + (f", test {100 * found['test']:.2f}" if test else "")
        print(f"{name}, seed {seed}, {seconds:g} s: {figure}  {choices or ''}", file=sys.stderr, flush=True)
        return {"choices": choices, "seed": seed, "whole": ran.seconds, "megabytes": ran.megabytes, **found}

    def write(self) -> None:
        """What there is so far, for --go-on and --chosen."""
        with atomic_write(self.given.json) as part:
            part.write_text(json.dumps({"figures": self.figures}), encoding="utf-8")


def table(
    figures: dict[str, Any], names: list[str], seeds: list[int], seconds: float, targets: tuple[int, ...]
) -> list[list[str]]:
    """A row for each contestant: accuracies in percent, over the seeds; the curve at the quarters of the time.

    Seconds to a target are those of the first point of the curve that is as high, a median over the seeds.
    """
    quarters = [seconds * share for share in (0.25, 0.5, 0.75)]
    head = ["", "test top-1", "val top-1", *(f"val at {quarter:g} s" for quarter in quarters)]
    rows = [[*head, *(f"seconds to {each}" for each in targets), "images/s"]]
    rows[0] += ["waiting for data", "MB", "parameters", "MFLOP an image", "chosen"]
    for name in names:
        runs = [figures["runs"][name][str(seed)] for seed in seeds]
        row = [ABOUT[name], *(spread([100 * each[split] for each in runs], 1) for split in ("test", "val"))]
        for quarter in quarters:
            row.append(f"{100 * statistics.median(reached(each['curve'], quarter, seconds) for each in runs):.1f}")
        for target in targets:
            needed = statistics.median(seconds_to(each["curve"], target / 100) for each in runs)
            row.append(f"{needed:.0f}" if math.isfinite(needed) else "not reached")
        row.append(f"{statistics.median(each['images'] / each['seconds'] for each in runs):,.0f}")
        row.append(spread([100 * each["waiting"] / each["seconds"] for each in runs], 1, "%"))
        row.append(f"{statistics.median(each['megabytes'] for each in runs):.0f}")
        row += [f"{runs[0]['parameters']:,}", f"{runs[0]['flops'] / 1e6:.1f}"]
        changed = {key: value for key, value in runs[0]["choices"].items() if START[name].get(key) != value}
        rows.append([*row, ", ".join(f"{key}={value}" for key, value in changed.items())])
    return rows


def seconds_to(curve: list[list[float]], accuracy: float) -> float:
    """The seconds of the first point of the curve that is at least so high; infinite where none is."""
    return next((spent for spent, each in curve if each >= accuracy), math.inf)


def reached(curve: list[list[float]], seconds: float, whole: float) -> float:
    """The accuracy at a time: that of the first point from it on, or but a hundredth of the whole before it."""
    return next(accuracy for spent, accuracy in curve if spent >= seconds - whole / 100 or spent == curve[-1][0])
