"""Accuracy against images a second with token reduction, on a model of 196 patches that is trained here.

Fashion-MNIST at 28 pixels in patches of 2.  What is trained, each by `python train.py` and for a stated time:

- the model, without reduction;
- the same further: without reduction, and with each reduction in question, so that all that are compared as trained
  have had the same minutes.

Measured on test images: the model further trained without reduction, with reductions that it was not trained with
(keep and merge by rate, and what `vit tune-reduction` finds under a budget), and those that were trained with theirs.
Images a second: forward passes alone, all models in turn, round by round; medians, and ratios to the model without
reduction in the same round.

A second table has the same weights without torch: ONNX files in float32 and in integers of the model and of those that
were trained with a reduction, and timm's model with the weights of the former; images a second as multiples of timm's,
in the same round.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.results import parser, report, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import nn

    from vit.model import VisionTransformer

    Forward = Callable[[np.ndarray], np.ndarray]  # images float32 (B, C, H, W) -> logits float32 (B, K)

ROOT = Path(__file__).parents[1]
DATA = ("data=fashion_mnist", "augment=light", "augment.crop_padding=0", "trainer.max_epochs=null", "schedule=linear")
MODEL = ("data.patch_size=2", "model.depth=6", "model.init=mimetic", "model.patch_dropout=0.6")
GENTLE = ("optim.lr=5e-4", "optim.matrix_lr=5e-3", "schedule.warmup=0.1")  # for a model that is trained already
QUICK = (
    "data.val_fraction=0.02",
    "trainer.validate_every=1000",
    "export.onnx=false",
    "logging.attention=0",
    "logging.progress=false",
)


class Row(NamedTuple):
    """A model with a reduction: of which run, whether that was trained with it, and as a command line has it."""

    run: Path
    trained: bool
    line: str
    model: VisionTransformer


def main(arguments: list[str]) -> int:
    options = parser("reduction", "Accuracy against images a second with token reduction, trained and untrained.")
    options.add_argument("--minutes", type=float, default=10.0, help="of training the model (%(default)g)")
    options.add_argument("--further", type=float, default=2.0, help="minutes of further training, each (%(default)g)")
    options.add_argument("--rates", default="0.3,0.6,0.8,0.95", help="of reductions without training")
    options.add_argument("--budgets", default="0.54,0.44", help="of FLOPs, for searches and training (%(default)s)")
    options.add_argument("--no-named", action="store_true", help="train with what the searches find alone")
    options.add_argument("--images", type=int, default=10_000, help="of the test split, at most")
    options.add_argument("--trials", type=int, default=24, help="of each search")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument(
        "--keep", type=Path, metavar="DIR", help="train there, and leave it; what is there is not trained again"
    )
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every training")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder)
        rows, table, figures = measure(given, place)
        report("reduction", "Token reduction: accuracy against images a second", table, figures, given)
        table, figures = exported(rows, place, given)
        given.json = given.json and given.json.with_stem(f"{given.json.stem}_int8")
        report("reduction_int8", "Token reduction and integers, beside timm", table, figures, given)
    return 0


def measure(given: Any, folder: Path) -> tuple[list[Row], list[list[str]], dict[str, Any]]:
    from vit.evaluation.reduction import compute_logits as scores
    from vit.evaluation.reduction import compute_metrics as figures_of

    base = train(folder, "base", [*MODEL, *time_of(given.minutes)], given.set)
    further = [f"model.name={base}", *time_of(given.further)]
    whole = train(folder, "further_none", ["model=pretrained", *further, *GENTLE], given.set)
    searched = {budget: search(whole, budget, given) for budget in map(float, given.budgets.split(","))}
    rows = [Row(whole, True, "none", loaded(whole))]
    for method in ("keep", "merge"):
        rows += [
            Row(whole, False, line, loaded(whole, line))
            for rate in given.rates.split(",")
            for line in [f"{method}:{rate}"]
        ]
    for budget, line in searched.items():
        rows.append(Row(whole, False, line, loaded(whole, line)))
        for each in (line, *([] if given.no_named else named(whole, budget))):
            run = train(
                folder, f"further_{slug(each)}", ["model=pretrained", *further, *GENTLE, *reducing(each)], given.set
            )
            rows.append(Row(run, True, each, loaded(run)))
    images, labels = test_images(whole, given.images)
    models = {str(i): torch_forward(row.model) for i, row in enumerate(rows)}
    seconds = list(timed(models, images[: given.batch_size], given.rounds).values())
    table = [["trained with it", "reduction", "FLOPs", "images/s", "speed", "top-1", "points"]]
    found = []
    reference = None
    for row, took in zip(rows, seconds, strict=True):
        top1, loss = figures_of(scores(row.model, images, given.batch_size), labels)
        reference = top1 if reference is None else reference
        ratios = [a / b for a, b in zip(seconds[0], took, strict=True)]
        rate = given.batch_size / statistics.median(took)
        cost = relative_cost(row.model)
        table.append(
            [
                "" if row.line == "none" else "yes" if row.trained else "no",
                row.line,
                f"{cost:.2f}",
                f"{rate:.0f}",
                spread(ratios, 2, "x"),
                f"{top1:.2%}",
                f"{100 * (top1 - reference):+.2f}",
            ]
        )
        found.append(
            {"line": row.line, "trained": row.trained, "flops": cost, "seconds": took, "top1": top1, "loss": loss}
        )
    return rows, table, {"test_images": len(labels), "models": found}


def time_of(minutes: float) -> list[str]:
    return [f"trainer.max_time={60 * minutes:.0f}"]


def train(folder: Path, name: str, overrides: list[str], more: list[str]) -> Path:
    """Train by the command, or take what was trained there before; returns the run folder."""
    if not (done := finished(folder / name)):
        command = [sys.executable, str(ROOT / "train.py"), *DATA, *overrides, *QUICK, *more]
        command += [f"run.root={folder}", f"run.name={name}"]
        print(shlex.join(command[1:]), file=sys.stderr, flush=True)
        began = time.perf_counter()
        if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT).returncode:
            raise SystemExit(f"training {name} failed")
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        done = finished(folder / name)
    return done[-1]


def finished(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/metrics.json"))


def reducing(line: str) -> list[str]:
    """Overrides of training for a reduction."""
    from vit.model.reduction import parse

    found = {key: value for key, value in parse(line).items() if value is not None}
    return [f"model.{key}={str(value).replace(' ', '')}" for key, value in found.items()]


def slug(line: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in line)


def named(run: Path, budget: float) -> list[str]:
    """Keep and merge with their own schedules, at the smallest rate that keeps to the budget."""
    from vit.model.cost import relative
    from vit.model.reduction import parse

    a = loaded(run).architecture
    lines = []
    for method in ("keep", "merge"):
        rates = [rate / 100 for rate in range(1, 100)]
        fits = [rate for rate in rates if relative({**a, **parse(f"{method}:{rate}")}) <= budget]
        lines += [f"{method}:{fits[0]:g}"] if fits else []
    return lines


def search(run: Path, budget: float, given: Any) -> str:
    """What `vit tune-reduction` finds on validation images."""
    from vit.data.catalogue import open_data
    from vit.evaluation.reduction import search as found_by
    from vit.evaluation.report import data_config
    from vit.inference.loading import load_torch
    from vit.inference.sample import from_split

    model, description = load_torch(run, device="cpu", reduction="none")
    data = open_data(data_config(description, None), description.class_names)
    sample = from_split(data, "val", description.preprocessing, min(1000, given.images))
    assert sample.labels is not None
    return found_by(model, sample.images, sample.labels, budget, trials=given.trials).best.line


def loaded(run: Path, line: str | None = None) -> VisionTransformer:
    from vit.inference.loading import load_torch

    return load_torch(run, device="cpu", reduction=line)[0]


def relative_cost(model: VisionTransformer) -> float:
    from vit.model.cost import relative

    return relative(model.architecture)


def test_images(run: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    from vit.data.catalogue import open_data
    from vit.evaluation.report import data_config
    from vit.inference.loading import load_torch
    from vit.inference.sample import from_split

    description = load_torch(run, device="cpu")[1]
    data = open_data(data_config(description, None), description.class_names)
    sample = from_split(data, "test", description.preprocessing, count)
    assert sample.labels is not None
    return sample.images, sample.labels


def timed(models: dict[str, Forward], batch: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass by model and round, all models in turn in each round."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, forward in models.items():
            began = time.perf_counter()
            forward(batch)
            if round_:  # the first warms up
                found[name].append(time.perf_counter() - began)
    return found


def torch_forward(model: nn.Module) -> Forward:
    import torch

    def forward(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()

    return forward


def exported(rows: list[Row], folder: Path, given: Any) -> tuple[list[list[str]], dict[str, Any]]:
    """The second table: what was trained, as timm has it and as ONNX files."""
    import timm

    import vit
    from vit.inference.export import export_onnx
    from vit.inference.loading import load_torch
    from vit.inference.quantise import quantise
    from vit.inference.sample import to_quantise

    whole, *others = [row for row in rows if row.trained]
    images, labels = test_images(whole.run, given.images)
    models: dict[str, Forward] = {
        "timm": torch_forward(timm.create_model(f"local-dir:{whole.run / 'model'}", pretrained=True).eval())
    }
    samples = to_quantise(load_torch(whole.run, device="cpu")[1])
    for row in (whole, *others):
        model, description = load_torch(row.run, device="cpu")
        files = [folder / f"{slug(row.line)}.{form}.onnx" for form in ("float32", "int8")]
        export_onnx(files[0], model, description, images=images[:8])
        quantise(files[1], files[0], *samples)
        for file, form in zip(files, ("float32", "int8"), strict=True):
            models[f"{row.line}, ONNX, {form}"] = vit.load(file).logits
    seconds = timed(models, images[: given.batch_size], given.rounds)
    top1 = {name: accuracy(forward, images, labels, given.batch_size) for name, forward in models.items()}
    table = [["trained with, form", "images/s", "times timm", "top-1", "points"]]
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(seconds["timm"], took, strict=True)]
        rate = given.batch_size / statistics.median(took)
        points = f"{100 * (top1[name] - top1['timm']):+.2f}"
        table.append([name, f"{rate:.0f}", spread(ratios, 2, "x"), f"{top1[name]:.2%}", points])
    return table, {"test_images": len(labels), "seconds": seconds, "top1": top1}


def accuracy(forward: Forward, images: np.ndarray, labels: np.ndarray, batch_size: int) -> float:
    """The share of right answers."""
    right = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        right += int((forward(images[part]).argmax(axis=1) == labels[part]).sum())
    return right / len(images)
