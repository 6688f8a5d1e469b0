"""Names of timm's registry: what is behind them, and what is said of one that does not exist or is not plain."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained.registry import is_model_name, read_entry


def test_a_name_gets_its_default_tag_and_timms_account_of_the_weights():
    found = read_entry("vit_small_patch16_224")
    cfg = timm.get_pretrained_cfg("vit_small_patch16_224")
    assert found.name == f"vit_small_patch16_224.{cfg.tag}"
    assert found.pretrained_cfg["hf_hub_id"] == cfg.hf_hub_id
    assert found.pretrained_cfg["mean"] == list(cfg.mean)
    assert json.loads(json.dumps(found.pretrained_cfg)) == found.pretrained_cfg
    assert json.loads(json.dumps(found.architecture)) == found.architecture
    assert read_entry(f"timm/{found.name}") == found


def test_what_it_says_is_all_that_a_model_needs():
    found = read_entry("vit_betwixt_patch16_reg4_gap_256").architecture
    with torch.device("meta"):
        model = VisionTransformer(**found)
    assert model.architecture == found
    assert {key: found[key] for key in ("width", "depth", "heads", "registers", "pool", "layer_scale")} == dict(
        width=640, depth=12, heads=10, registers=4, pool="mean", layer_scale=1e-5
    )


def test_a_tag_decides_the_classes_and_the_size():
    assert read_entry("vit_small_patch16_224.augreg_in1k").architecture["num_classes"] == 1000
    assert read_entry("vit_small_patch16_224.augreg_in21k").architecture["num_classes"] == 21843
    assert read_entry("vit_small_patch16_224.dino").architecture["num_classes"] == 0


def test_a_name_that_timm_has_changed_is_the_new_one():
    assert read_entry("vit_base_patch16_224_in21k").name == "vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("vit_small_patch16_244", "did you mean 'vit_small_patch16_224'"),
        ("deit_small_distiled_patch16_224", "'deit_small_distilled_patch16_224'"),
        ("nonsense", "choose from"),
        ("../vit_small_patch16_224", "timm has no model called"),
        ("", "timm has no model called ''"),
        ("vit_small_patch16_224.augreg_in1", "did you mean 'augreg_in1k'"),
        ("vit_small_patch16_224.", "timm has no model called"),
        ("test_vit.other", "choose from r160_in1k"),
        (
            "vit_base_r50_s16_384",
            "convolutional network or another embedding (HybridEmbed); did you mean 'vit_base_patch",
        ),
        ("vit_base_mci_224", "HybridEmbed"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock; did you mean 'vit_base_patch16"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("eva02_base_patch14_224", "only the DINOv3 models"),
        ("vit_pe_core_base_patch16_224", "only the DINOv3 models"),
        ("vit_base_patch16_sapiens2", "blocks differ from DINOv3's"),
        ("vit_relpos_base_patch16_224", "VisionTransformerRelPos"),
        ("resnet50", "ResNet, is not a plain Vision Transformer"),
    ],
)
def test_a_name_that_does_not_work_is_refused_in_one_line_with_one_that_does(name, words):
    with pytest.raises(VitError) as error:
        read_entry(name)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("text", "so"),
    [
        ("vit_small_patch16_224", True),
        ("vit_small_patch16_224.augreg_in1k", True),
        ("timm/vit_small_patch16_224.augreg_in1k", True),
        ("hf-hub:timm/vit_small_patch16_224.augreg_in1k", True),
        ("hf-hub:someone/flowers@main", True),
        ("vit_smal_patch16_224", False),
        ("vit_tiny", False),
        ("runs/digits/2026-01-01_10-00-00", False),
        ("model.onnx", False),
        ("hf-hub:flowers", False),
        ("hf-hub:../x", False),
        ("", False),
    ],
)
def test_what_counts_as_a_name(text, so):
    assert is_model_name(text) is so
