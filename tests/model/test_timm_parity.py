"""The same model as timm's: weights go both ways under the same names, and the logits are equal.

Every weight is shaken first, so that a bias of zero, a gain of one or a class token of almost nothing hides no error.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from vit.errors import VitError
from vit.model import VisionTransformer, create_model
from vit.model.reduction import ReducedTokens

# ours, and the same in timm's words
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class token": (dict(), dict()),
    "mean, registers, bare prefix, QK norm, LayerScale": (
        dict(pool="mean", registers=3, position_prefix=False, qk_norm=True, layer_scale=0.1),
        dict(global_pool="avg", class_token=False, reg_tokens=3, no_embed_class=True, qk_norm=True, init_values=0.1),
    ),
    "mean beside a class token": (
        dict(pool="mean", class_token=True),
        dict(global_pool="avg"),
    ),
    "attention pool": (
        dict(pool="attention"),
        dict(global_pool="map", class_token=False),
    ),
    "attention pool, class token, registers": (
        dict(pool="attention", class_token=True, registers=2),
        dict(global_pool="map", reg_tokens=2),
    ),
    "class token and registers": (dict(registers=4), dict(reg_tokens=4)),
    "class token and registers without positions": (
        dict(registers=1, position_prefix=False),
        dict(reg_tokens=1, no_embed_class=True),
    ),
    "not square": (
        dict(image_size=(24, 40), patch_size=(8, 4)),
        dict(img_size=(24, 40), patch_size=(8, 4)),
    ),
    "not square, mean": (
        dict(image_size=(40, 16), patch_size=(4, 8), pool="mean"),
        dict(img_size=(40, 16), patch_size=(4, 8), global_pool="avg", class_token=False),
    ),
    "one channel": (dict(in_channels=1), dict(in_chans=1)),
    "two channels": (dict(in_channels=2, qkv_bias=False), dict(in_chans=2, qkv_bias=False)),
    "five channels": (dict(in_channels=5, mlp_ratio=2.5), dict(in_chans=5, mlp_ratio=2.5)),
    "no positions": (dict(position="none"), dict(pos_embed="none")),
    "sine-cosine, as timm keeps it": (dict(position="sincos"), dict()),
    "differential": (
        dict(attention="differential", qk_norm=True, attention_norm=True),
        dict(attn_layer="diff", qk_norm=True, scale_attn_norm=True),
    ),
    "one head": (dict(attention="scaled_dot_product"), dict(num_heads=1)),
}


def both(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[VisionTransformer, TimmVisionTransformer]:
    model = VisionTransformer(
        **{**dict(image_size=32, patch_size=8, num_classes=7, width=48, depth=3, heads=3), **ours}
    )
    timms = TimmVisionTransformer(
        **{**dict(img_size=32, patch_size=8, num_classes=7, embed_dim=48, depth=3, num_heads=3), **theirs}
    )
    return model.eval(), timms.eval()


def assert_same(ours: VisionTransformer, theirs: TimmVisionTransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, ours.patch_embed.proj.in_channels, *ours.image_size, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_timm_loads_our_weights(shake, ours, theirs):
    model, timms = both(ours, theirs)
    timms.load_state_dict(shake(model, 0.2).state_dict(), strict=True)
    assert_same(model, timms)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_we_load_timms_weights(shake, ours, theirs):
    model, timms = both(ours, theirs)
    model.load_state_dict(shake(timms, 0.2, seed=1).state_dict(), strict=True)
    assert_same(model, timms)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_registered_models_of_reduced_depth(shake, size):
    model = create_model(f"vit_{size}", image_size=224, patch_size=16, num_classes=11, depth=2).eval()
    timms = timm.create_model(f"vit_{size}_patch16_224", depth=2, num_classes=11).eval()
    timms.load_state_dict(shake(model, 0.1).state_dict(), strict=True)
    assert_same(model, timms)
    model.load_state_dict(shake(timms, 0.1, seed=2).state_dict(), strict=True)
    assert_same(model, timms)


@pytest.mark.parametrize(
    ("size", "patch", "name"),
    [
        ("tiny", 16, "vit_tiny_patch16_224"),
        ("small", 16, "vit_small_patch16_224"),
        ("base", 16, "vit_base_patch16_224"),
        ("large", 16, "vit_large_patch16_224"),
        ("huge", 14, "vit_huge_patch14_224"),
    ],
)
def test_sizes_are_those_of_the_field(size, patch, name):
    """Every parameter of timm's registered model has its like here: same name, same shape.  Nothing is allocated."""
    with torch.device("meta"):
        model = create_model(f"vit_{size}", image_size=224, patch_size=patch, num_classes=1000)
        timms = timm.create_model(name, num_classes=1000)
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in timms.named_parameters()}
    assert ours == theirs
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in timms.parameters())


@pytest.mark.parametrize(
    "name", ["class token and registers", "mean beside a class token", "attention pool, class token, registers"]
)
def test_intermediate_results_are_timms(shake, name):
    """`forward_features`, `forward_head` and `get_intermediate_layers`, with timm's names and timm's numbers."""
    model, timms = both(*PAIRS[name])
    timms.load_state_dict(shake(model, 0.2).state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    close = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(features, timms.forward_features(images), **close)
        torch.testing.assert_close(model.forward_head(features), model(images), rtol=0, atol=0)
        for pre_logits in (False, True):
            theirs = timms.forward_head(timms.forward_features(images), pre_logits=pre_logits)
            torch.testing.assert_close(model.forward_head(features, pre_logits=pre_logits), theirs, **close)
        for options in (
            dict(),
            dict(n=2, norm=True),
            dict(n=[0, 2], reshape=True),
            dict(n=(1,), return_prefix_tokens=True),
        ):
            ours, theirs = (each.get_intermediate_layers(images, **options) for each in (model, timms))
            torch.testing.assert_close([*ours], [*theirs], **close)


def test_intermediate_results_of_reduced_tokens_say_what_they_stand_for(shake):
    options = dict(image_size=32, patch_size=8, num_classes=7, width=48, depth=3, heads=3, pool="mean")
    model = shake(VisionTransformer(**options, reduction="merge", reduction_schedule=[4, 0, 3]), 0.2).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model.forward_features(images)
        assert isinstance(features, ReducedTokens)
        assert features.sizes_BN is not None
        torch.testing.assert_close(features.sizes_BN.sum(dim=1), torch.full((2,), 16.0))
        torch.testing.assert_close(model.forward_head(features), model(images), rtol=0, atol=0)
        assert [x.shape[1] for x in model.get_intermediate_layers(images, 3)] == [12, 12, 9]
        with pytest.raises(VitError, match="reshape: tokens are reduced"):
            model.get_intermediate_layers(images, reshape=True)
    for n in (4, [3], [-1]):
        with pytest.raises(VitError, match="blocks 0 to 2"):
            model.get_intermediate_layers(images, n)
