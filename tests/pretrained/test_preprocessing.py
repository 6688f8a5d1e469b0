"""Preprocessing travels with the weights: on real photographs it makes what timm's own transform makes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from vit.data.decode import decode
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.pretrained.preprocessing import adapt_channels, from_timm_cfg

NAMES = [
    "vit_small_patch16_224.augreg_in1k",  # statistics 0.5, crop 0.9
    "deit_tiny_patch16_224.fb_in1k",  # ImageNet's statistics
    "vit_base_patch16_clip_224.openai",  # CLIP's
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",  # squash
    "vit_small_patch14_dinov2.lvd142m",  # 518 pixels
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch16_224_miil.in21k",  # bilinear, statistics 0 and 1
    "vit_huge_patch14_clip_378.dfn5b",  # squash at 378
]


def of(name: str, image_size: tuple[int, int] | None = None) -> tuple[dict, Preprocessing]:
    """timm's account of a name, and what this project makes of it."""
    cfg = get_pretrained_cfg(name).to_dict()
    size = image_size or cfg["input_size"][1:]
    return cfg, from_timm_cfg(cfg, image_size=size, channels=cfg["input_size"][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_size", [None, (160, 160), (192, 256)], ids=str)
def test_the_models_input_is_timms(name, image_size, real_photographs):
    cfg, ours = of(name, image_size)
    asked = {} if image_size is None else {"input_size": (3, *image_size)}
    theirs = create_transform(**resolve_data_config(asked, pretrained_cfg=cfg))
    # timm takes no notice of EXIF, which would turn them
    upright = [path for path in real_photographs if Image.open(path).getexif().get(274, 1) == 1]
    for path in upright[:: len(upright) // 3]:
        with Image.open(path) as image:
            expected = theirs(image.convert("RGB")).numpy()
        whole = ours(Image.fromarray(np.asarray(Image.open(path).convert("RGB"))))
        as_a_command_does = ours(decode(path, channels=3, target=ours.resize_target))
        for found in (whole, as_a_command_does):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_what_timm_takes_where_nothing_is_said():
    preprocessing = from_timm_cfg({}, image_size=(64, 64), channels=3)
    config = resolve_data_config({"input_size": (3, 64, 64)})
    assert preprocessing.mean == config["mean"]
    assert preprocessing.std == config["std"]
    assert (preprocessing.interpolation, preprocessing.crop_pct) == (config["interpolation"], config["crop_pct"])


def test_other_channels_get_the_mean_of_the_statistics():
    _, three = of("deit_tiny_patch16_224.fb_in1k")
    grey = adapt_channels(three, 1)
    assert grey.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert adapt_channels(three, 5).std == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 5)
    assert adapt_channels(three, 3) is three
    assert (grey.crop_pct, grey.image_size) == (three.crop_pct, three.image_size)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ({"interpolation": "spline"}, "interpolation='spline'"),
        ({"mean": "0.5"}, "mean: expected a list"),
        ({"std": [0, 0, 0]}, "std: expected numbers above 0"),
        ({"mean": [0.5, 0.5]}, "std: expected 2 numbers"),
        ({"crop_pct": 7}, "crop_pct"),
        ({"crop_mode": "top"}, "crop_mode"),
    ],
)
def test_an_account_that_cannot_be_followed(cfg, match):
    with pytest.raises(VitError, match=match) as caught:
        from_timm_cfg(cfg, image_size=(8, 8), channels=3, source="someone/model")
    assert str(caught.value).startswith("someone/model: preprocessing: ")
