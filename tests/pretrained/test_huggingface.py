"""State dicts as other projects name them give the model that timm makes of the same weights.

Each is written here from timm's own state dict, by the facts of the other project's names, and loaded as a file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vit.errors import VitError
from vit.pretrained.create import PretrainedModel, load_pretrained
from vit.pretrained.huggingface import to_timm_names, unwrap

State = dict[str, Tensor]


@pytest.fixture
def loaded(tmp_path, timm_model, small) -> Callable[..., tuple[PretrainedModel, nn.Module]]:
    """A function: timm's name, how to rename its state dict, options -> what loads, and timm's model."""

    def load(name: str, rename: Callable[[State], object], **options) -> tuple[PretrainedModel, nn.Module]:
        model = timm_model(name, **small, **options)
        save_for_hf(model, str(tmp_path / "known"), safe_serialization=True)
        content = rename({key: value.clone() for key, value in model.state_dict().items()})
        torch.save(content, tmp_path / "foreign.pth")
        return load_pretrained(f"local-dir:{tmp_path / 'known'}", weights=tmp_path / "foreign.pth"), model

    return load


def same(loaded: PretrainedModel, model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=0, atol=1e-5)
    assert loaded.report.unexpected == []
    assert loaded.report.resampled == []


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},  # DeiT
        lambda state: {"state_dict": state, "epoch": 3, "arch": "x"},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1.0), "optimizer": {"state": {}}},
        lambda state: {"model": {key: value + 1 for key, value in state.items()}, "model_ema": state},
        lambda state: {"state_dict": {key: value + 1 for key, value in state.items()}, "state_dict_ema": state},
        lambda state: {"state_dict": prefixed("module.")(state)},  # DistributedDataParallel
        lambda state: prefixed("_orig_mod.")(state),  # torch.compile
        lambda state: {"state_dict": prefixed("net.encoder.")(state), "hyper_parameters": {}},  # Lightning
        lambda state: {"teacher": {**prefixed("backbone.")(state), "dino_head.mlp.0.weight": torch.ones(3)}},  # DINO
        lambda state: {**state, "pre_logits.fc.weight": torch.ones(48, 48)},
        lambda state: {"encoder": prefixed("module.")(state), "predictor": prefixed("module.")(state)},  # I-JEPA
    ],
)
def test_wrappers_and_fronts(loaded, images, wrap):
    same(*loaded("vit_tiny_patch16_224", wrap), images)


def test_remarks_say_what_was_taken_and_left(loaded):
    got, _ = loaded("vit_tiny_patch16_224", lambda state: {"model": state, "model_ema": state})
    assert got.report.notes == ["of model_ema and model in the file, model_ema was taken"]
    got, _ = loaded("vit_tiny_patch16_224", lambda state: {**prefixed("vision.")(state), "text.x": torch.ones(1)})
    assert got.report.notes == ["1 tensor of another part is left aside: text.x"]


def test_masked_autoencoders_decoder_is_left_aside(loaded, images):
    def mae(state: State) -> object:
        decoder = {f"decoder_blocks.{i}.norm1.weight": torch.ones(8) for i in range(100)}
        return {"model": {**state, **decoder, "mask_token": torch.zeros(1, 1, 48)}}

    got, model = loaded("vit_tiny_patch16_224", mae)
    same(got, model, images)
    assert "100 tensors of other parts are left aside" in got.report.notes[0]


def transformers_names(state: State, front: str = "vit.", *, five: bool = False, dino: bool = False) -> State:
    """Hugging Face's names, as its files have them, or as version 5 has them in memory."""
    layer = "layers" if five and not dino else "encoder.layer"
    around = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    inside = {
        "norm1": "norm1" if dino else "layernorm_before",
        "norm2": "norm2" if dino else "layernorm_after",
        "attn.proj": "attention.o_proj" if five else "attention.output.dense",
        "mlp.fc1": "mlp.fc1" if five or dino else "intermediate.dense",
        "mlp.fc2": "mlp.fc2" if five or dino else "output.dense",
        "ls1": "layer_scale1",
        "ls2": "layer_scale2",
    }
    heads = {"head": "cls_classifier" if "head_dist.weight" in state else "classifier"}
    heads["head_dist"] = "distillation_classifier"
    renamed: State = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".") if key.endswith(("weight", "bias", "gamma")) else (key, "", "")
        kind = "lambda1" if kind == "gamma" else kind
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if stem in heads:
            renamed[f"{heads[stem]}.{kind}"] = value
        elif block is None:
            renamed[".".join(filter(None, (f"{front}{around[stem]}", kind)))] = value
        elif block[2] == "attn.qkv":
            names = ("q_proj", "k_proj", "v_proj") if five else ("attention.query", "attention.key", "attention.value")
            for name, part in zip(names, value.chunk(3), strict=True):
                renamed[f"{front}{layer}.{block[1]}.attention.{name}.{kind}"] = part.clone()
        else:
            renamed[f"{front}{layer}.{block[1]}.{inside[block[2]]}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("five", [False, True], ids=["files", "version 5"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"front": "vit."}),
        ("deit_tiny_distilled_patch16_224", {"front": "deit."}),
        ("vit_small_patch14_dinov2", {"front": "", "dino": True}),
        ("vit_small_patch14_dinov2", {"front": "dinov2.", "dino": True}),
    ],
)
def test_transformers(loaded, images, name, options, five):
    rename = lambda state: transformers_names(state, five=five, **options)  # noqa: E731
    same(*loaded(name, rename, patch_size=16), images)


