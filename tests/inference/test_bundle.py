"""A bundle appears whole or not at all, never over anything else, and gives back the model that went in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference import export
from vit.inference.bundle import FILES, read_bundle, write_bundle
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.model import VisionTransformer


def make(**options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    defaults = {"image_size": 16, "patch_size": 8, "num_classes": 3, "size": "nano", "width": 32, "depth": 1}
    model = VisionTransformer(**{**defaults, **options})
    a = model.architecture
    preprocessing = Preprocessing(image_size=tuple(a["image_size"]), channels=a["in_channels"])
    return model, Description(a, ["a", "b", "c"], preprocessing, temperature=2.0)


def listing(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_what_goes_in_comes_out(tmp_path):
    model, description = make(position="rotary", pool="attention", registers=2, init="mimetic")
    model.train().double()
    write_bundle(tmp_path / "deep" / "model", model, description)
    assert sorted(os.listdir(tmp_path / "deep")) == ["model"]
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == sorted(FILES)
    assert model.training
    assert model.head.weight.dtype == torch.float64
    loaded, back = load_torch(tmp_path / "deep" / "model", device="cpu")
    assert back == description
    assert not loaded.training
    assert loaded.architecture == model.architecture
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval().float()(images), rtol=0, atol=1e-6)


def test_permissions_are_those_of_any_new_folder_and_file(tmp_path):
    write_bundle(tmp_path / "model", *make(), onnx=False)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o666 & ~mask}


def test_onnx_can_be_left_out_and_the_card_says_so(tmp_path):
    write_bundle(tmp_path / "model", *make(), onnx=False)
    assert not (tmp_path / "model" / "model.onnx").exists()
    assert "vit export" in (tmp_path / "model" / "README.md").read_text()


def test_an_earlier_bundle_is_replaced(tmp_path):
    model, description = make()
    write_bundle(tmp_path / "model", model, description, onnx=True)
    description.temperature = 3.0
    write_bundle(tmp_path / "model", model, description, onnx=False)
    assert read_bundle(tmp_path / "model").temperature == 3.0
    assert not (tmp_path / "model" / "model.onnx").exists()
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("step", ["onnx", "rename", "weights"])
def test_a_failure_leaves_the_earlier_bundle_and_nothing_else(tmp_path, monkeypatch, step):
    model, description = make()
    write_bundle(tmp_path / "model", model, description)
    before = listing(tmp_path / "model")
    description.temperature = 3.0

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "onnx":
        monkeypatch.setattr(export, "_trace", full)
    elif step == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    else:
        real = os.replace

        def replace(source, target):
            if str(source).endswith(".part") and Path(source).is_dir():
                full()
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(VitError, match="No space left"):
        write_bundle(tmp_path / "model", model, description)
    assert listing(tmp_path / "model") == before
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system to fill")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, timeout=300
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        model, description = make(width=128)
        with pytest.raises(VitError, match="cannot write"):
            write_bundle(disk / "model", model, description)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True, timeout=300)


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(VitError, match=r"holds other files \('holiday\.jpg'\)"):
        write_bundle(tmp_path / "photos", *make(), onnx=False)
    assert os.listdir(tmp_path / "photos") == ["holiday.jpg"]


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(VitError, match="it is a file"):
        write_bundle(tmp_path / "notes", *make(), onnx=False)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_description_of_another_model_is_refused(tmp_path):
    model, description = make()
    description.class_names = ["a"]
    with pytest.raises(VitError, match="1 class names"):
        write_bundle(tmp_path / "model", model, description)
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write_bundle(tmp_path / "first", *make(), onnx=False)
    (tmp_path / "link").symlink_to("first")
    model, description = make()
    description.temperature = 7.0
    write_bundle(tmp_path / "link", model, description, onnx=False)
    assert (tmp_path / "link").is_symlink()
    assert read_bundle(tmp_path / "first").temperature == 7.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no config.json"),
        (b"", "not valid JSON"),
        (b"[]", "expected a table of names and values"),
        (b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}', "not written by vit"),
        (b'{"vit": {}}', "format"),
    ],
)
def test_foreign_and_damaged_configurations(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(VitError, match=message):
        read_bundle(tmp_path)


def test_hostile_class_names_stay_data_in_the_card(tmp_path):
    model, description = make()
    description.class_names = ["```\n# Owned\n<script>", "\x1b[31m|\u202e", "odd\udcff"]
    write_bundle(tmp_path / "model", model, description, onnx=False)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    assert "# Owned" not in lines
    assert not any(line.startswith("<script>") for line in lines)
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    assert read_bundle(tmp_path / "model").class_names == description.class_names


def test_the_card_tells_data_recipe_figures_and_calibration_but_no_path_of_this_machine(tmp_path):
    model, description = make()
    description.data = {"name": "folder", "root": "/home/someone/photos", "split_seed": 0}
    description.training = {"optimiser": "muon", "epochs": 30}
    description.metrics = {"val": {"top1": 0.5}, "test": {"top1": 0.8765, "loss": 0.25, "ece": 0.01}}
    write_bundle(tmp_path / "model", model, description, onnx=True)
    card = (tmp_path / "model" / "README.md").read_text()
    for part in ("muon", "87.65%", "0.2500", "temperature", "vit classify", "timm.create_model", "onnxruntime", '"a"'):
        assert part in card
    assert "/home/someone" not in card
    assert card.startswith("---\npipeline_tag: image-classification\n")


def test_config_is_strict_json(tmp_path):
    model, description = make()
    description.metrics = {"val": {"loss": float("nan")}}
    write_bundle(tmp_path / "model", model, description, onnx=False)

    def refuse(text):
        raise AssertionError(text)

    config = json.loads((tmp_path / "model" / "config.json").read_text(), parse_constant=refuse)
    assert config["vit"]["metrics"]["val"]["loss"] is None
