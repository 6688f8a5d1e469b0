"""What a model says about itself survives the way to a file and back, and lies are refused in one line."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.description import FORMAT, Description, plain, without_folders

ARCHITECTURE = {
    "image_size": [8, 12],
    "patch_size": [4, 4],
    "num_classes": 2,
    "in_channels": 3,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "registers": 0,
}


def description(**changes) -> Description:
    values = {
        "architecture": ARCHITECTURE,
        "class_names": ["a", "b"],
        "preprocessing": Preprocessing(image_size=(8, 12)),
        "temperature": 1.25,
        "data": {"name": "digits", "mean": (0.5,)},
        "metrics": {"test": {"top1": np.float32(0.5), "loss": math.nan}},
        "training": {"seed": 3},
    }
    return Description(**{**values, **changes})


def test_round_trip_through_json_keeps_everything_as_plain_types():
    there = json.loads(description().to_json())
    back = Description.from_dict(there, "x")
    assert back.to_dict() == there
    assert back.class_names == ["a", "b"]
    assert back.temperature == 1.25
    assert back.preprocessing == Preprocessing(image_size=(8, 12))
    assert back.data == {"name": "digits", "mean": [0.5]}
    assert back.metrics == {"test": {"top1": 0.5, "loss": None}}  # JSON has no NaN


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcff\n\x1b")),
        min_size=2,
        max_size=2,
    )
)
def test_any_class_name_survives_in_ascii(names):
    text = description(class_names=names).to_json()
    assert text.isascii()
    assert Description.from_json(text).class_names == names


def broken(path: str, value: object) -> dict:
    whole = copy.deepcopy(description().to_dict())
    *parents, last = path.split(".")
    table = whole
    for key in parents:
        table = table[key]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", None, "format"),
        ("format", True, "format"),
        ("format", FORMAT + 1, "newer version"),
        ("architecture", [], "architecture"),
        ("architecture.width", None, "architecture.width"),
        ("architecture.width", "16", "architecture.width"),
        ("architecture.width", 10**12, "architecture.width"),
        ("architecture.depth", 0, "architecture.depth"),
        ("architecture.heads", 2.0, "architecture.heads"),
        ("architecture.registers", -1, "architecture.registers"),
        ("architecture.image_size", 8, "architecture.image_size"),
        ("architecture.image_size", [8], "architecture.image_size"),
        ("architecture.image_size", [8, 10**9], "architecture.image_size"),
        ("architecture.image_size", [900_000, 900_000], "patches"),
        ("architecture.patch_size", [0, 4], "architecture.patch_size"),
        ("class_names", "ab", "class_names"),
        ("class_names", ["a", 1], "class_names"),
        ("class_names", ["a"], "1 class names for a model of 2"),
        ("class_names", ["a", "\ud800"], "not text"),
        ("preprocessing", None, "preprocessing"),
        ("preprocessing.image_size", [8, 8], "images of"),
        ("preprocessing.channels", 1, "channel"),
        ("preprocessing.std", [0, 0, 0], "some/file.ckpt: preprocessing: std"),
        ("preprocessing.interpolation", "cubist", "cubist"),
        ("temperature", 0, "temperature"),
        ("temperature", "1", "temperature"),
        ("temperature", math.nan, "temperature"),
        ("data", [1], "data"),
        ("metrics", "good", "metrics"),
    ],
)
def test_malformed_descriptions_are_refused_naming_file_and_key(path, value, named):
    with pytest.raises(VitError) as caught:
        Description.from_dict(broken(path, value), "some/file.ckpt")
    message = str(caught.value)
    assert named in message
    assert "some/file.ckpt" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [None, 3, "text", [], {1: 2}])
def test_what_is_no_table_is_refused(value):
    with pytest.raises(VitError, match="description"):
        Description.from_dict(value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(VitError, match=r"file\.onnx is not valid JSON"):
        Description.from_json(text, "file.onnx")


def test_unknown_keys_are_left_aside_so_that_later_versions_may_add_some():
    assert Description.from_dict({**description().to_dict(), "weights_prefix": "ema."}).temperature == 1.25


def test_plain_reduces_what_configurations_and_figures_hold():
    from pathlib import Path

    value = {"a": (1, np.int64(2)), "b": np.arange(2), 3: {True}, "p": Path("x"), "f": math.inf}
    assert plain(value) == {"a": [1, 2], "b": [0, 1], "3": [True], "p": "x", "f": None}


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ("/home/someone/photos", "photos"),
        ("data.root=/home/someone/photos", "data.root=photos"),
        ("data.root='~/my photos'", "data.root=my photos'"),
        ("+data.root=../someone/photos", "+data.root=photos"),
        ("local-dir:/home/someone/dinov2", "local-dir:dinov2"),
        ("model.name=local-dir:../someone/dinov2", "model.name=local-dir:dinov2"),
        (r"C:\Users\someone\photos", "photos"),
        ("hf-hub:someone/dinov2@main", "hf-hub:someone/dinov2@main"),
        ("model.name=timm/vit_tiny_patch16_224", "model.name=timm/vit_tiny_patch16_224"),
        (3, 3),
    ],
)
def test_where_files_lay_is_nobodys_business(told, left):
    assert without_folders({"a": [told]}) == {"a": [left]}
