"""Every experiment trains for two steps and leaves a whole run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vit.data.catalogue import DataConfig
from vit.data.dataset import ArrayImages, ImageData, Split
from vit.errors import VitError
from vit.training import run
from vit.training.app import CONF
from vit.training.config import check_model, load_config

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
NEEDS_FOLDER = {"folder", "imagenet_small", "finetune", "linear_probe"}
NEEDS_WEIGHTS = {"finetune", "linear_probe"}


def stand_in(config: DataConfig) -> ImageData:
    """A few images of ten classes in the size that `config` asks for, in place of files that are not here."""
    random = np.random.default_rng(0)
    splits = {}
    for name, count in {"train": 24, "val": 10, "test": 10}.items():
        pixels = random.integers(0, 256, (count, *config.size, config.channels), dtype=np.uint8)
        images = ArrayImages(pixels, f"{config.name}/{name}")
        splits[name] = Split(np.arange(count) % 10, images, config.channels, native_size=config.size)
    data = ImageData(config.name, [f"class {k}" for k in range(10)], splits, channels=config.channels)
    data.source = config.to_dict()
    return data


@pytest.fixture
def data_or_stand_in(monkeypatch):
    """Real data where its files are, without the network; else a stand-in."""
    real = run.open_data

    def open_data(config: DataConfig, **options) -> ImageData:
        try:
            return real(config, **options)
        except VitError:
            return stand_in(config)

    monkeypatch.setattr(run, "open_data", open_data)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_two_steps(experiment, compose, tmp_path, data_or_stand_in, small_bundle):
    overrides = [
        f"experiment={experiment}",
        "debug=steps",
        f"run.root={tmp_path / 'runs'}",
        "data.download=false",
        "data.max_images=24",
        "data.train_images=200",
        "data.val_images=50",
        "data.test_images=50",
        "data.batch_size=8",
        f"export.onnx={'true' if experiment == 'shapes' else 'false'}",  # seconds each, and tested elsewhere
    ]
    if experiment in NEEDS_FOLDER:
        overrides.append(f"data.root={tmp_path / 'absent'}")
    if experiment in NEEDS_WEIGHTS:
        overrides.append(f"model.name={small_bundle}")
    config = load_config(compose(*overrides))
    check_model(config)
    result = run.train(config, overrides)
    assert result is not None
    folder = Path(result.folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert experiment == "linear_probe" or metrics["steps"] == 2
    assert 0 <= metrics["test"]["top1"] <= 1
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
