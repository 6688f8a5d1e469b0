"""The evaluation path agrees with timm's, number for number, on real photographs."""

import numpy as np
import pytest
from PIL import Image

from vit.data.decode import decode
from vit.data.preprocess import Preprocessing

GEOMETRIES = [
    # image size, crop_pct, crop_mode, interpolation
    ((224, 224), 0.9, "center", "bicubic"),
    ((224, 224), 0.875, "center", "bilinear"),
    ((384, 384), 1.0, "center", "bicubic"),
    ((96, 160), 0.9, "center", "bicubic"),
    ((160, 97), 0.95, "center", "lanczos"),
    ((224, 224), 1.0, "squash", "bicubic"),
    ((128, 96), 0.8, "squash", "bilinear"),
    ((224, 224), 1.0, "border", "bicubic"),
    ((112, 225), 0.9, "border", "bicubic"),
    ((32, 32), 1.0, "center", "nearest"),
]


def synthetic(shape: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(shape)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def timm_transform(geometry):
    data = pytest.importorskip("timm.data", reason="timm is the reference here")
    size, crop_pct, crop_mode, interpolation = geometry
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = data.create_transform(
        input_size=(3, *size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, mean=mean, std=std
    )
    ours = Preprocessing(size, 3, mean, std, interpolation, crop_pct, crop_mode)
    return reference, ours


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_photographs(geometry, photos):
    reference, ours = timm_transform(geometry)
    for path in photos[::7]:
        expected = reference(Image.open(path).convert("RGB")).numpy()
        got = ours(decode(path, channels=3))
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() < 1e-5, path.name


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(50, 50), (33, 70), (301, 200), (8, 8), (64, 65), (17, 200)], ids=str)
def test_any_size(geometry, shape):
    reference, ours = timm_transform(geometry)
    image = synthetic(shape)
    assert np.abs(ours(image) - reference(image).numpy()).max() < 1e-5
