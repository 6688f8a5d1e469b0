"""The ONNX file: same logits as torch, any batch size, describes itself, kept only when right."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference import export
from vit.inference.description import Description
from vit.inference.export import export_onnx, trace
from vit.inference.onnx_backend import OnnxBackend, open_session, session_description
from vit.model import VisionTransformer

OPTIONS = {
    "plain": {},
    "rotary, registers, attention pool": {"position": "rotary", "registers": 2, "pool": "attention"},
    "sincos, mean, QK norm, LayerScale": {"position": "sincos", "pool": "mean", "qk_norm": True, "layer_scale": 0.1},
    "dot product": {"attention": "dot_product"},
    "differential": {"attention": "differential"},
    "post-norm, no positions": {"norm": "post", "position": "none"},
    "not square, one channel": {"image_size": (24, 40), "patch_size": (8, 4), "in_channels": 1},
    "CLIP": {"embed_norm": "tokens", "patch_bias": False, "norm_eps": 1e-5, "activation": "quick_gelu"},
    "AIMv2": {
        **{"norm_layer": "rms", "embed_norm": "patches", "mlp": "swiglu", "pool": "mean", "final_norm": "tokens"},
        **{"qkv_bias": False, "proj_bias": False},
    },
    "BEiT-3 and tanh": {"attention_norm": True, "mlp_norm": True, "pool_prefix": True, "pool": "mean"}
    | {"class_token": True, "activation": "gelu_tanh"},
    "DeiT, packed, pixels left over": {"distillation_token": True, "mlp": "swiglu_packed"}
    | {"image_size": 30, "crop_to_patches": True},
    "DINOv3": {"position": "rotary_box", "registers": 2, "layer_scale": 0.1, "final_norm": "none"},
}


def make(**options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    defaults = {"image_size": 24, "patch_size": 8, "num_classes": 3, "size": "nano", "width": 32, "depth": 2}
    model = VisionTransformer(**{**defaults, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    a = model.architecture
    preprocessing = Preprocessing(image_size=tuple(a["image_size"]), channels=a["in_channels"])
    return model, Description(a, ["a", "b", "odd\udcff"], preprocessing, temperature=1.5)


@pytest.mark.parametrize("dynamo", [False, True], ids=["tracer", "dynamo"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_logits_at_every_batch_size_by_either_exporter(tmp_path, monkeypatch, options, dynamo, capfd):
    monkeypatch.setattr(export, "_trace", lambda model, images: trace(model, images, dynamo=dynamo))
    model, description = make(**options)
    export_onnx(tmp_path / "x.onnx", model, description)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # neither exporter's chatter reaches the user
    backend = OnnxBackend(tmp_path / "x.onnx")
    assert backend.description == description
    a = model.architecture
    for batch in (1, 2, 5):
        images = torch.randn(batch, a["in_channels"], *a["image_size"])
        with torch.no_grad():
            np.testing.assert_allclose(backend.logits(images.numpy()), model(images).numpy(), rtol=0, atol=1e-4)


def test_the_message_is_valid_names_its_ends_and_no_path_of_this_machine(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    message = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(message, full_check=True)
    assert max(opset.version for opset in message.opset_import) >= 17
    (given,), (answer,) = message.graph.input, message.graph.output
    assert (given.name, answer.name) == ("image", "logits")
    shape = [axis.dim_value or axis.dim_param for axis in given.type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 24, 24]
    assert [axis.dim_value or axis.dim_param for axis in answer.type.tensor_type.shape.dim] == ["batch", 3]
    assert os.path.dirname(export.__file__).encode() not in (tmp_path / "x.onnx").read_bytes()


def test_the_newer_exporter_takes_over_where_the_tracer_is_gone(tmp_path, monkeypatch):
    real = torch.onnx.export

    def without_tracer(*args, dynamo, **kwargs):
        if not dynamo:
            raise ValueError("dynamo=False is no longer supported")
        return real(*args, dynamo=dynamo, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", without_tracer)
    export_onnx(tmp_path / "x.onnx", *make())
    assert open_session(tmp_path / "x.onnx").run(["logits"], {"image": np.zeros((3, 3, 24, 24), np.float32)})[
        0
    ].shape == (3, 3)


def test_the_model_is_left_as_it_was(tmp_path):
    model, description = make(dropout=0.5)
    model.train().double()
    export_onnx(tmp_path / "x.onnx", model, description)
    assert model.training
    assert model.head.weight.dtype == torch.float64
    assert model.head.weight.requires_grad


def test_a_file_that_disagrees_with_torch_is_not_kept(tmp_path, monkeypatch):
    model, description = make()
    (tmp_path / "x.onnx").write_bytes(b"the one before")
    other, _ = make()
    with torch.no_grad():
        other.head.bias.add_(0.01)
    monkeypatch.setattr(export, "_trace", lambda _, images: trace(other, images, dynamo=False))
    with pytest.raises(VitError, match=r"x\.onnx was not written: .* disagree by"):
        export_onnx(tmp_path / "x.onnx", model, description)
    assert (tmp_path / "x.onnx").read_bytes() == b"the one before"
    assert os.listdir(tmp_path) == ["x.onnx"]


def test_weights_that_are_not_numbers_are_not_exported(tmp_path):
    model, description = make()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VitError, match="disagree by nan"):
        export_onnx(tmp_path / "x.onnx", model, description)
    assert os.listdir(tmp_path) == []


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VitError, match=r"cannot write .*x\.onnx: No space left"):
        export_onnx(tmp_path / "x.onnx", *make())
    assert os.listdir(tmp_path) == []


def test_a_model_beyond_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_MAX_BYTES", 1000)
    model, description = make()
    assert not export.fits_onnx(model)
    with pytest.raises(VitError, match="too large for one ONNX file"):
        export_onnx(tmp_path / "x.onnx", model, description)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x01" * 50])
def test_what_is_no_onnx_file(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(VitError, match=r"x\.onnx is (empty|damaged or not an ONNX model)"):
        OnnxBackend(tmp_path / "x.onnx")


def test_a_truncated_file(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    whole = (tmp_path / "x.onnx").read_bytes()
    (tmp_path / "x.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VitError, match="damaged or not an ONNX model"):
        OnnxBackend(tmp_path / "x.onnx")


def rewrite(path, change) -> None:
    message = onnx.load(path)
    del message.metadata_props[-1]  # its checksum
    change(message)
    path.write_bytes(message.SerializeToString())


def test_a_foreign_onnx_file(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    rewrite(tmp_path / "x.onnx", lambda message: message.ClearField("metadata_props"))
    with pytest.raises(VitError, match="does not describe its classes and preprocessing"):
        OnnxBackend(tmp_path / "x.onnx")


def test_metadata_of_another_model(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    _, other = make(image_size=48)
    rewrite(tmp_path / "x.onnx", lambda message: setattr(message.metadata_props[0], "value", other.to_json()))
    backend = OnnxBackend(tmp_path / "x.onnx")
    for use in (backend.ready, lambda: backend.logits(np.zeros((1, 3, 48, 48), np.float32))):
        with pytest.raises(VitError, match="not the one that its description tells of"):
            use()


def test_metadata_that_is_damaged(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    rewrite(tmp_path / "x.onnx", lambda message: setattr(message.metadata_props[0], "value", "{"))
    with pytest.raises(VitError, match="not valid JSON"):
        OnnxBackend(tmp_path / "x.onnx")


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"odd\xff.onnx")
    export_onnx(os.fsdecode(path), *make())
    assert session_description(open_session(os.fsdecode(path)), path.decode("latin-1")).temperature == 1.5


def test_it_runs_where_there_is_no_torch(tmp_path):
    export_onnx(tmp_path / "x.onnx", *make())
    code = (
        "import sys, numpy as np; sys.modules['torch'] = None\n"
        "from vit.inference.onnx_backend import OnnxBackend\n"
        f"print(OnnxBackend({str(tmp_path / 'x.onnx')!r}).logits(np.zeros((4, 3, 24, 24), np.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "(4, 3)\n"
