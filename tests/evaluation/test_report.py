"""A whole evaluation: the files, their figures, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vit.data.catalogue import DataConfig, open_data
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.evaluation.report import FILES, at_training, data_config, default_output, evaluate
from vit.evaluation.table import changed_since, print_summary, worst_classes
from vit.inference.bundle import read_bundle
from vit.inference.description import Description
from vit.inference.loading import load_torch


@pytest.fixture
def run(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder to write in, in a working folder of its own."""
    shutil.copytree(digits_run, tmp_path / "runs" / "digits" / "one")
    monkeypatch.chdir(tmp_path)
    return Path("runs/digits/one")


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test images of three and seven as colour PNGs four times the size, in folders named by class."""
    split = open_data(DataConfig(name="digits")).splits["test"]
    folder = tmp_path_factory.mktemp("digit_folder")
    for digit in (7, 3):
        (folder / "test" / str(digit)).mkdir(parents=True)
        for i in np.flatnonzero(split.labels == digit):
            image = split.image(int(i))
            assert isinstance(image, Image.Image)
            image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(
                folder / "test" / str(digit) / f"{i}.png"
            )
    return folder


def strictly(path: Path) -> Any:
    """JSON without NaN or infinities."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def description(**data: Any) -> Description:
    architecture = {"image_size": [8, 8], "in_channels": 1, "num_classes": 2}
    return Description(architecture, ["a", "b"], Preprocessing((8, 8), channels=1), data=data)


