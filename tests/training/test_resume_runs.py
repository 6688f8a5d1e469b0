"""Runs that go on after something around them has changed: files, folders, the working directory, a checkpoint."""

import json
import os
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vit.data.catalogue import DataConfig
from vit.errors import VitError
from vit.evaluation.report import evaluate
from vit.training.app import train_main

TINY = ["model.width=8", "model.depth=1", "model.heads=1", "export.onnx=false", "logging.tensorboard=false"]
TINY += ["logging.progress=false", "data.image_size=16", "data.patch_size=8", "data.batch_size=16", "trainer=cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with photographs of two classes in `photos`."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "work" / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(draw.normal(80 + 80 * label, 60, (16, 16, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "work" / "photos" / name / f"{i:02}.png")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "work"


def start(*overrides):
    """`python train.py` with a run in `runs/r`; gives its folder."""
    assert train_main(["data=folder", "data.root=photos", "run.root=runs", "run.name=r", *TINY, *overrides]) == 0
    return next(Path("runs/r").iterdir()).absolute()


def splits(folder):
    return (folder / "splits.csv").read_bytes()


def statistics(folder, name="last"):
    saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["vit"]
    return saved["preprocessing"], saved["class_names"], saved["data"]["root"]


def test_images_mean_and_place_of_the_data_stay_those_of_the_run(place, tmp_path, monkeypatch, capfd):
    folder = start("trainer.max_epochs=1")
    before, table = statistics(folder), splits(folder)
    tested = evaluate(folder, output=tmp_path / "first")["test"]
    os.rename("photos/cat/00.png", "photos/cat/zebra.png")
    for i in range(6):
        Image.new("RGB", (16, 16), (255, 0, i)).save(f"photos/dog/a{i}.png")
    monkeypatch.chdir(tmp_path)  # `photos` is somewhere else from here
    (tmp_path / "photos").mkdir()
    capfd.readouterr()
    assert train_main([f"resume={folder}", "trainer.max_epochs=2"]) == 0
    said = capfd.readouterr().err
    assert "1 have another name or place" in said
    assert "6 other images, which the run does not use" in said
    assert statistics(folder) == before
    assert splits(folder) == table
    again = evaluate(folder, output=tmp_path / "second")["test"]
    assert again["images"] == tested["images"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"] == str(place / "photos")

    # the same data in another place, which is said
    shutil.move(place / "photos", tmp_path / "elsewhere")
    with pytest.raises(VitError, match="no such folder"):
        evaluate(folder, output=tmp_path / "third")
    moved = evaluate(folder, {"root": str(tmp_path / "elsewhere")}, output=tmp_path / "third")
    assert moved["test"]["top1"] == again["top1"]
    assert train_main([f"resume={folder}", "trainer.max_epochs=3", f"data.root={tmp_path / 'elsewhere'}"]) == 0
    assert statistics(folder)[:2] == before[:2]


@pytest.mark.parametrize("table", [True, False])
def test_a_run_from_before_names_were_composed_keeps_its_classes(place, monkeypatch, table):
    decomposed = normalize("NFD", "élan")
    os.rename("photos/cat", f"photos/{decomposed}")
    os.rename("photos/dog", "photos/fox")  # which sorts behind the one spelling and before the other
    with monkeypatch.context() as older:
        older.setattr("vit.data.folder.normalize", lambda form, text: text)
        folder = start("trainer.max_epochs=30", "optim.lr=0.02", "augment=none", "schedule=constant")
    assert statistics(folder)[1] == [decomposed, "fox"]
    learned = json.loads((folder / "metrics.json").read_text())["val"]["top1"]
    assert learned > 0.8
    if not table:  # older still
        (folder / "splits.csv").unlink()
    os.rename(f"photos/{decomposed}", "photos/élan")
    assert train_main([f"resume={folder}", "trainer.max_epochs=31", "optim.lr=1e-6"]) == 0
    assert statistics(folder)[1] == [decomposed, "fox"]
    assert json.loads((folder / "metrics.json").read_text())["val"]["top1"] == learned


def test_an_evaluation_takes_the_stored_test_split_only_for_the_data_of_the_run(place, tmp_path):
    folder = start("trainer.max_epochs=1")
    (folder / "splits.csv").write_text("damaged")
    with pytest.raises(VitError, match="splits cannot be read"):
        evaluate(folder, output=tmp_path / "out")
    for other in (DataConfig(name="folder", root="photos", val_fraction=0.3), {"test_fraction": 0.5}):
        assert evaluate(folder, other, output=tmp_path / "out")["test"]["images"] > 0


def test_a_damaged_last_checkpoint_gives_way_to_the_best_with_a_line(place, capfd):
    folder = start("trainer.max_epochs=1")
    last = folder / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert train_main([f"resume={folder}", "trainer.max_epochs=2"]) == 0
    assert "going on from" in capfd.readouterr().err
    assert json.loads((folder / "metrics.json").read_text())["epochs"] == 2
    last.write_bytes(whole[: len(whole) // 2])
    assert train_main([f"resume={last}", "trainer.max_epochs=3"]) == 2  # that very file was asked for
    (folder / "checkpoints" / "best.ckpt").unlink()
    last.unlink()
    assert train_main([f"resume={folder}"]) == 2
    assert "ended before its first checkpoint" in capfd.readouterr().err


def test_what_cannot_hold_leaves_a_run_as_it_was(place, capfd):
    folder = start("trainer.max_epochs=1", "ema.decay=0.9")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    for typed in (
        "seed=1",
        "data.batch_size=8",
        "data.val_fraction=0.3",
        "ema.decay=null",
        "run.root=x",
        "model.heads=2",
    ):
        assert train_main([f"resume={folder}", "trainer.max_epochs=2", typed]) == 2
        line = capfd.readouterr().err.strip()
        assert f"{typed.split('=')[0]}=" in line
        assert "\n" not in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert train_main([f"resume={folder}", "trainer.max_epochs=2", "seed=0", "ema.decay=0.5", "optim.lr=1e-5"]) == 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["ema"]["decay"], config["optim"]["lr"], config["trainer"]["max_epochs"]) == (0.5, 1e-5, 2)