def test_transformers_gated_mlp_in_one_matrix_or_two(timm_model):
    name = "vit_giant_patch14_dinov2"
    model = timm_model(name, depth=1, embed_dim=32, num_heads=2, img_size=28)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("blocks.0.mlp.")}
    a = {"width": 32, "in_channels": 3, "patch_size": [14, 14], "num_classes": 0, "position": "learned"}
    front = {"embeddings.patch_embeddings.projection.weight": model.patch_embed.proj.weight}
    packed = {key.replace("blocks.0.mlp.fc1", "encoder.layer.0.mlp.weights_in"): v for key, v in state.items()}
    packed = {key.replace("blocks.0.mlp.fc2", "encoder.layer.0.mlp.weights_out"): v for key, v in packed.items()}
    two: State = {}
    for key, value in state.items():
        kind = key.rpartition(".")[2]
        if "fc1" in key:
            for part, half in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                two[f"encoder.layer.0.mlp.{part}.{kind}"] = half
        else:
            two[f"encoder.layer.0.mlp.down_proj.{kind}"] = value
    for given in (packed, two):
        found, _ = to_timm_names({**front, **given}, a, "a file")
        assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_classifier_on_two_tokens_is_no_head_of_a_plain_model(loaded):
    """transformers classifies DINOv2 by class token and mean patch side by side."""

    def wide(state: State) -> State:
        return {**transformers_names(state, "dinov2.", dino=True), "classifier.weight": torch.ones(10, 96)}

    with pytest.raises(VitError, match="the model has none: set num_classes=10, or head=drop"):
        loaded("vit_small_patch14_dinov2", wide, patch_size=16)


def dinov2(state: State) -> State:
    """Meta's own names: timm's, with a token for masked patches; with registers, a position for the class token."""
    if "reg_token" not in state:
        return {**state, "mask_token": torch.zeros(1, 48)}
    shift = torch.randn(1, 1, 48)
    registers, positions = state.pop("reg_token"), state.pop("pos_embed")
    return {
        **state,
        "register_tokens": registers,
        "cls_token": state["cls_token"] - shift,
        "pos_embed": torch.cat([shift, positions], dim=1),
        "mask_token": torch.zeros(1, 48),
    }


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2s_own(loaded, images, name):
    same(*loaded(name, dinov2, patch_size=16), images)


def test_dinov2_with_registers_by_transformers(loaded, images):
    def rename(state: State) -> State:
        original = dinov2(state)
        original["reg_token"] = original.pop("register_tokens")
        mask = original.pop("mask_token")
        return {**transformers_names(original, "", dino=True), "embeddings.mask_token": mask}

    got, model = loaded("vit_small_patch14_reg4_dinov2", rename, patch_size=16)
    same(got, model, images)


def test_deit_three_scales_its_branches_under_other_names(loaded, images):
    def rename(state: State) -> object:
        return {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}}

    same(*loaded("deit3_small_patch16_224", rename), images)


