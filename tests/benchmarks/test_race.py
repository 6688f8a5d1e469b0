"""The race: a clock that stands still, a greedy search, runs that are kept, and small real contests."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit.model import VisionTransformer
from vit.model.cost import flops

ROOT = Path(__file__).parents[2]


def module(path: str) -> ModuleType:
    sys.path.insert(0, str(ROOT))
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "benchmarks" / path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[made.__name__] = made  # the other programs import it by this name
        spec.loader.exec_module(made)
        return made
    finally:
        sys.path.remove(str(ROOT))


course, race, race_data = module("programs/course.py"), module("race.py"), module("race_data.py")


class Answers(torch.nn.Module):
    """Answers one class, the number of its weight, whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full((len(images),), int(self.answer)), 3).float()


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """Of the ten validation images, one is of class 0, six of class 1 and three of class 2; of the test images, all."""
    labels = {"train": np.arange(12) % 3, "val": np.array([0, 1, 1, 1, 1, 1, 1, 2, 2, 2]), "test": np.full(5, 1)}
    for split, own in labels.items():
        np.save(tmp_path / f"{split}_labels.npy", own)
        np.save(tmp_path / f"{split}_images.npy", np.full((len(own), 8, 8, 1), 51, np.uint8))
    a = {"num_classes": 3, "image_size": [8, 8], "in_channels": 1}
    (tmp_path / "about.json").write_text(json.dumps({"architecture": a, "mean": [0.2], "std": [0.5]}))
    return course.Data(str(tmp_path))


