"""The page on fine-tuning keeps its word: commands train on local stand-ins, and the recipe is the one it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from PIL import Image

from vit.data.preprocess import Preprocessing
from vit.inference.bundle import read_bundle, write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.training import auto
from vit.training.app import CONF, resolve_config
from vit.training.config import Config, check_model, load_config
from vit.training.run import train

PAGE = (CONF.parent / "docs" / "pretrained.md").read_text("utf-8")
TEXT = PAGE[PAGE.index("\n## Fine-tuning\n") :]
COMMANDS = re.findall(r"^python train\.py (.*)$", TEXT, re.MULTILINE)
CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, and with models that stand in for those on the page."""
    folder = tmp_path_factory.mktemp("place")
    random = np.random.default_rng(0)
    for shade, name in enumerate(CLASSES):
        (folder / "photos" / name).mkdir(parents=True)
        for k in range(12):
            pixels = random.integers(60 * shade, 60 * shade + 90, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{k}.jpg")
    torch.manual_seed(0)
    for name, classes in (("weights", ["a", "b"]), ("teacher", [*CLASSES, *"0123456789"])):
        size = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 9, "heads": 2}
        model = VisionTransformer(**size, num_classes=len(classes))
        write_bundle(
            folder / name, model, Description(model.architecture, classes, Preprocessing((32, 32))), onnx=False
        )
    return folder


def stood_in(command: str, place: Path) -> list[str]:
    """The command's overrides with local weights, pictures and teachers, for two steps."""
    typed = []
    for text in command.split():
        key, _, value = text.partition("=")
        if key == "model.name":
            text = f"model.name={place / 'weights'}"
        elif key == "distill.teacher":
            text = f"distill.teacher={place / 'teacher'}"
        elif key == "data" and value in ("cifar10", "parquet"):
            text = "data=digits"
        elif key == "data.root":
            if value != "photos":
                continue
            text = f"data.root={place / 'photos'}"
        elif key == "model" and value == "tiny":
            text = "model=nano"
        typed.append(text)
    more = ["data.max_images=36", "data.batch_size=12", "export.onnx=false", "logging.tensorboard=false"]
    return [*typed, *more, "data.val_fraction=0.2", "trainer.max_steps=2"]


def compose(typed: list[str]) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return load_config(resolve_config(hydra.compose("train", typed)))


def test_there_are_commands_for_all_that_is_told():
    assert len(COMMANDS) == 11
    for key in ("finetune.freeze", "finetune.unfreeze", "lora.rank", "distill.teacher", "experiment=linear_probe"):
        assert any(key in command for command in COMMANDS), key


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains_and_leaves_a_model(command, place, tmp_path):
    typed = [*stood_in(command, place), f"run.root={tmp_path / 'runs'}"]
    config = compose(typed)
    check_model(config)
    result = train(config, typed)
    assert result is not None
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert 0 <= metrics["test"]["top1"] <= 1
    names = read_bundle(result.folder / "model").class_names
    assert names == (CLASSES if config.data.name == "folder" else [str(k) for k in range(10)])
    assert ("knn" in metrics) is ("linear_probe" in command)


def test_the_recipe_is_the_one_in_the_table(place):
    config = compose([text for text in stood_in(COMMANDS[0], place) if not text.startswith("data.batch_size")])
    assert f"at {config.optim.layer_decay} of the learning rate" in TEXT
    assert (config.optim.name, config.optim.head_lr, config.schedule.warmup) == ("adamw", 1, 0.1)
    assert f"AdamW at {config.optim.lr:g}".replace("0.0002", "2e-4") in TEXT
    assert f"`finetune.head={config.finetune.head}`" in TEXT
    assert f"`data.batch_size={config.data.batch_size}`" in TEXT
    assert "over the first tenth, then a cosine" in TEXT
    assert config.schedule.name == "cosine"
    for (few, first), (more, second), (_, last) in (auto.AUGMENT_BY_IMAGES, auto.AUGMENT_BY_PASSES):
        assert f"`{first}` under {few}, `{second}` under {more}, else `{last}`" in TEXT
    assert "90 for a hundred images, 9 for ten thousand" in TEXT
    assert (auto.auto_epochs(100), auto.auto_epochs(10_000)) == (90, 9)
    assert f"`trainer.patience={config.trainer.patience}`" in TEXT
