"""A bundle is a timm model: `timm.create_model("local-dir:...", pretrained=True)` gives the same logits."""

from __future__ import annotations

import pytest
import timm
import torch

from vit.data.preprocess import Preprocessing
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer

OPTIONS = {
    "class token": {},
    "mean": {"pool": "mean"},
    "mean with a class token": {"pool": "mean", "class_token": True},
    "registers": {"registers": 4},
    "registers without positions": {"registers": 2, "position_prefix": False},
    "registers alone": {"registers": 3, "pool": "mean"},
    "attention pool": {"pool": "attention"},
    "QK norm": {"qk_norm": True},
    "LayerScale": {"layer_scale": 0.1},
    "sine-cosine": {"position": "sincos"},
    "no positions": {"position": "none"},
    "not square": {"image_size": (24, 40), "patch_size": (8, 4)},
    "one channel": {"in_channels": 1},
    "five channels": {"in_channels": 5},
    "no qkv bias": {"qkv_bias": False},
    "one head": {"attention": "scaled_dot_product"},
    "narrow MLP": {"mlp_ratio": 1.5},
    "one class": {"num_classes": 1},
    "many": {
        "pool": "attention",
        "registers": 2,
        "qk_norm": True,
        "layer_scale": 1.0,
        "drop_path": 0.1,
        "dropout": 0.1,
    },
}


def write(folder, options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = {"image_size": 24, "patch_size": 8, "num_classes": 4, "size": "nano", "width": 64, "depth": 2}
    model = VisionTransformer(**{**defaults, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no weight at its start, where mistakes would hide
    a = model.architecture
    preprocessing = Preprocessing(
        image_size=tuple(a["image_size"]),
        channels=a["in_channels"],
        mean=(0.3,) * a["in_channels"],
        std=(0.2,) * a["in_channels"],
        interpolation="lanczos",
        crop_pct=0.9,
        crop_mode="squash",
    )
    names = [f"class {number}" for number in range(a["num_classes"])]
    write_bundle(folder, model, Description(a, names, preprocessing), onnx=False)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_timm_gives_the_same_logits(tmp_path, options):
    model = write(tmp_path / "model", options)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    a = model.architecture
    images = torch.randn(2, a["in_channels"], *a["image_size"])
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-5)
    assert set(theirs.state_dict()) == set(model.state_dict())


def test_timm_reads_preprocessing_and_class_names(tmp_path):
    write(tmp_path / "model", {"image_size": (24, 40)})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (3, 24, 40)
    assert list(config["mean"]) == [0.3, 0.3, 0.3]
    assert list(config["std"]) == [0.2, 0.2, 0.2]
    assert config["interpolation"] == "lanczos"
    assert config["crop_pct"] == 0.9
    assert config["crop_mode"] == "squash"
    assert list(theirs.pretrained_cfg["label_names"]) == [f"class {number}" for number in range(4)]


def test_timm_resamples_it_to_another_size_and_replaces_the_head(tmp_path):
    write(tmp_path / "model", {})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=48, num_classes=7)
    assert theirs(torch.randn(1, 3, 48, 48)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position": "rotary"}, "rotary positions"),
        ({"attention": "dot_product"}, "attention without parameters"),
        ({"norm": "post"}, "post-norm"),
    ],
)
def test_what_timm_cannot_express_it_refuses_and_the_card_says_so(tmp_path, options, reason):
    write(tmp_path / "model", options)
    with pytest.raises(RuntimeError, match=reason):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "timm cannot load this model" in card
    assert reason in card