def test_the_clock_stands_still_during_validation(data, monkeypatch):
    now = 100.0
    monkeypatch.setattr(course.time, "perf_counter", lambda: now)

    def accuracy(model: Any, split: str) -> float:
        nonlocal now
        now += 1000
        return honest(model, split)

    honest = data.accuracy
    monkeypatch.setattr(data, "accuracy", accuracy)

    def loader() -> Any:
        nonlocal now
        for _ in range(4):
            now += 0.5  # that is waited for
            yield [0] * 8, None

    class Passes:
        def __iter__(self) -> Any:
            return loader()

    model = Answers()
    run = course.Course(model, data, {"seconds": 10, "points": 2, "test": True})
    progress = []
    for _ in run.batches(Passes()):
        progress.append(run.progress)
        now += 1.5
        with torch.no_grad():
            model.answer.fill_(min(2, len(progress) // 3))
    # the first batch starts the clock; then a step takes two seconds, waiting included, in the next pass, too
    assert progress == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    found = run.result()
    # after three steps it is right about class 1, which is most; at the end about class 2
    assert found["curve"] == [(pytest.approx(5.5), 0.6), (pytest.approx(11.5), 0.3)]
    assert (found["val"], found["test"]) == (0.6, 1.0)
    assert (found["images"], found["waiting"]) == (6 * 8, pytest.approx(2.5))


def test_validation_sees_normalised_images_and_leaves_the_model_training(data):
    seen = []

    class Seeing(Answers):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((images, self.training))
            return super().forward(images)

    model = Seeing()
    assert data.accuracy(model, "val") == pytest.approx(0.1)
    assert model.training
    ((images, training),) = seen
    assert images.shape == (10, 1, 8, 8)
    assert not training
    torch.testing.assert_close(images, torch.zeros(10, 1, 8, 8), atol=1e-6, rtol=0)


def test_no_batch_at_all_is_said(data):
    run = course.Course(Answers(), data, {"seconds": 10, "points": 1, "test": False})
    with pytest.raises(SystemExit, match="fewer than a batch"):
        list(run.batches([]))


def test_operations_are_counted_as_this_project_counts_them(data):
    model = VisionTransformer(image_size=8, patch_size=4, in_channels=1, num_classes=3, size="nano", pool="mean")
    found = course.size(model, data)
    assert found["flops"] == flops(model.architecture)
    assert found["parameters"] == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["timm", "lightning", "vit_pytorch"])
def test_peers_models_are_as_large(data, name):
    """Alike in operations to a hundredth with the same pooling, but for norms and biases, which are not counted."""
    a = dict(image_size=[8, 8], patch_size=[2, 2], in_channels=1, num_classes=3, width=64, depth=2, heads=2)
    ours = VisionTransformer(**{**a, "image_size": 8, "patch_size": 2}, pool="token")
    if name == "timm":
        import timm

        theirs = timm.create_model(
            *["vit_tiny_patch16_224"],
            **dict(img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=64, depth=2, num_heads=2),
        )
    elif name == "lightning":
        pytest.importorskip("torchvision")
        theirs = module("programs/train_lightning.py").build({"dropout": 0.0, "pool": "token"}, a)
        pooled = module("programs/train_lightning.py").build({"dropout": 0.0, "pool": "mean"}, a)
        assert pooled(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    else:
        pytest.importorskip("vit_pytorch")
        theirs = module("programs/train_vit_pytorch.py").build("ViT", 0.0, a)
    assert course.size(theirs, data)["flops"] == pytest.approx(course.size(ours, data)["flops"], rel=0.01)


def options(path: Path, **more: Any) -> argparse.Namespace:
    given = dict(json=path, go_on=False, chosen=None, data="digits", cifar=None, set=[], points=2)
    return argparse.Namespace(**{**given, "seconds": 8.0, "search_seconds": 2.0, **more})


class Quick(race.Race):  # type: ignore[name-defined, misc]
    """Validation accuracy by a formula, and no training: a larger rate is better, mean pooling adds, dropout takes."""

    def train(self, name: str, seed: int, seconds: float, choices: Any, points: int, *, test: bool) -> Any:
        self.asked.append((seed, seconds, points, test, choices))
        val = 0.5 + choices["lr"] * 10 + 0.1 * (choices["pool"] == "mean") + 0.3 * (choices["batch_size"] == 256)
        return {"choices": choices, "val": val - 0.2 * (choices["dropout"] > 0), "seed": seed}

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.asked: list[Any] = []
        super().__init__(given, folder)


def test_the_search_keeps_what_is_better(tmp_path):
    quick = Quick(options(tmp_path / "r.json"), tmp_path)
    quick.search("lightning")
    best = quick.figures["chosen"]["lightning"]
    changed = {key: value for key, value in best.items() if race.START["lightning"][key] != value}
    assert changed == {"lr": 3e-3, "dropout": 0.0, "pool": "mean", "batch_size": 256}
    trials = quick.figures["search"]["lightning"]
    assert len(trials) == 1 + sum(map(len, race.SEARCH["lightning"]))
    assert trials[0]["choices"] == race.START["lightning"]
    assert {ask[:4] for ask in quick.asked} == {(race.SEARCH_SEED, 2.0, 1, False)}  # never on test images


def test_what_has_been_run_is_kept(tmp_path):
    path = tmp_path / "r.json"
    first = Quick(options(path), tmp_path)
    first.search("lightning")
    half = json.loads(path.read_text())
    del half["figures"]["chosen"]["lightning"], half["figures"]["search"]["lightning"][5:]
    path.write_text(json.dumps(half))
    again = Quick(options(path, go_on=True), tmp_path)
    again.search("lightning")
    assert again.figures["chosen"] == first.figures["chosen"]
    assert again.figures["search"] == first.figures["search"]
    assert len(again.asked) == len(first.asked) - 5
    again.finals("lightning", 0)
    again.finals("lightning", 0)
    assert again.asked[-1][:4] == (0, 8.0, 2, True)
    assert len(again.asked) == len(first.asked) - 4
    chosen = Quick(options(tmp_path / "other.json", chosen=path), tmp_path)
    chosen.search("lightning")
    assert not chosen.asked
    assert chosen.figures["chosen"] == first.figures["chosen"]
    assert not chosen.figures["runs"]


def test_choices_of_every_stage_are_ones_that_there_are():
    for name, stages in race.SEARCH.items():
        for each in (choice for stage in stages for choice in stage):
            assert set(each) <= set(race.START[name])


def test_the_curve_is_read_at_a_time():
    curve = [[1.0, 0.1], [2.0, 0.2], [2.1, 0.25], [4.0, 0.4]]
    assert [race.reached(curve, seconds, 4.0) for seconds in (0.5, 1.0, 2.02, 2.5, 4.0, 9.0)] == [
        *(0.1, 0.1, 0.2, 0.4, 0.4, 0.4)
    ]
    assert [race.seconds_to(curve, accuracy) for accuracy in (0.05, 0.1, 0.22, 0.4, 0.41)] == [
        *(1.0, 1.0, 2.1, 4.0, float("inf"))
    ]


@pytest.mark.parametrize(
    ("form", "options_", "said"),
    [("JPEG", {"quality": 75}, "JPEG, quality 75"), ("JPEG", {"quality": 92}, "JPEG, quality 92"), ("PNG", {}, "PNG")],
)
def test_a_copys_encoding_is_told(tmp_path, form, options_, said):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    part = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(part, form, **options_)
    rows = [{"label": 1, "img": {"bytes": part.getvalue(), "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    assert race_data.encoding(tmp_path) == said
    assert race_data.encoding(tmp_path / "train-00000-of-00001.parquet") == said


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "race", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)


def test_what_is_missing_is_said(tmp_path):
    assert "--data cifar10 needs --cifar FOLDER" in call("--data", "cifar10").stderr
    assert "no 'tim'; there are vit, timm" in call("--contestants", "vit,tim").stderr
    nowhere = call("--peers", str(tmp_path))
    assert (nowhere.returncode, "make one: python -m benchmarks peers" in nowhere.stderr) == (2, True)


@pytest.mark.slow
def test_a_small_race(tmp_path):
    """On handwritten digits, with this environment's own timm and Lightning as peers."""
    python = tmp_path / "peers/environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    chosen = tmp_path / "chosen.json"
    timm = {**race.START["timm"], "workers": 1, "mixup": 0.2, "opt": "muon", "batch_size": 32, "gp": "avg"}
    timm |= {"qk_norm": True, "patch_drop": 0.25}
    lightning = {**race.START["lightning"], "workers": 0, "batch_size": 32, "schedule": "cosine", "crop": "pad"}
    chosen.write_text(json.dumps({"timm": timm, "lightning": lightning}))
    small = ["--data", "digits", "--seconds", "2", "--points", "2", "--seeds", "3", "--processors", "1"]
    small += ["--chosen", str(chosen), "--contestants", "vit,timm,lightning", "--peers", str(tmp_path / "peers")]
    small += ["--set", "data.max_images=100", "--set", "data.batch_size=32", "--json", str(tmp_path / "r.json")]
    done = call(*small)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert figures["chosen"] == {"timm": timm, "lightning": lightning}
    assert figures["data"]["images"] == {"train": 100, "val": 100, "test": 100}
    for name, runs in figures["runs"].items():
        (run,) = runs.values()
        assert list(runs) == ["3"]
        assert run["seconds"] >= 2
        assert run["images"] % 32 == 0 < run["images"]
        assert run["curve"][-1][0] >= 2
        assert len(run["curve"]) >= 2
        assert 0 <= run["test"] <= 1
        assert run["val"] == max(accuracy for _, accuracy in run["curve"]) or name == "vit"
        assert 0 <= run["waiting"] < run["seconds"]
        assert run["megabytes"] > 200  # PyTorch is in there
        # positions, class tokens and norms apart, the models are of one size
        assert run["flops"] == pytest.approx(figures["runs"]["vit"]["3"]["flops"], rel=0.1)
    assert done.stdout.count("% (") == 3
