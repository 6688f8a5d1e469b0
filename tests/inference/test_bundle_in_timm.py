"""A bundle is a timm model: `timm.create_model("local-dir:...", pretrained=True)` gives the same logits."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from vit.data.preprocess import Preprocessing
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.model import VisionTransformer
from vit.pretrained.create import load_pretrained

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
    "differential": {"attention": "differential", "qk_norm": True, "registers": 1},
    "narrow MLP": {"mlp_ratio": 1.5},
    "one class": {"num_classes": 1},
    "RMS": {"norm_layer": "rms", "qk_norm": True},
    "CLIP": {"embed_norm": "tokens", "patch_bias": False, "norm_eps": 1e-5, "activation": "quick_gelu"},
    "CLIP with a LayerScale that starts at 0": {"layer_scale": 0, "norm_eps": 1e-5, "pool": "mean"},
    "SigLIP": {"pool": "attention", "activation": "gelu_tanh", "image_size": 26, "crop_to_patches": True},
    "BEiT-3": {"attention_norm": True, "mlp_norm": True, "norm_eps": 1e-5, "pool": "mean", "class_token": True},
    "AIMv2": {
        **{"norm_layer": "rms", "norm_eps": 1e-5, "embed_norm": "patches", "mlp": "swiglu", "mlp_ratio": 2.67},
        **{"pool": "mean", "final_norm": "tokens", "qkv_bias": False, "proj_bias": False},
    },
    "gated": {"mlp": "swiglu", "mlp_norm": True, "registers": 1},
    "gated, RMS": {"mlp": "swiglu", "norm_layer": "rms", "layer_scale": 0.1, "embed_norm": "patches"},
    "packed": {"mlp": "swiglu_packed", "mlp_ratio": 2.677},
    "packed, RMS": {"mlp": "swiglu_packed", "norm_layer": "rms", "embed_norm": "tokens", "patch_bias": False},
    "norms of the patches": {"embed_norm": "patches"},
    "no last norm": {"final_norm": "none", "registers": 2},
    "norm before the mean": {"pool": "mean", "final_norm": "tokens"},
    "norm after the class token": {"final_norm": "pooled"},
    "mean of all tokens": {"pool": "mean", "pool_prefix": True, "class_token": True},
    "attention pool over all tokens": {"pool": "attention", "pool_prefix": True, "registers": 1},
    "no biases": {"proj_bias": False, "qkv_bias": False},
    "DeiT": {"distillation_token": True},
    "DeiT with RMS, no last norm": {"distillation_token": True, "norm_layer": "rms", "final_norm": "none"},
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


DINOV3 = {"position": "rotary_box", "norm_eps": 1e-5, "qkv_bias": False, "layer_scale": 1e-5}
AS_EVA = {
    "class token": {},
    "mean": {"pool": "mean", "class_token": True, "registers": 4, "final_norm": "tokens", "image_size": (24, 40)},
    "gated": {"mlp": "swiglu", "mlp_ratio": 2.67, "registers": 1, "qk_norm": True, "mlp_norm": True},
    "packed": {"mlp": "swiglu_packed", "mlp_ratio": 2.67, "attention_norm": True},
    "attention pool": {"pool": "attention", "registers": 2, "pool_prefix": True, "final_norm": "none"},
    "CLIP's norm": {"embed_norm": "tokens", "patch_bias": False, "layer_scale": 0, "in_channels": 1},
}


@pytest.mark.parametrize("options", AS_EVA.values(), ids=AS_EVA)
def test_a_dinov3_loads_as_timms_own_and_here(tmp_path, options):
    """timm has it under other names, and so has the bundle; here it is read back."""
    model = write(tmp_path / "model", {**DINOV3, **options})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    a = model.architecture
    images = torch.randn(2, a["in_channels"], *a["image_size"])
    again, description = load_torch(tmp_path / "model", device="cpu")
    third = load_pretrained(tmp_path / "model").model
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-5)
        assert torch.equal(again(images), model(images))
        assert torch.equal(third(images), model(images))
    assert description.architecture == a


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
        ({"norm_eps": 1e-4}, "norms of eps 0.0001"),
        ({"mlp": "swiglu", "norm_eps": 1e-5}, "swiglu MLPs with layer norms of eps 1e-05"),
        ({"embed_norm": "tokens"}, "a bias of the patches"),
        ({"patch_bias": False}, "no bias of the patches"),
        ({"embed_norm": "patches", "norm_eps": 1e-5}, "a norm of the patches of eps 1e-05"),
        ({"mlp": "swiglu", "pool": "attention"}, "attention pooling with a plain MLP over gated ones"),
        ({"distillation_token": True, "registers": 1}, "registers beside a distillation token"),
        ({"distillation_token": True, "position_prefix": False}, "a distillation token without a position"),
        ({"distillation_token": True, "final_norm": "pooled"}, "a norm after pooling beside a distillation token"),
        ({"distillation_token": True, "norm_eps": 1e-5}, "a distillation token with plain MLPs and norms of eps 1e-05"),
        ({**DINOV3, "qkv_bias": True}, "biases of the keys beside DINOv3's positions"),
        ({**DINOV3, "layer_scale": None}, "no LayerScale beside"),
        ({**DINOV3, "norm_eps": 1e-6}, "norms other than LayerNorm of eps 1e-05 beside"),
        ({**DINOV3, "activation": "gelu_tanh"}, "the activation gelu_tanh beside"),
        ({**DINOV3, "distillation_token": True}, "a distillation token beside"),
        ({**DINOV3, "pool": "attention", "registers": 1}, "pooling with pool_prefix=false beside"),
        ({**DINOV3, "mlp": "swiglu_packed", "mlp_norm": True}, "a norm inside packed MLPs beside"),
    ],
)
def test_what_timm_cannot_express_it_refuses_and_the_card_says_so(tmp_path, options, reason):
    model = write(tmp_path / "model", options)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "timm cannot load this model" in card
    assert reason in card
    images = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(load_torch(tmp_path / "model", device="cpu")[0](images), model(images))
