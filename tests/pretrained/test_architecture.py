"""Reading a timm model: whatever options it was built with, the result is the same model or a refusal."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, LayerNorm, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained.architecture import read_architecture
from vit.training.distill import forward_both_heads

SMALL: dict[str, Any] = dict(img_size=16, patch_size=8, num_classes=3, embed_dim=24, depth=2, num_heads=2)


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


OPTIONS = st.fixed_dictionaries(
    {},
    optional=dict(
        img_size=st.sampled_from([16, (8, 24), 17, (16, 30)]),
        patch_size=st.sampled_from([8, 4, (8, 4)]),
        in_chans=st.integers(1, 4),
        num_classes=st.integers(0, 4),
        global_pool=st.sampled_from(["token", "avg", "map", "token", "avg", "map", "max", "avgmax", "prr", ""]),
        mlp_ratio=st.sampled_from([4, 2.0, 48 / 11, 2.6667, 0.5]),
        qkv_bias=st.booleans(),
        qk_norm=st.booleans(),
        scale_attn_norm=st.booleans(),
        scale_mlp_norm=st.booleans(),
        proj_bias=st.booleans(),
        init_values=st.sampled_from([None, 1e-5, 1]),
        class_token=st.booleans(),
        pos_embed=st.sampled_from(["learn", "none"]),
        no_embed_class=st.booleans(),
        reg_tokens=st.integers(0, 2),
        pre_norm=st.booleans(),
        final_norm=st.booleans(),
        fc_norm=st.sampled_from([None, True, False]),
        pool_include_prefix=st.booleans(),
        dynamic_img_size=st.booleans(),
        dynamic_img_pad=st.sampled_from([False, False, False, True]),
        embed_norm_layer=st.sampled_from([None, None, LayerNorm, RmsNorm]),
        norm_layer=st.sampled_from([None, RmsNorm, partial(LayerNorm, eps=1e-2), partial(RmsNorm, eps=1e-5)]),
        act_layer=st.sampled_from([None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]),
        mlp_layer=st.sampled_from([SwiGLU, SwiGLUPacked, GluMlp]),
        attn_layer=st.sampled_from(["diff", "attn", "attn"]),
    ),
)


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(options=OPTIONS)
def test_the_same_model_or_a_refusal(options):
    theirs = built(options)
    found = None if theirs is None else read(theirs)
    if theirs is None or found is None:
        return
    ours = VisionTransformer(**found).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, ours.patch_embed.proj.in_channels, *ours.image_size)
    with torch.no_grad():
        if theirs.dynamic_img_size and ours.architecture["crop_to_patches"]:
            return  # a size that timm itself refuses
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def built(options: dict[str, Any]) -> Any:
    """timm's model, or None where it has no such model."""
    with contextlib.suppress(Exception):
        return shaken(TimmVisionTransformer(**{**SMALL, **options}))


def read(model: Any) -> dict[str, Any] | None:
    with contextlib.suppress(VitError):
        return read_architecture(model)


def test_most_of_what_timm_can_build_is_known():
    """So that the test above compares something."""
    usual = OPTIONS.filter(
        lambda options: not options.keys() & {"attn_layer", "mlp_layer", "act_layer", "embed_norm_layer"}
    )
    found = []

    @settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(options=usual)
    def look(options):
        theirs = built(options)
        if theirs is not None:
            found.append(read(theirs) is not None)

    look()
    assert sum(found) > 0.4 * len(found) > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(global_pool="max"), "pooling (max)"),
        (dict(global_pool=""), "pooling ()"),
        (dict(global_pool="prr"), "pooling (prr)"),
        (dict(act_layer="relu"), "Mlp with ReLU"),
        (dict(mlp_layer=GluMlp), "GluMlp"),
        (dict(dynamic_img_pad=True), "pads images"),
        (dict(embed_norm_layer=RmsNorm), "several kinds"),
        (dict(pre_norm=True, embed_norm_layer=LayerNorm), "two norms"),
        (dict(fc_norm=True, norm_layer="batchnorm1d"), "norm"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_known_is_refused_in_words(options, words):
    with pytest.raises(VitError) as error:
        read_architecture(TimmVisionTransformer(**{**SMALL, **options}))
    assert words in str(error.value)


def test_a_distilled_deit():
    theirs = shaken(VisionTransformerDistilled(**SMALL))
    ours = VisionTransformer(**read_architecture(theirs)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
        classes, distilled = forward_both_heads(ours, images)
        theirs.set_distilled_training(True)
        theirs.train()
        expected = theirs(images)
    torch.testing.assert_close((classes, distilled), expected, rtol=1e-5, atol=1e-5)


DINOV3: dict[str, Any] = dict(
    **SMALL,
    rope_type="dinov3",
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    rope_temperature=100.0,
    rope_rotate_half=True,
)


@pytest.mark.parametrize(
    "options",
    [
        dict(rope_temperature=50.0),
        dict(rope_rotate_half=False),
        dict(rope_grid_indexing="xy"),
        dict(use_abs_pos_emb=True),
        dict(qkv_fused=False),
        dict(attn_type="rope"),
        dict(use_post_norm=True),
        dict(rope_type="cat"),
        dict(use_rot_pos_emb=False),
        dict(init_values=0.1, attn_only_layer_scale=True),
        dict(global_pool="map", attn_pool_num_heads=4),
    ],
    ids=str,
)
def test_an_eva_that_is_no_dinov3_is_refused(options):
    model = Eva(**{**DINOV3, "embed_dim": 32, **options})
    model.pretrained_cfg = {}
    with pytest.raises(VitError):
        read_architecture(model)


def test_another_kind_of_network_is_refused_by_its_class():
    with pytest.raises(VitError, match="timm's ResNet, is not a plain"):
        read_architecture(timm.create_model("test_resnet"))
