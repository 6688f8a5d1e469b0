"""An ONNX file gives its weights back, to the bit, whichever exporter wrote it; and says so where it cannot."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference import export
from vit.inference.description import Description
from vit.inference.export import export_onnx, trace
from vit.inference.loading import load_torch
from vit.inference.onnx_weights import TABLE_KEY
from vit.model import VisionTransformer

OPTIONS = {
    "plain": {},
    "rotary, registers, attention pool": {"position": "rotary", "registers": 2, "pool": "attention"},
    "sincos, mean, QK norm, LayerScale": {"position": "sincos", "pool": "mean", "qk_norm": True, "layer_scale": 0.1},
    "dot product": {"attention": "dot_product"},
    "DeiT, RMS, gated": {"distillation_token": True, "norm_layer": "rms", "mlp": "swiglu_packed", "patch_bias": False},
    "post-norm, no biases, not square": {"norm": "post", "qkv_bias": False, "image_size": (16, 24)},
}


def make(random: bool, **options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    defaults = {"image_size": 16, "patch_size": 8, "num_classes": 3, "width": 32, "depth": 2, "heads": 2}
    model = VisionTransformer(**{**defaults, **options}).eval()
    if random:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    preprocessing = Preprocessing(image_size=model.image_size)
    return model, Description(model.architecture, ["a", "b", "c"], preprocessing, temperature=1.5)


@pytest.mark.parametrize("random", [True, False], ids=["trained", "with equal tensors"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["tracer", "dynamo"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_weights_come_back_to_the_bit(tmp_path, monkeypatch, options, dynamo, random):
    monkeypatch.setattr(export, "_trace", lambda model, images: trace(model, images, dynamo=dynamo))
    model, description = make(random, **options)
    export_onnx(tmp_path / "x.onnx", model, description)
    again, told = load_torch(tmp_path / "x.onnx")
    assert told == description
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.fixture
def file(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make(True))
    return tmp_path / "x.onnx"


def edit(path, table) -> None:
    message = onnx.load(path)
    del message.metadata_props[-1]  # its checksum
    for entry in message.metadata_props:
        if entry.key == TABLE_KEY:
            entry.value = table if isinstance(table, str) else json.dumps(table(json.loads(entry.value)))
    onnx.save(message, path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("null", "does not say where its weights are"),
        ("[1, 2]", "does not say where its weights are"),
        ("{", "not valid JSON"),
        (lambda t: {**t, "head.weight": ["gone", False]}, r"does not hold the weights of head\.weight"),
        (lambda t: {**t, "head.weight": 7}, r"does not hold the weights of head\.weight"),
        (lambda t: {**t, "head.weight": t["norm.weight"]}, "head.weight"),
        (lambda t: {k: v for k, v in t.items() if k != "norm.bias"}, r"norm\.bias"),
    ],
)
def test_a_table_that_is_wrong_is_one_line(file, table, message):
    edit(file, table)
    with pytest.raises(VitError, match=message) as caught:
        load_torch(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_of_ours(file, tmp_path):
    message = onnx.load(file)
    del message.metadata_props[:]
    onnx.save(message, tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:500])
    for name, line in (("foreign", "does not describe"), ("text", "not an ONNX model"), ("cut", "not an ONNX model")):
        with pytest.raises(VitError, match=line):
            load_torch(tmp_path / f"{name}.onnx")


def test_weights_in_another_file_are_not_followed(file, tmp_path):
    message = onnx.load(file)
    del message.metadata_props[-1]  # its checksum
    onnx.save(message, tmp_path / "split.onnx", save_as_external_data=True, location="secret.bin", size_threshold=0)
    with pytest.raises(VitError, match="another file"):
        load_torch(tmp_path / "split.onnx")
    assert np.isfinite(load_torch(file)[0].head.weight.detach().numpy()).all()