def test_figures_are_those_of_the_model_image_by_image(run: Path):
    metrics = evaluate(run)
    model, about = load_torch(run)
    split = open_data(DataConfig.from_dict(about.data)).splits["test"]
    logits = []
    for i in range(len(split)):
        pixels = about.preprocessing(split.image(i))
        with torch.no_grad():
            logits.append(model(torch.from_numpy(pixels)[None])[0].double().numpy())
    scaled = np.array(logits) / about.temperature
    probabilities = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    predicted, labels = probabilities.argmax(1), split.labels
    block = metrics["test"]
    assert block["images"] == len(split) == 359
    assert block["top1"] == pytest.approx((predicted == labels).mean())
    assert block["loss"] == pytest.approx(-np.log(probabilities[np.arange(359), labels]).mean(), rel=1e-4)
    assert 0.5 < block["top1"] < 1
    # and what training wrote beside the weights
    for key in ("top1", "top5", "loss", "ece"):
        assert block[key] == pytest.approx(about.metrics["test"][key], rel=1e-4)

    written = strictly(run / "evaluation" / "metrics.json")
    assert written == metrics
    assert [row["support"] for row in written["test"]["per_class"]] == np.bincount(labels).tolist()
    with open(run / "evaluation" / "confusion.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0][1:] == [row[0] for row in table[1:]] == about.class_names
    counts = np.array([[int(cell) for cell in row[1:]] for row in table[1:]])
    assert counts.sum() == 359
    assert np.trace(counts) == (predicted == labels).sum()

    with open(run / "evaluation" / "mistakes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (predicted != labels).sum()
    assert {int(row["index"]) for row in rows} == set(np.flatnonzero(predicted != labels).tolist())
    sure = [float(row["probability"]) for row in rows]
    assert sure == sorted(sure, reverse=True)
    for row in rows:
        i = int(row["index"])
        assert row["path"] == split.name(i)
        assert (row["true"], row["predicted"]) == (about.class_names[labels[i]], about.class_names[predicted[i]])
        assert float(row["probability"]) == pytest.approx(probabilities[i].max(), rel=1e-4)
    assert sum(each["images"] for each in written["reliability"]["calibrated"]) == 359
    for name in ("confusion.png", "reliability.png", "mistakes.png"):
        with Image.open(run / "evaluation" / name) as image:
            image.load()
            assert min(image.size) > 200


def test_every_form_of_a_model_gives_the_same(run: Path, tmp_path: Path):
    shutil.copytree(run / "model", "elsewhere")
    shutil.copy(run / "model" / "model.onnx", "digits.onnx")
    forms = {
        run: run / "evaluation",
        run / "model": run / "evaluation",
        run / "checkpoints" / "best.ckpt": run / "evaluation",
        Path("elsewhere"): Path("evaluation/elsewhere"),
        Path("digits.onnx"): Path("evaluation/digits"),
    }
    first = evaluate(run, output="first")["test"]
    for model, folder in forms.items():
        assert default_output(model).resolve() == folder.resolve(), model
        block = evaluate(model)["test"]
        assert set(os.listdir(folder)) == set(FILES)
        assert block["top1"] == first["top1"], model
        # the checkpoint of the fixture was written with the bundle's own temperature
        assert block["loss"] == pytest.approx(first["loss"], rel=1e-4), model


def test_output_and_batch_size_and_split(run: Path):
    metrics = evaluate(run, split="val", batch_size=7, output="some/where")
    assert metrics["val"]["images"] == 180
    assert "test" not in metrics
    assert set(os.listdir("some/where")) == set(FILES)
    assert not (run / "evaluation").exists()
    assert metrics["val"]["top1"] == evaluate(run, split="val")["val"]["top1"]


def test_other_data_is_matched_by_class_name(run: Path, digit_folder: Path):
    metrics = evaluate(run, {"name": "folder", "root": str(digit_folder)})
    rows = metrics["test"]["per_class"]
    own = evaluate(run)["test"]["per_class"]
    # its classes are 3 and 7 (positions 0 and 1 in that folder), and keep the model's places
    assert [row["support"] for row in rows] == [row["support"] if k in (3, 7) else 0 for k, row in enumerate(own)]
    assert rows[0]["recall"] is None
    for k in (3, 7):
        # enlarged, coloured, and brought back by the model's own preprocessing: nearly the same images
        assert rows[k]["recall"] == pytest.approx(own[k]["recall"], abs=0.15)
    assert metrics["at_training"] is None


def test_a_class_that_the_model_does_not_know_is_refused(run: Path, digit_folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(digit_folder, other)
    (other / "test" / "7").rename(other / "test" / "eleven")
    with pytest.raises(VitError, match="eleven"):
        evaluate(run, {"name": "folder", "root": str(other)})
    assert not (run / "evaluation").exists()


def test_bad_files_are_counted_and_take_no_part(run: Path, digit_folder: Path, tmp_path: Path, capsys):
    other = tmp_path / "other"
    shutil.copytree(digit_folder, other)
    (other / "test" / "3" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data = {"name": "folder", "root": str(other), "max_bad_fraction": 0.5}
    metrics = evaluate(run, data)
    assert metrics["bad_files"] == 1
    assert metrics["test"]["images"] == evaluate(run, {"name": "folder", "root": str(digit_folder)})["test"]["images"]
    print_summary(metrics)
    assert "1 files could not be read" in capsys.readouterr().out


def test_a_split_without_images_is_refused(run: Path, digit_folder: Path):
    with pytest.raises(VitError, match=r"no val images; split=test has 7\d"):
        evaluate(run, {"name": "folder", "root": str(digit_folder)}, split="val")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("run", {"split": "tset"}, "did you mean 'test'"),
        ("run", {"batch_size": 0}, "batch_size=0"),
        ("run", {"output": "file/below"}, "output=file/below: cannot make this folder"),
        ("run", {"device": "tpu"}, "tpu"),
        ("run", {"data": {"nmae": "digits"}}, "data.name"),
        ("runs/digits/two", {}, "did you mean 'runs/digits/one'"),
    ],
)
def test_mistakes_in_the_call(run: Path, model: str, arguments: dict[str, Any], message: str):
    Path("file").write_text("")
    with pytest.raises(VitError, match=message):
        evaluate(run if model == "run" else model, **arguments)
    assert not (run / "evaluation").exists()


def test_a_model_that_does_not_say_its_data(run: Path):
    about = read_bundle(run / "model")
    about.data = {}
    with pytest.raises(VitError, match="does not say what data it was trained on: name some"):
        data_config(about, None)
    assert data_config(about, {"name": "digits"}).name == "digits"


def test_data_keys_that_are_not_given_are_those_of_training():
    trained = {**DataConfig(name="folder", root="/photos", val_fraction=0.25, split_seed=7).to_dict(), "mean": [0.5]}
    about = description(**trained)
    config = data_config(about, {"name": None, "root": None})
    assert (config.name, config.root, config.val_fraction, config.split_seed) == ("folder", "/photos", 0.25, 7)
    assert config.size == (8, 8)
    assert config.channels == 1
    # the same data in another place
    moved = data_config(about, {"root": "/mnt/photos"})
    assert (moved.root, moved.val_fraction, moved.split_seed) == ("/mnt/photos", 0.25, 7)
    # named again: still the same split, so that nothing trained on is tested on
    assert data_config(about, {"name": "folder", "root": "/photos"}).split_seed == 7
    # another folder, another data set: their own
    assert data_config(about, {"name": "folder", "root": "/others"}).split_seed == 0
    assert data_config(about, {"name": "shapes"}).root is None
    assert data_config(about, DataConfig(name="shapes", image_size=64)).size == (8, 8)


def test_every_data_key_can_be_given_to_eval():
    conf = yaml.safe_load((Path(__file__).parents[2] / "conf" / "eval.yaml").read_text())
    assert set(conf["data"]) == {field.name for field in fields(DataConfig)}
    assert set(conf["data"].values()) == {None}


def test_data_that_changed_since_training_is_noticed():
    figures = {"images": 100, "top1": 0.9, "loss": 0.3}
    about = description(**DataConfig(name="digits").to_dict())
    about.metrics = {"test": {**figures, "per_class": []}, "val": {"top1": 0.9}}
    same = data_config(about, None)
    assert at_training(about, same, "test") == figures
    assert at_training(about, same, "val") is None
    assert at_training(about, data_config(about, {"test_fraction": 0.5}), "test") is None
    assert at_training(about, data_config(about, {"name": "shapes"}), "test") is None

    def said(images: int, top1: float) -> str | None:
        return changed_since({"split": "test", "at_training": figures, "test": {"images": images, "top1": top1}})

    assert said(100, 0.9) is None
    assert said(100, 0.91) is None  # one image: a GPU rounds otherwise
    assert said(100, 0.95) is not None
    assert said(99, 0.9) is not None


def test_worst_classes():
    rows = [
        {"class": name, "index": k, "support": support, "f1": f1}
        for k, (name, support, f1) in enumerate([("a", 9, 1.0), ("b", 0, None), ("c", 5, 0.5), ("d", 8, 0.5)])
    ]
    assert [row["class"] for row in worst_classes(rows)] == ["d", "c"]


def test_the_summary_says_names_as_they_are(run: Path, capsys: pytest.CaptureFixture[str]):
    metrics = evaluate(run)
    for row, name in zip(metrics["test"]["per_class"], ["[bold]b", ":smile:", "\udcff", "$x$", "a\nb"], strict=False):
        row["class"], row["f1"], row["recall"] = name, 0.1, None
    print_summary(metrics)
    text = capsys.readouterr().out
    for name in ("[bold]b", ":smile:", "\ufffd", "$x$", "a b"):
        assert name in text
    assert f"written to {run}/evaluation" in text
    assert f"{metrics['test']['top1']:.2%}" in text
