"""A model in torch, in an ONNX file, in one with a rollout and in one in integers: images a second, and accuracy.

Speed: random weights, each in turn, round by round, seconds of the clock; medians over rounds.  Accuracy: a trained
model (`--model`, or one that is trained on digits here) on the test split of its own data.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import parser, report, spread
from vit.data.preprocess import Preprocessing
from vit.explain.with_rollout import WithRollout
from vit.inference.description import Description
from vit.inference.export import export_onnx
from vit.inference.loading import load_torch
from vit.inference.onnx_backend import OnnxBackend, open_session
from vit.inference.quantise import quantise, to_integers
from vit.inference.sample import from_split, open_training_data, to_quantise
from vit.inference.torch_backend import TorchBackend
from vit.model import VisionTransformer

ROOT = Path(__file__).parents[1]
FORMS = {"torch": "torch, float32", "onnx": "ONNX, float32", "rollout": "ONNX, with rollout", "int8": "ONNX, int8"}


def main(arguments: list[str]) -> int:
    options = parser("export", "Images a second and accuracy of torch, ONNX in float32, and ONNX in integers.")
    options.add_argument("--size", default="tiny", help="of the model with random weights")
    options.add_argument("--image-size", type=int, default=224)
    options.add_argument("--batches", default="1,16", help="sizes")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--model", help="a trained MODEL whose data is here; without one, digits are trained on")
    options.add_argument("--seconds", type=int, default=40, help="to train on digits for")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        batches = [int(each) for each in given.batches.split(",")]
        speed = measure_speed(Path(folder), given.size, given.image_size, batches, given.rounds)
        accuracy = measure_accuracy(Path(folder), given.model or train(Path(folder), given.seconds))
    heads = [f"{given.size}/16 at {given.image_size}, batch {batch}: images/s" for batch in batches]
    rows = [["", *heads, f"top-1 on {accuracy['images']} images of {accuracy['data']}", "as torch"]]
    for form, name in FORMS.items():
        cells = [
            spread([batch / each for each in speed[str(batch)][form]], 1) if form in speed[str(batch)] else "-"
            for batch in batches
        ]
        measured = accuracy.get(form)
        rows.append([name, *cells, *([f"{share:.2%}" for share in measured] if measured else ["-", "-"])])
    report("export", "Exported models", rows, {"speed": speed, "accuracy": accuracy}, given)
    return 0


def measure_speed(
    folder: Path, size: str, image_size: int, batches: list[int], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of the clock for a batch, by batch size, form and round."""
    torch.manual_seed(0)
    model = VisionTransformer(image_size=image_size, patch_size=16, num_classes=1000, size=size).eval()
    names = [str(number) for number in range(1000)]
    description = Description(model.architecture, names, Preprocessing(image_size=(image_size, image_size)))
    export_onnx(folder / "onnx", model, description)
    export_onnx(folder / "rollout", model, description, with_rollout=WithRollout)
    noise = np.random.default_rng(0).normal(size=(max(16, *batches), 3, image_size, image_size)).astype(np.float32)
    to_integers(str(folder / "onnx"), str(folder / "int8"), noise[:16])
    runs: dict[str, Callable[[np.ndarray], Any]] = {"torch": TorchBackend(model, description).logits}
    for form in ("onnx", "rollout", "int8"):
        session = open_session(folder / form)
        runs[form] = lambda images, session=session: session.run(None, {"image": images})
    found: dict[str, dict[str, list[float]]] = {}
    for batch in batches:
        own = found[str(batch)] = {form: [] for form in runs}
        for round_ in range(rounds + 1):
            for form, run in runs.items():
                began = time.perf_counter()
                run(noise[:batch])
                if round_:  # the first warms up
                    own[form].append(time.perf_counter() - began)
    return found


def measure_accuracy(folder: Path, model: str) -> dict[str, Any]:
    """For each form (top-1 on the test split, agreement with torch), and on what."""
    network, description = load_torch(model, device="cpu")
    data = open_training_data(description)
    test = from_split(data, "test", description.preprocessing, len(data.splits["test"]))
    assert test.labels is not None
    export_onnx(folder / "trained.onnx", network, description, images=test.images)
    quantise(folder / "trained.int8.onnx", folder / "trained.onnx", *to_quantise(description))
    found: dict[str, Any] = {"images": len(test), "data": data.name}
    backends = {
        "torch": TorchBackend(network, description),
        "onnx": OnnxBackend(folder / "trained.onnx"),
        "int8": OnnxBackend(folder / "trained.int8.onnx"),
    }
    first: np.ndarray | None = None
    for form, backend in backends.items():
        parts = [backend.logits(test.images[start : start + 64]) for start in range(0, len(test), 64)]
        chosen = np.concatenate(parts).argmax(axis=1)
        first = chosen if first is None else first
        found[form] = float((chosen == test.labels).mean()), float((chosen == first).mean())
    return found


def train(folder: Path, seconds: int) -> str:
    """A run on digits."""
    command = [sys.executable, "train.py", f"trainer.max_time={seconds}", f"run.root={folder}", "export.onnx=false"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return str(next(folder.glob("digits/*")))
