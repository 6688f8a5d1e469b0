"""Models by name and by source: what the head becomes, what may differ from the weights, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import vit
from vit.errors import VitError
from vit.pretrained.create import MAY_DIFFER, count_parameters, create_model, load_pretrained, read_info

NAMES = ["cat", "dog", "größe"]


@pytest.fixture(scope="module")
def three(timm_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of timm's: a model of three named classes."""
    folder = tmp_path_factory.mktemp("three") / "model"
    model = timm_model(depth=2, embed_dim=48, num_heads=3, img_size=64, num_classes=3)
    save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": NAMES})
    return folder


def test_the_head_is_kept_where_the_classes_are_the_weights_own(three, images):
    first = load_pretrained(three)
    assert (first.report.head, first.class_names) == ("kept", NAMES)
    again = load_pretrained(three, class_names=NAMES, num_classes=3)
    assert again.report.head == "kept"
    turned = load_pretrained(three, class_names=[NAMES[2], NAMES[0], NAMES[1]])
    assert (turned.report.head, turned.class_names) == ("kept", [NAMES[2], NAMES[0], NAMES[1]])
    with torch.no_grad():
        torch.testing.assert_close(turned.model(images), first.model(images)[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("options", "head", "names"),
    [
        ({"num_classes": 4}, "replaced", None),
        ({"class_names": ["a", "b", "c"]}, "replaced", ["a", "b", "c"]),
        ({"class_names": [*NAMES, "d"], "num_classes": 4}, "replaced", [*NAMES, "d"]),
        ({"num_classes": 0}, "dropped", None),
        ({"head": "drop"}, "dropped", None),
        ({"head": "replace"}, "replaced", None),
        ({"head": "replace", "class_names": NAMES}, "replaced", NAMES),
        ({"head": "keep", "class_names": NAMES}, "kept", NAMES),
    ],
)
def test_what_becomes_of_the_head(three, options, head, names):
    loaded = load_pretrained(three, **options)
    assert (loaded.report.head, loaded.class_names) == (head, names)
    outputs = 0 if head == "dropped" else len(names or []) or options.get("num_classes", 3)
    assert loaded.model.num_classes == loaded.architecture["num_classes"] == outputs


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "keep", "num_classes": 4}, "has 3 outputs and 4 classes are asked for: use head=replace"),
        ({"head": "keep", "class_names": ["a", "b", "c"]}, "classes of other names are asked for"),
        ({"num_classes": 2, "class_names": NAMES}, "num_classes=2 for 3 class names"),
        ({"head": "kept"}, "did you mean 'keep'"),
        ({"head": "drop", "num_classes": 3}, "head=drop, but the model has one of 3 outputs"),
        ({"heads": 4}, r"heads=4 is not what .* was trained with: its weights have heads=3"),
        ({"activation": "gelu_tanh"}, "its weights have activation='gelu'"),
        ({"registers": 4}, "its weights have registers=0"),
        ({"depth": 1}, "its weights have depth=2"),
        ({"colour": "red"}, "its weights have no colour"),
        ({"image_size": 8}, "model.patch_size: an image height of 8 pixels"),
        ({"image_size": 0}, "data.image_size|model.image_size"),
        ({"patch_size": 7}, "does not divide into patches of 7"),
        ({"in_channels": 0}, "model.in_channels"),
        ({"num_classes": -1}, "model.num_classes"),
        ({"pool": "max"}, "model.pool"),
    ],
)
def test_what_cannot_be_asked_for(three, options, match):
    with pytest.raises(VitError, match=match) as caught:
        load_pretrained(three, **options)
    assert "\n" not in str(caught.value)


def test_what_may_differ_and_what_is_said_again(three):
    own = load_pretrained(three).architecture
    assert set(own) >= MAY_DIFFER
    loaded = load_pretrained(three, **{**own, "size": None, "drop_path": 0.1, "image_size": (96, 64), "in_channels": 1})
    a = loaded.architecture
    assert (a["image_size"], a["in_channels"], a["drop_path"]) == ([96, 64], 1, 0.1)
    assert loaded.preprocessing.image_size == (96, 64)
    assert loaded.preprocessing.channels == 1
    assert loaded.model.architecture == vit.VisionTransformer(**a).architecture


def test_the_model_is_ready_to_use(three):
    state = torch.random.get_rng_state()
    model = load_pretrained(three).model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_pooling_by_attention_is_initialised(three):
    loaded = load_pretrained(three, pool="attention", num_classes=5)
    assert loaded.model.attn_pool.q.weight.std() > 0.01
    assert not loaded.model.head.weight.any()


def test_pooling_otherwise_puts_the_norm_where_it_belongs(three):
    loaded = load_pretrained(three, pool="mean", num_classes=5)
    assert loaded.architecture["final_norm"] == "pooled"
    assert loaded.architecture["class_token"]


@torch.no_grad()
def test_create_model_by_name(images):
    model = create_model("vit_tiny_patch16_224", image_size=64, num_classes=7)
    assert model(images).shape == (3, 7)
    assert model.blocks[0].attn.qkv.weight.std() > 0  # random, as timm's are
    own = vit.create_model("vit_tiny", image_size=64, patch_size=16, num_classes=7)
    assert own.state_dict().keys() == model.state_dict().keys()
    assert create_model("vit_tiny_patch16_224", num_classes=0).num_classes == 0
    with pytest.raises(VitError, match="vit_tiny is an architecture without weights"):
        create_model("vit_tiny", pretrained=True)
    with pytest.raises(VitError, match="did you mean 'vit_tiny_patch16_224'"):
        create_model("vit_tiny_patch16_225")


@torch.no_grad()
def test_create_model_with_weights(three, images, tmp_path):
    theirs = timm.create_model(f"local-dir:{three}", pretrained=True).eval()
    assert torch.equal(create_model(f"local-dir:{three}", pretrained=True)(images), theirs(images))
    name = "vit_tiny_patch16_224"
    whole = timm.create_model(name, num_classes=5).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model = create_model(name, weights=tmp_path / "w.pth", num_classes=5, head="keep")
    assert torch.equal(model.head.weight, whole.head.weight)
    replaced = create_model(name, weights=tmp_path / "w.pth", num_classes=4)
    assert not replaced.head.weight.any()
    with pytest.raises(VitError, match="a head of 5 outputs, the model one of 1000"):
        create_model(name, weights=tmp_path / "w.pth")


def test_parameters_are_counted_without_building():
    assert count_parameters(read_info("vit_gigantic_patch14_224").architecture) == 1_844_440_680
