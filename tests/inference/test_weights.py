"""Weights that do not fit, files that are damaged, and files that would run code."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.inference.weights import build, load_checkpoint
from vit.model import VisionTransformer
from vit.pretrained.reading import load_safetensors


def make(**options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    defaults = {"image_size": 16, "patch_size": 8, "num_classes": 3, "size": "nano", "width": 32, "depth": 2}
    model = VisionTransformer(**{**defaults, **options}).eval()
    a = model.architecture
    preprocessing = Preprocessing(image_size=tuple(a["image_size"]), channels=a["in_channels"])
    return model, Description(a, ["a", "b", "c"], preprocessing)


def checkpoint(model, description, prefix="model.") -> dict:
    """What Lightning saves, in short, with both raw and averaged weights."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    return {
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "epoch": 3,
        "vit": {**description.to_dict(), "weights_prefix": prefix},
    }


@pytest.mark.parametrize("options", [{}, {"position": "rotary"}, {"init": "mimetic"}, {"position": "sincos"}])
def test_a_checkpoint_gives_the_model_back(tmp_path, options):
    model, description = make(**options)
    torch.save(checkpoint(model, description), tmp_path / "last.ckpt")
    loaded, back = load_torch(tmp_path / "last.ckpt", device="cpu")
    assert back == description
    assert loaded.architecture == model.architecture
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_the_prefix_says_which_weights_to_use(tmp_path):
    model, description = make()
    torch.save(checkpoint(model, description, prefix="ema."), tmp_path / "last.ckpt")
    loaded, _ = load_torch(tmp_path / "last.ckpt", device="cpu")
    assert torch.equal(loaded.head.bias, model.head.bias + 1)


def test_old_style_and_half_precision_files_load(tmp_path):
    model, description = make()
    torch.save(checkpoint(model.half(), description), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    loaded, _ = load_torch(tmp_path / "old.ckpt", device="cpu")
    assert loaded.head.weight.dtype == torch.float32


def test_building_draws_no_random_numbers_and_keeps_no_tie_to_the_weights():
    model, description = make()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    built = build(description, weights)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights["head.bias"].add_(1)
    assert torch.equal(built.head.bias, model.head.bias)


class Payload:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "old", "bare pickle", "beside a real checkpoint"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, form):
    payload, path = Payload(tmp_path / "owned"), tmp_path / "bad.ckpt"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "beside a real checkpoint":
        torch.save({**checkpoint(*make()), "callbacks": payload}, path)
    else:
        torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        VitError, match=r"bad\.ckpt was refused: loading it would run code \((posix|nt)\.system\)"
    ) as caught:
        load_torch(path, device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just some text\n", "not a checkpoint"),
        (b"hello world", r"x\.ckpt is truncated or not a checkpoint$"),  # torch's own complaint is the number 101
        (b"PK\x03\x04" + b"\0" * 100, "truncated or not a checkpoint"),
        (bytes(range(256)) * 4, "not a checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "not a checkpoint"),
        (pickle.dumps({"a": 1}, protocol=4), "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(VitError, match=message) as caught:
        load_checkpoint(tmp_path / "x.ckpt")
    assert "x.ckpt" in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint(tmp_path, share):
    torch.save(checkpoint(*make()), tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(VitError, match=r"cut\.ckpt is truncated or not a checkpoint"):
        load_checkpoint(tmp_path / "cut.ckpt")


def test_a_checkpoint_damaged_inside(tmp_path):
    """Bytes that changed on the disk or on the way must not become other labels."""
    torch.save(checkpoint(*make()), tmp_path / "x.ckpt")
    whole = bytearray((tmp_path / "x.ckpt").read_bytes())
    weight = make()[0].state_dict()["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    place = whole.index(weight) + 4000
    whole[place] ^= 0xFF
    (tmp_path / "x.ckpt").write_bytes(whole)
    with pytest.raises(VitError, match=r"x\.ckpt is damaged: its checksums do not fit") as caught:
        load_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


def test_a_file_that_would_unpack_without_end(tmp_path):
    torch.save(checkpoint(*make()), tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in whole.infolist():
            bomb.writestr(part.filename, whole.read(part))
    with pytest.raises(VitError, match=r"bomb\.ckpt was refused: its parts are compressed"):
        load_checkpoint(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda model, d: model.state_dict(), "a plain state dict"),
        (lambda model, d: {"state_dict": model.state_dict()}, "a foreign checkpoint"),
        (lambda model, d: [1, 2], "a foreign checkpoint"),
        (lambda model, d: {**checkpoint(model, d), "vit": 3}, "a foreign checkpoint"),
        (lambda model, d: {**checkpoint(model, d), "state_dict": 3}, "no weights"),
        (lambda model, d: checkpoint(model, d, prefix="other."), "'other.'"),
        (lambda model, d: checkpoint(model, d, prefix=5), "no weights"),
    ],
)
def test_foreign_checkpoints(tmp_path, content, message):
    torch.save(content(*make()), tmp_path / "x.pt")
    with pytest.raises(VitError, match=message):
        load_torch(tmp_path / "x.pt", device="cpu")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(VitError, match="No such file"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(VitError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(VitError, match="is a folder"):
        load_safetensors(tmp_path)


def test_damaged_safetensors(tmp_path, small_bundle):
    whole = (small_bundle / "model.safetensors").read_bytes()
    for content in (b"\0", b"junk" * 10, whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(VitError, match=r"model\.safetensors is truncated or not a safetensors file"):
            load_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), r"missing norm\.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda w: w.update(cls_token=torch.zeros(1, 1, 5)),
            r"misshapen cls_token \(1, 1, 5\) instead of \(1, 1, 32\)",
        ),
        (lambda w: [w.pop(k) for k in list(w) if "attn" in k], "and 5 more"),
        (lambda w: w.pop("head.weight"), r"no weight called head\.weight"),
        (lambda w: w.update({"head.weight": torch.zeros(9, 32)}), r"head\.weight has shape \(9, 32\)"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.1.")], "1 blocks, its description says 2"),
        (lambda w: w.update({"head.bias": "zero"}), r"head\.bias is str, not a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    model, description = make()
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(VitError, match=message) as caught:
        build(description, weights, "the/file")
    assert str(caught.value).startswith("the/file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 65536, "heads": 1}, "head.weight has shape"),
        ({"depth": 1000}, "2 blocks, its description says 1000"),
        ({"mlp_ratio": 1e6}, "mlp_ratio"),
        ({"mlp_ratio": "wide"}, "mlp_ratio"),
        ({"registers": 60000}, "registers"),
        ({"in_channels": 4000}, r"patch_embed\.proj\.weight has shape"),
        ({"heads": 5}, "heads"),
        ({"attention": "sideways"}, "sideways"),
        ({"frobnicate": 3}, "frobnicate"),
        ({"dropout": "high"}, "the/file"),
    ],
)
def test_a_description_that_lies_about_the_weights_is_refused_before_it_takes_memory(change, message):
    model, description = make()
    description.architecture = {**description.architecture, **change}
    with pytest.raises(VitError, match=message):
        build(description, model.state_dict(), "the/file")
