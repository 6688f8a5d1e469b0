"""The whole model: against the formulas of its parts, rebuilt from its description, and refusing what cannot be."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vit.errors import VitError
from vit.model import SIZES, VisionTransformer, create_model

SMALL: dict[str, Any] = dict(image_size=8, patch_size=4, num_classes=5, width=16, depth=2, heads=2)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "not square": dict(image_size=(8, 12), patch_size=(4, 2), in_channels=2),
    "mean": dict(pool="mean", registers=2, qk_norm=True, layer_scale=0.1, position_prefix=False),
    "mean with class token": dict(pool="mean", class_token=True, in_channels=1),
    "attention pool": dict(pool="attention", registers=1, in_channels=5),
    "rotary": dict(position="rotary", registers=1, image_size=(8, 16)),
    "sine-cosine": dict(position="sincos", pool="mean"),
    "no positions": dict(position="none", qkv_bias=False),
    "post-norm": dict(norm="post", layer_scale=0.5),
    "post-norm with mean": dict(norm="post", pool="mean"),
    "dot product": dict(attention="dot_product", in_channels=1),
    "dot product, post-norm, attention pool": dict(attention="dot_product", norm="post", pool="attention"),
    "one head": dict(attention="scaled_dot_product", mlp_ratio=1.3),
    "CLIP": dict(embed_norm="tokens", patch_bias=False, norm_eps=1e-5, activation="quick_gelu"),
    "SigLIP": dict(pool="attention", activation="gelu_tanh", mlp_ratio=2.7, image_size=(9, 13), crop_to_patches=True),
    "AIMv2": dict(
        **dict(norm_layer="rms", norm_eps=1e-3, embed_norm="patches", mlp="swiglu", pool="mean", final_norm="tokens"),
        **dict(qkv_bias=False, proj_bias=False, qk_norm=True),
    ),
    "BEiT-3": dict(attention_norm=True, mlp_norm=True, pool="mean", class_token=True, norm_eps=1e-5),
    "packed, both inner norms": dict(mlp="swiglu_packed", mlp_norm=True, attention_norm=True, registers=2),
    "no last norm": dict(final_norm="none", registers=3, position_prefix=False),
    "DeiT": dict(distillation_token=True),
    "distillation, registers, post-norm, norm after pooling": dict(
        distillation_token=True, registers=2, norm="post", final_norm="pooled"
    ),
    "DINOv3": dict(position="rotary_box", registers=2, image_size=(8, 16), pool="mean", final_norm="tokens"),
    "mean of all tokens": dict(pool="mean", pool_prefix=True, class_token=True, registers=1),
    "attention pool, all tokens": dict(pool="attention", pool_prefix=True, registers=2, norm_layer="rms"),
    "deep": dict(depth=4, drop_path=0.2, dropout=0.1, attention_dropout=0.1, patch_dropout=0.3),
}


def build(options: dict[str, Any]) -> VisionTransformer:
    return VisionTransformer(**{**SMALL, **options})


def images_for(model: VisionTransformer, count: int = 2, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, model.patch_embed.proj.in_channels, *model.image_size)
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_model_is_its_formula(reference, shake, options):
    model = shake(build(options).double().eval(), 0.2)
    images = images_for(model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = reference.logits(images.numpy(), state, model.architecture)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_architecture_rebuilds_the_model(shake, options):
    model = shake(build(options), 0.2).eval()
    again = VisionTransformer(**json.loads(json.dumps(model.architecture))).eval()
    assert again.architecture == model.architecture
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(images_for(model)), model(images_for(model)))


def test_the_architecture_does_not_follow_what_it_was_made_from():
    size = [8, 8]
    model = VisionTransformer(**{**SMALL, "image_size": size})
    size[0] = 4
    assert model.architecture["image_size"] == [8, 8]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_evaluation_is_deterministic_and_a_batch_is_its_images(shake, options):
    model = shake(build(options), 0.2).eval()
    images = images_for(model, 7)
    with torch.no_grad():
        together = model(images)
        assert torch.equal(model(images), together)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_no_logits():
    model = build({}).eval()
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 5)


def test_randomness_is_in_training_only():
    model = build(dict(dropout=0.3, patch_dropout=0.5, drop_path=0.5, attention_dropout=0.3))
    images = images_for(model)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_stochastic_depth_grows_from_nothing_to_its_rate():
    model = build(dict(depth=5, drop_path=0.4))
    rates = [getattr(block.drop_path1, "rate", 0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates == [getattr(block.drop_path2, "rate", 0) for block in model.blocks]


def test_one_head_and_no_parameters_are_what_they_say():
    one = build(dict(attention="scaled_dot_product", heads=4))
    assert one.architecture["heads"] == 1
    assert one.blocks[0].attn.heads == 1
    plain = build(dict(attention="dot_product"))
    assert not [name for name, _ in plain.named_parameters() if ".attn." in name]


def test_null_normalises_queries_and_keys_where_there_are_some():
    assert build(dict(qk_norm=None)).architecture["qk_norm"] is True
    assert build(dict(qk_norm=None, attention="scaled_dot_product")).blocks[0].attn.q_norm.weight.shape == (16,)
    assert build(dict(qk_norm=None, attention="dot_product")).architecture["qk_norm"] is False


def test_the_grid_and_the_prefix():
    model = VisionTransformer(
        image_size=(12, 20), patch_size=(4, 5), num_classes=2, width=8, depth=1, heads=1, registers=3
    )
    assert model.grid == (3, 4)
    assert model.num_prefix_tokens == 4
    assert model.embed(torch.zeros(2, 3, 12, 20))[0].shape == (2, 4 + 12, 8)
    assert build(dict(pool="mean")).num_prefix_tokens == 0


def test_sizes_by_name():
    for size, (width, depth, heads) in SIZES.items():
        with torch.device("meta"):
            model = create_model(f"vit_{size}", image_size=32, patch_size=4, num_classes=10)
        assert (model.width, len(model.blocks), model.blocks[0].attn.heads) == (width, depth, heads)
    with torch.device("meta"):
        model = create_model("vit_base", image_size=32, patch_size=4, num_classes=10, depth=3, heads=2)
    assert (model.width, len(model.blocks), model.blocks[0].attn.heads) == (768, 3, 2)


@pytest.mark.parametrize(
    ("name", "nearest"), [("vit_tinny", "'vit_tiny'"), ("tiny", "'vit_tiny'"), ("resnet50", "vit_"), ("vit_", "vit_")]
)
def test_a_name_that_does_not_exist_gets_the_nearest(name, nearest):
    with pytest.raises(VitError, match=re.escape(name)) as error:
        create_model(name, image_size=32, patch_size=4, num_classes=10)
    assert nearest in str(error.value)


# what is wrong, the key that the message must name, words it must hold, and a change it suggests
REFUSED: list[tuple[dict[str, Any], str, str, dict[str, Any]]] = [
    (dict(size="tinny"), "model.size", "'tiny'", dict(size="tiny")),
    (dict(attention="multihead"), "model.attention", "'multi_head'", dict(attention="multi_head")),
    (dict(norm="layer"), "model.norm", "pre, post", dict(norm="pre")),
    (dict(position="rotray"), "model.position", "'rotary'", dict(position="rotary")),
    (dict(pool="avg"), "model.pool", "mean", dict(pool="mean")),
    (dict(init="xaver"), "model.init", "'xavier'", dict(init="xavier")),
    (dict(width=16, heads=3), "model.heads", "4", dict(heads=4)),
    (dict(width=16, heads=100), "model.heads", "16", dict(heads=16)),
    (dict(patch_size=3), "model.patch_size", "4", dict(patch_size=4)),
    (dict(patch_size=16), "model.patch_size", "8", dict(patch_size=8)),
    (dict(image_size=(8, 10)), "model.patch_size", "width of 10 pixels", dict(patch_size=(4, 5))),
    (dict(patch_size=3), "model.patch_size", "crop_to_patches=true", dict(crop_to_patches=True)),
    (dict(patch_size=9, crop_to_patches=True), "model.patch_size", "8", dict(patch_size=8)),
    (dict(image_size=0), "data.image_size", "positive whole number", dict(image_size=8)),
    (dict(image_size=None), "data.image_size", "positive whole number", dict(image_size=8)),
    (dict(patch_size="4"), "model.patch_size", "positive whole number", dict(patch_size=4)),
    (dict(patch_size=2.0), "model.patch_size", "positive whole number", dict(patch_size=2)),
    (dict(pool="token", class_token=False), "model.pool", "model.class_token=true", dict(class_token=True)),
    (dict(pool="token", class_token=False), "model.pool", "pool=mean", dict(pool="mean")),
    (dict(position="sincos", width=18, heads=1), "model.width", "20", dict(width=20)),
    (dict(position="rotary", width=18, heads=3), "model.heads", "model.position=learned", dict(position="learned")),
    (dict(position="rotary", width=24, heads=4), "model.heads", "3", dict(heads=3)),
    (dict(attention="dot_product", qk_norm=True), "model.qk_norm", "model.qk_norm=false", dict(qk_norm=False)),
    (dict(attention="dot_product", position="rotary"), "model.position", "learned", dict(position="learned")),
    (dict(position="rotary_box", width=24, heads=4), "model.heads", "3", dict(heads=3)),
    (dict(attention="dot_product", attention_norm=True), "attention_norm", "=false", dict(attention_norm=False)),
    (dict(mlp="swiglu", activation="gelu_tanh"), "model.activation", "activation=gelu", dict(activation="gelu")),
    (dict(mlp="swiglu", activation="gelu_tanh"), "model.activation", "model.mlp=plain", dict(mlp="plain")),
    (dict(mlp="glu"), "model.mlp", "swiglu", dict(mlp="swiglu")),
    (dict(activation="relu"), "model.activation", "gelu", dict(activation="gelu")),
    (dict(norm_layer="rmsnorm"), "model.norm_layer", "rms", dict(norm_layer="rms")),
    (dict(norm_eps=0), "model.norm_eps", "positive number", dict(norm_eps=1e-5)),
    (dict(embed_norm=True), "model.embed_norm", "tokens", dict(embed_norm="tokens")),
    (dict(final_norm="mean"), "model.final_norm", "pooled", dict(final_norm="pooled")),
    (dict(distillation_token=True, pool="mean"), "model.distillation_token", "model.pool=token", dict(pool="token")),
    (dict(pool_prefix=True), "model.pool_prefix", "model.pool_prefix=false", dict(pool_prefix=False)),
    (dict(pool_prefix=True), "model.pool_prefix", "pool=mean", dict(pool="mean")),
    (dict(width=0), "model.width", "at least 1", dict(width=2)),
    (dict(width=12.5), "model.width", "whole number", dict(width=12)),
    (dict(depth=-1), "model.depth", "at least 1", dict(depth=1)),
    (dict(heads="two"), "model.heads", "whole number", dict(heads=2)),
    (dict(heads=True), "model.heads", "whole number", dict(heads=1)),
    (dict(in_channels=0), "model.in_channels", "at least 1", dict(in_channels=3)),
    (dict(num_classes=-1), "model.num_classes", "at least 0", dict(num_classes=1)),
    (dict(num_classes=None), "model.num_classes", "at least 0", dict(num_classes=1)),
    (dict(registers=-1), "model.registers", "at least 0", dict(registers=0)),
    (dict(registers=1.5), "model.registers", "whole number", dict(registers=1)),
    (dict(registers=True), "model.registers", "whole number", dict(registers=1)),
    (dict(mlp_ratio=0), "model.mlp_ratio", "positive number", dict(mlp_ratio=1)),
    (dict(mlp_ratio="4"), "model.mlp_ratio", "positive number", dict(mlp_ratio=4)),
    (dict(mlp_ratio=float("inf")), "model.mlp_ratio", "positive number", dict(mlp_ratio=4)),
    (dict(mlp_ratio=0.05), "model.mlp_ratio", "0.0625", dict(mlp_ratio=0.0625)),
    (dict(dropout=1.0), "model.dropout", "under 1", dict(dropout=0.9)),
    (dict(dropout="0.1"), "model.dropout", "under 1", dict(dropout=0.1)),
    (dict(attention_dropout=-0.1), "model.attention_dropout", "from 0", dict(attention_dropout=0)),
    (dict(drop_path=None), "model.drop_path", "from 0", dict(drop_path=0)),
    (dict(patch_dropout=float("nan")), "model.patch_dropout", "from 0", dict(patch_dropout=0.5)),
    (dict(layer_scale="small"), "model.layer_scale", "null", dict(layer_scale=None)),
    (dict(layer_scale=float("nan")), "model.layer_scale", "number", dict(layer_scale=1e-5)),
    (dict(qk_norm="yes"), "model.qk_norm", "true or false", dict(qk_norm=True)),
    (dict(qkv_bias=None), "model.qkv_bias", "true or false", dict(qkv_bias=False)),
    (dict(position_prefix=2), "model.position_prefix", "true or false", dict(position_prefix=True)),
    (dict(proj_bias="no"), "model.proj_bias", "true or false", dict(proj_bias=False)),
    (dict(patch_bias=None), "model.patch_bias", "true or false", dict(patch_bias=False)),
    (dict(class_token="no"), "model.class_token", "true or false", dict(class_token=True)),
]


@pytest.mark.parametrize(("options", "key", "words", "mend"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_with_the_key_and_what_would_work(options, key, words, mend):
    with pytest.raises(VitError) as error:
        build(options)
    message = str(error.value)
    assert key in message
    assert words in message
    assert "\n" not in message
    model = build({**options, **mend}).eval()
    assert model(images_for(model)).shape == (2, model.num_classes)


@pytest.mark.parametrize("distilled", [False, True])
def test_without_classes_it_returns_what_a_head_would_read(distilled):
    model = build(dict(num_classes=4, distillation_token=distilled)).eval()
    bare = build(dict(num_classes=0, distillation_token=distilled)).eval()
    fit = bare.load_state_dict(model.state_dict(), strict=False)
    assert not fit.missing_keys
    assert all(key.startswith("head") for key in fit.unexpected_keys)
    images = images_for(model)
    features = bare(images)
    assert features.shape == (2, model.width)
    if not distilled:
        torch.testing.assert_close(model.head(features), model(images))


JUNK = st.sampled_from([None, True, -1, 0, 1.5, float("nan"), float("inf"), "", "four", [], [1], {}, (2, 2)])


def mostly(*good: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(good), JUNK)


CONFIGURATIONS = st.fixed_dictionaries(
    dict(
        image_size=mostly(4, 6, 8, (8, 4), (6, 9), [12, 8]),
        patch_size=mostly(1, 2, 3, 4, (2, 3), (4, 2), [2, 4]),
        num_classes=mostly(1, 2, 7),
        depth=mostly(1, 2),
    ),
    optional=dict(
        in_channels=mostly(1, 2, 3, 5),
        size=mostly("nano"),
        width=mostly(4, 8, 12, 16, 18),
        heads=mostly(1, 2, 3, 4),
        mlp_ratio=mostly(0.01, 0.5, 1, 2.7, 4.0),
        attention=mostly("multi_head", "scaled_dot_product", "dot_product"),
        norm=mostly("pre", "post"),
        norm_layer=mostly("layer", "rms"),
        norm_eps=mostly(1e-6, 1e-5),
        embed_norm=mostly("none", "patches", "tokens"),
        attention_norm=mostly(True, False),
        mlp_norm=mostly(True, False),
        final_norm=mostly("tokens", "pooled", "none", None),
        mlp=mostly("plain", "swiglu", "swiglu_packed"),
        activation=mostly("gelu", "gelu_tanh", "quick_gelu"),
        distillation_token=mostly(True, False),
        proj_bias=mostly(True, False),
        patch_bias=mostly(True, False),
        crop_to_patches=mostly(True, False),
        position=mostly("learned", "sincos", "rotary", "rotary_box", "none"),
        position_prefix=mostly(True, False),
        pool=mostly("token", "mean", "attention"),
        pool_prefix=mostly(False, False, True),
        class_token=mostly(None, True, False),
        registers=mostly(0, 1, 3),
        layer_scale=mostly(None, 1e-5, 1),
        qk_norm=mostly(True, False),
        qkv_bias=mostly(True, False),
        dropout=mostly(0, 0.1, 0.99),
        attention_dropout=mostly(0, 0.1, 0.99),
        drop_path=mostly(0, 0.1, 0.99),
        patch_dropout=mostly(0, 0.1, 0.99),
        init=mostly("trunc_normal", "xavier", "mimetic"),
    ),
)
VALID_MOSTLY = st.fixed_dictionaries(
    dict(
        image_size=st.sampled_from([8, 12, (8, 12), [4, 8]]),
        patch_size=st.sampled_from([2, 4, (2, 4), (4, 4)]),
        num_classes=st.integers(0, 9),
        depth=st.integers(1, 3),
        width=st.sampled_from([8, 16, 24]),
        heads=st.sampled_from([1, 2]),
        in_channels=st.integers(1, 5),
        mlp_ratio=st.floats(0.2, 3),
        attention=st.sampled_from(["multi_head", "scaled_dot_product", "dot_product"]),
        norm=st.sampled_from(["pre", "post"]),
        norm_layer=st.sampled_from(["layer", "rms"]),
        norm_eps=st.floats(1e-8, 1e-3),
        embed_norm=st.sampled_from(["none", "patches", "tokens"]),
        attention_norm=st.booleans(),
        mlp_norm=st.booleans(),
        final_norm=st.sampled_from(["tokens", "pooled", "none", None]),
        mlp=st.sampled_from(["plain", "swiglu", "swiglu_packed"]),
        activation=st.sampled_from(["gelu", "gelu", "gelu", "gelu_tanh", "quick_gelu"]),
        distillation_token=st.booleans(),
        proj_bias=st.booleans(),
        patch_bias=st.booleans(),
        crop_to_patches=st.booleans(),
        position=st.sampled_from(["learned", "sincos", "rotary", "rotary_box", "none"]),
        position_prefix=st.booleans(),
        pool=st.sampled_from(["token", "mean", "attention"]),
        pool_prefix=st.sampled_from([False, False, True]),
        class_token=st.sampled_from([None, True, False]),
        registers=st.integers(0, 3),
        layer_scale=st.none() | st.floats(1e-6, 1),
        qk_norm=st.booleans(),
        qkv_bias=st.booleans(),
        dropout=st.floats(0, 0.9),
        attention_dropout=st.floats(0, 0.9),
        drop_path=st.floats(0, 0.9),
        patch_dropout=st.floats(0, 0.95),
        init=st.sampled_from(["trunc_normal", "xavier", "mimetic"]),
    )
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(CONFIGURATIONS, VALID_MOSTLY))
def test_any_arguments_make_a_working_model_or_an_explanation(options):
    try:
        model = VisionTransformer(**options)
    except VitError as error:
        message = str(error)
        assert re.match(r"(model|data)\.\w+", message), message
        assert len(message) < 300
        return
    images = images_for(model, 2)
    for logits in (model.train()(images), model.eval()(images)):
        assert logits.shape == (2, options["num_classes"] or model.width)
        assert logits.isfinite().all()
    again = VisionTransformer(**json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images), model(images))


def test_the_model_runs_in_lower_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for options in (
            dict(position="rotary"),
            dict(position="sincos", pool="attention"),
            dict(drop_path=0.5, layer_scale=0.1),
        ):
            model = build(options).to(dtype)
            assert model.eval()(images_for(model, dtype=dtype)).dtype == dtype
            assert model.train()(images_for(model, dtype=dtype)).dtype == dtype


def test_the_model_copies_and_pickles():
    import copy
    import pickle

    model = build(dict(position="rotary")).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images_for(model)), model(images_for(model)))


def test_a_model_holds_its_positions_when_it_moves():
    model = build(dict(position="rotary"))
    assert "rotary" not in model.state_dict()
    assert "rotary" in dict(model.named_buffers())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
