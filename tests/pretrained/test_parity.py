"""Every plain Vision Transformer of timm's registry, built here: timm's weights in, timm's logits out.

The names are found by looking at what timm builds, with a filter of this file's own.  Each is built at its own width
with one block and a few patches, every parameter is drawn anew, so that no zero bias, unit gain or tiny LayerScale
hides an error, and the weights are loaded strictly.  What cannot be built is listed in docs/pretrained.md, by name.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained.architecture import read_architecture
from vit.pretrained.convert import from_timm, to_timm
from vit.pretrained.registry import list_names, read_entry

DOCUMENT = Path(__file__).parents[2] / "docs" / "pretrained.md"
TOLERANCE = 1e-4
"""Of the largest logit."""
PARTS = 4
"""The names are shared out, so that several processes can take their part."""


def build(name: str, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **changes)


@functools.cache
def plain() -> tuple[str, ...]:
    """Names whose class is timm's `VisionTransformer` with plain blocks and patches, and the distilled DeiTs."""
    found = []
    for name in timm.list_models(module=["vision_transformer", "vision_transformer_hybrid", "deit"]):
        if "_r50" in name or "_r26" in name or "_resnet" in name or "_r_s16" in name:
            continue  # a ResNet in front, which takes longest to build
        model = build(name, device="meta", depth=1)
        if type(model) in (TimmVisionTransformer, VisionTransformerDistilled) and type(model.patch_embed) is PatchEmbed:
            found += [name] * (type(model.blocks[0]) is Block)
    return tuple(found)


def dinov3() -> list[str]:
    """LingBot-Vision has the same architecture."""
    return timm.list_models(["*dinov3*", "*lingbot*"], module="eva")


@functools.cache
def architecture(name: str) -> dict[str, Any]:
    return read_entry(name).architecture


@functools.cache
def exceptions() -> dict[str, str]:
    """Name and reason of each that docs/pretrained.md lists as not passing."""
    section = DOCUMENT.read_text("utf-8").split("## Which models")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z0-9_]+)` \| (.+) \|$", section, re.M))


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Every parameter anew: gains around 1, matrices that keep the size of what they map, the rest around 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim > 1 and name.endswith("weight"):
            parameter.mul_(parameter[0].numel() ** -0.5)
        elif name.endswith("weight") or "gamma" in name:
            parameter.mul_(0.3).add_(1)
        else:
            parameter.mul_(0.3)


def small(name: str, grid: tuple[int, int] = (2, 3), **changes: Any) -> tuple[Any, VisionTransformer]:
    """timm's model with one block and few patches, all drawn anew, and ours with its weights."""
    a = architecture(name)
    rest = [image % patch for image, patch in zip(a["image_size"], a["patch_size"], strict=True)]
    size = tuple(patch * n + left for patch, n, left in zip(a["patch_size"], grid, rest, strict=True))
    given = {**a, "depth": 1, "image_size": size, "num_classes": 7 if a["num_classes"] else 0}
    # without memory first, so that nothing is drawn only to be replaced
    theirs = build(name, device="meta", depth=1, img_size=size, num_classes=given["num_classes"], **changes)
    theirs = theirs.to_empty(device="cpu").eval()
    for module in theirs.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    redraw(theirs)
    if "global_pool" in changes:
        given["pool"] = changes["global_pool"]
    with torch.device("meta"):
        ours = VisionTransformer(**given).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), ours.architecture), strict=True, assign=True)
    if ours.rotary is not None:  # a table, no weight: that of a model with a single head of this width
        one_head = dict(width=a["width"] // a["heads"], heads=1, mlp_ratio=1)
        ours.rotary = VisionTransformer(**{**given, **one_head}).rotary
    return theirs, ours


@torch.no_grad()
def assert_same(theirs: Any, ours: VisionTransformer) -> None:
    images = torch.randn(
        2, ours.patch_embed.proj.in_channels, *ours.image_size, generator=torch.Generator().manual_seed(1)
    )
    expected, found = theirs(images), ours(images)
    assert found.shape == expected.shape == (2, ours.num_classes or ours.width)
    scale = expected.abs().max().item()
    assert math.isfinite(scale)
    assert (expected[0] - expected[1]).abs().max() > 0.01 * scale, "an output that does not depend on the image"
    difference = (found - expected).abs().max().item()
    assert difference <= TOLERANCE * scale, f"{difference:.1e} of {scale:.1e}"


def test_at_least_98_percent_of_the_names_are_built_and_the_others_listed_with_their_reason():
    built = set(list_names())
    missing = [name for name in plain() if name not in built]
    assert sorted(exceptions()) == sorted(missing)
    assert len(missing) <= 0.02 * len(plain())
    for name in missing:
        with pytest.raises(VitError, match=name) as error:
            read_entry(name)
        assert exceptions()[name] in str(error.value)
    assert set(dinov3()) <= built
    text = DOCUMENT.read_text("utf-8")
    assert f"{len(plain()) - len(missing)} of {len(plain())} names pass" in text
    assert f": {len(dinov3())} names, compared" in text
    assert built == {*plain(), *dinov3()} - {*missing}


@pytest.mark.parametrize("part", range(PARTS))
def test_timms_weights_give_timms_logits(part):
    failed = {}
    for name in [name for name in plain() if name not in exceptions()][part::PARTS]:
        try:
            assert_same(*small(name))
        except Exception as error:
            failed[name] = repr(error)[:200]
    assert not failed


@pytest.mark.parametrize("grid", [(2, 3), (5, 1)], ids=str)
def test_dinov3_of_each_size_gives_timms_features_at_any_resolution(grid):
    failed = {}
    for name in dinov3():
        try:
            assert_same(*small(name, grid))
        except Exception as error:
            failed[name] = repr(error)[:200]
    assert not failed


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (32, 80), (96, 48), (160, 224)], ids=lambda size: "x".join(map(str, size)))
def test_a_deep_dinov3_with_its_class_token(size, depth):
    """As Meta reads it: timm's name takes the mean of the patches, the paper the class token."""
    theirs = build("vit_small_plus_patch16_dinov3_qkvb", depth=depth, global_pool="token").eval()
    redraw(theirs)
    a = {**architecture("vit_small_plus_patch16_dinov3_qkvb"), "depth": depth, "pool": "token", "image_size": size}
    ours = VisionTransformer(**a).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), a), strict=True)
    assert_same(theirs, ours)


def test_dinov3_goes_back_as_it_came():
    for name in ("vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"):
        theirs, ours = small(name)
        back = to_timm(ours.state_dict(), ours.architecture)
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


def test_a_bias_of_keys_has_no_place_in_timms_dinov3():
    _, ours = small("vit_tiny_patch16_dinov3_qkvb")
    state = ours.state_dict()
    width = ours.width
    state["blocks.0.attn.qkv.bias"][width : 2 * width] = 1
    with pytest.raises(VitError, match=r"blocks\.0\.attn\.qkv\.bias: timm's DINOv3 has no bias of keys"):
        to_timm(state, ours.architecture)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.slow
def test_at_full_depth_every_name_and_shape_is_timms():
    failed = []
    for name in [*plain(), *dinov3()]:
        if name in exceptions():
            continue
        skip = {} if name in dinov3() else {"weight_init": "skip"}
        theirs = build(name, device="meta", **skip)
        found = read_architecture(theirs)
        with torch.device("meta"):
            ours = VisionTransformer(**found)
        if shapes(ours.state_dict()) != shapes(from_timm(theirs.state_dict(), found)):
            failed.append(name)
        if shapes(to_timm(ours.state_dict(), found)) != shapes(theirs.state_dict()):
            failed.append(name)
    assert not failed
