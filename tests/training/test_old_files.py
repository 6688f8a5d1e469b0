"""A run folder, checkpoints, a bundle and an ONNX file of commit d451e4a load, answer as they did, and go on.

`old_files/run` is what that commit's code wrote:

    python train.py run.name=r model.width=8 model.depth=1 model.heads=2 model.pool=attention model.registers=1
        model.reduction=merge model.reduction_rate=0.25 optim=adamw optim.lr=0.02 data.batch_size=64 trainer=cpu
        trainer.max_epochs=4 ema.decay=0.9 augment=gentle logging=none

`expected.json` is what it answered: probabilities of the ten classes for `images()`, maps of class 3, and the figures
of the run after another epoch.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vit

OLD = Path(__file__).parent / "old_files"
RUN = OLD / "run"
EXPECTED = json.loads((OLD / "expected.json").read_text("utf-8"))
OPTIONS = (
    *("model.width=8", "model.depth=1", "model.heads=2", "model.pool=attention", "model.registers=1"),
    *("model.reduction=merge", "model.reduction_rate=0.25", "optim=adamw", "optim.lr=0.02", "trainer=cpu"),
    *("ema.decay=0.9", "augment=gentle"),
)


def images():
    rows, columns = np.indices((20, 16))
    values = [(rows * (number + 1) * 7 + columns * (5 - number) * 9) % 256 for number in range(6)]
    return [Image.fromarray(each.astype(np.uint8)) for each in values]


@pytest.mark.parametrize(
    ("model", "backend", "expected"),
    [
        ("", "torch", "best"),
        ("", "onnx", "best"),
        ("checkpoints/best.ckpt", "torch", "best"),
        ("checkpoints/last.ckpt", "torch", "last"),
        ("model", "torch", "best"),
        ("model", "onnx", "best"),
        ("model/model.onnx", "onnx", "best"),
    ],
)
def test_every_kind_of_model_answers_as_it_did(model, backend, expected):
    classifier = vit.load(RUN / model, backend=backend)
    found = np.zeros((6, 10))
    for row, result in zip(found, classifier.classify(images(), top_k=10), strict=True):
        for each in result.top:
            row[each["index"]] = each["probability"]
    assert np.abs(found - EXPECTED[expected]).max() < 1e-5
    assert found.std(axis=0).max() > 0.02


@pytest.mark.parametrize("method", EXPECTED["maps"])
def test_maps_are_as_they_were(method):
    classifier = vit.load(RUN)
    found = [classifier.explain(image, method=method, target="3").map for image in images()]
    assert np.abs(np.stack(found) - EXPECTED["maps"][method]).max() < 1e-5


def test_the_figures_are_as_they_were(tmp_path):
    figures = vit.evaluate(RUN, {"output": str(tmp_path / "evaluation")})
    written = json.loads((RUN / "metrics.json").read_text("utf-8"))
    for key in ("images", "top1", "loss", "ece"):
        assert figures["test"][key] == pytest.approx(written["test"][key], abs=1e-5)


def test_the_run_goes_on_as_it_did(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder)
    rest = run(*OPTIONS, "trainer.max_epochs=5", f"resume={folder}")
    assert (rest.metrics["epochs"], rest.folder) == (5, folder)
    for split, figures in EXPECTED["resumed"].items():
        assert rest.metrics[split]["loss"] == pytest.approx(figures["loss"], abs=1e-3)
        assert rest.metrics[split]["top1"] == pytest.approx(figures["top1"], abs=0.02)