def openai_clip(state: State) -> State:
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("blocks.", "transformer.resblocks."),
        ("norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
    ]
    renamed: State = {}
    for key, value in state.items():
        for old, new in swaps:
            key = key.replace(old, new)
        key = key.replace("norm.", "ln_post.") if key.startswith("norm.") else key
        renamed[key] = value
    renamed["class_embedding"] = renamed.pop("cls_token")[0, 0]
    renamed["positional_embedding"] = renamed["positional_embedding"][0]
    renamed["proj"] = renamed.pop("head.weight").T.contiguous()
    renamed.pop("head.bias")
    text = {
        "logit_scale": torch.ones(()),
        **{f"transformer.resblocks.{i}.ln_1.weight": torch.ones(8) for i in range(30)},
    }
    return {**{f"visual.{key}": value for key, value in renamed.items()}, **text}


def open_clip(state: State) -> State:
    """OpenCLIP around a model of timm's: the projection stands outside, without a bias."""
    projection = state.pop("head.weight")
    state.pop("head.bias")
    return {**prefixed("visual.trunk.")(state), "visual.head.proj.weight": projection, "text.ln.weight": torch.ones(8)}


@pytest.mark.parametrize("rename", [openai_clip, open_clip])
def test_clip_towers(loaded, images, rename):
    got, model = loaded("vit_base_patch16_clip_224", rename, num_classes=12)
    with torch.no_grad():
        model.head.bias.zero_()  # they have none
    same(got, model, images)
    assert "left aside" in got.report.notes[0]


def test_what_timm_does_not_know_is_refused(loaded):
    for rename in (
        lambda state: {f"layer.{i}": torch.ones(3) for i in range(40)},
        lambda state: {key.replace("blocks", "stages"): value for key, value in state.items()},
        lambda state: {"visual.class_embedding": torch.ones(3)},
    ):
        with pytest.raises(VitError) as caught:
            loaded("vit_tiny_patch16_224", rename)
        assert "\n" not in str(caught.value)
    for content in (None, [1, 2], {"epoch": 3}, {"model": {"model": {"model": {"model": torch.ones(1)}}}}, {}):
        with pytest.raises(VitError, match="a file holds no weights: expected tensors by name"):
            unwrap(content, "a file")


def test_sizes_are_left_to_the_report(loaded, timm_model, small, tmp_path):
    """timm's function would resample silently; here it is said."""
    larger = timm_model(**{**small, "img_size": 96, "patch_size": 8}).state_dict()
    got, model = loaded("vit_tiny_patch16_224", lambda state: {**larger, "mask_token": torch.zeros(1, 48)})
    assert [entry.name for entry in got.report.resampled] == ["pos_embed", "patch_embed.proj.weight"]
    expected = checkpoint_filter_fn(dict(larger), model)
    torch.testing.assert_close(got.model.pos_embed, expected["pos_embed"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        got.model.patch_embed.proj.weight, expected["patch_embed.proj.weight"], rtol=1e-3, atol=1e-4
    )


def test_dinov3s_own(timm_model, tmp_path):
    """Meta's names, against timm's reading of them; the keys' biases are masked."""
    name = "vit_small_patch16_dinov3_qkvb"
    model = timm_model(name, depth=2, embed_dim=48, num_heads=3, img_size=64)
    original: State = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    for key, value in model.state_dict().items():
        if key.endswith("q_bias"):
            values = model.state_dict()[key.replace("q_bias", "v_bias")]
            original[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.full_like(value, 7), values])
            original[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(value))
        elif not key.endswith("v_bias"):
            key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
            original[key.replace("gamma_2", "ls2.gamma")] = value.clone()
    save_file({key: value.contiguous() for key, value in original.items()}, tmp_path / "original.safetensors")
    save_for_hf(model, str(tmp_path / "known"), safe_serialization=True)
    config = json.loads(Path(tmp_path / "known" / "config.json").read_text())
    assert config["architecture"] == name
    got = load_pretrained(f"local-dir:{tmp_path / 'known'}", weights=tmp_path / "original.safetensors", image_size=64)
    same(got, model, torch.randn(2, 3, 64, 64))
