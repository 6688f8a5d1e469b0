"""RandAugment: each operation at several magnitudes against timm's on Pillow images, and the choice among them."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from vit.data import geometry
from vit.data.rand_augment import OPERATIONS, RandAugment
from vit.data.random import uniform

ops = pytest.importorskip("timm.data.auto_augment")

TIMM = {
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "brightness": "BrightnessIncreasing",
    "contrast": "ContrastIncreasing",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
    "colour": "ColorIncreasing",
}
GEOMETRIC = OPERATIONS[OPERATIONS.index("rotate") : OPERATIONS.index("translate_y") + 1]


def pictures(channels: int, size: int = 24) -> torch.Tensor:
    y, x = np.mgrid[:size, :size] / size
    waves = [127 + 100 * np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(channels)]
    smooth = torch.tensor(np.stack(waves), dtype=torch.uint8)
    noise = torch.randint(0, 256, (channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return torch.stack((smooth, noise // 2 + 60))


def by_timm(image: torch.Tensor, operation: str, magnitude: float, negative: bool) -> np.ndarray:
    name = TIMM[operation]
    level = ops.LEVEL_TO_ARG[name]
    args = level(magnitude, {}) if level else ()
    if operation == "posterize":
        args = (max(1, args[0]),)  # Pillow refuses timm's 0 bits
    if operation in GEOMETRIC:
        args = (-abs(args[0]) if negative else abs(args[0]),)
    elif "Increasing" in name and operation not in ("posterize", "solarize"):  # 1 + or - the strength, and at least 0.1
        args = (max(0.1, 1 - magnitude / 10 * 0.9) if negative else 1 + magnitude / 10 * 0.9,)
    picture = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
    keywords = {"resample": Image.Resampling.BILINEAR, "fillcolor": 0 if len(image) == 1 else (0, 0, 0)}
    result = np.asarray(ops.NAME_TO_OP[name](picture, *args, **keywords))
    return result[None] if result.ndim == 2 else result.transpose(2, 0, 1)


def test_the_operations_are_timms() -> None:
    assert set(TIMM) == set(OPERATIONS)
    assert sorted(TIMM.values()) == sorted(ops._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("magnitude", [2, 5, 9, 10])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o not in GEOMETRIC])
def test_photometric(operation: str, channels: int, magnitude: int, negative: bool, select: bool) -> None:
    if operation == "colour" and channels == 1:
        pytest.skip("grey images have no colour")
    images = pictures(channels)
    rand = RandAugment(1, magnitude)
    rand.select = select
    chosen = torch.full((2, 1), OPERATIONS.index(operation))
    got = rand.photometric(images.clone(), chosen, torch.full((2, 1), negative))
    # exact, but for the two whose own tests say why
    tolerance = 1 if operation in ("contrast", "autocontrast") else 0
    for mine, image in zip(got, images, strict=True):
        assert np.abs(mine.numpy().astype(int) - by_timm(image, operation, magnitude, negative)).max() <= tolerance


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("magnitude", [2, 5, 10])
@pytest.mark.parametrize("operation", GEOMETRIC)
def test_geometric(operation: str, magnitude: int, negative: bool) -> None:
    images = pictures(3)[:1]
    chosen = torch.full((1, 1), OPERATIONS.index(operation))
    matrix = RandAugment(1, magnitude).matrix(chosen, torch.full((1, 1), negative), (24, 24))
    got = geometry.sample(images.float(), matrix, "zero", torch.zeros(3))[0].round().numpy()
    expected = by_timm(images[0], operation, magnitude, negative).astype(float)
    # where neither blends with what lies outside: one level, for Pillow rounds once more
    ones = geometry.sample(torch.ones(1, 1, 24, 24), matrix, "zero", torch.zeros(1))[0, 0].numpy()
    inner = ones > 0.999
    assert inner.mean() > 0.3
    assert np.abs(got - expected)[:, inner].max() <= 1


def test_rounds_compose() -> None:
    rand = RandAugment(3, 7)
    names = ["rotate", "equalize", "translate_x"]
    chosen = torch.tensor([[OPERATIONS.index(name) for name in names]])
    negative = torch.tensor([[False, True, True]])
    single = RandAugment(1, 7)
    expected = torch.eye(3)[None]
    for k in range(3):
        expected = expected @ single.matrix(chosen[:, k : k + 1], negative[:, k : k + 1], (8, 12))
    torch.testing.assert_close(rand.matrix(chosen, negative, (8, 12)), expected)

    images = pictures(3)[1:]
    names = ["posterize", "sharpness", "brightness"]
    chosen = torch.tensor([[OPERATIONS.index(name) for name in names]])
    expected = images.clone()
    for k in range(3):
        expected = single.photometric(expected, chosen[:, k : k + 1], negative[:, k : k + 1])
    assert torch.equal(rand.photometric(images.clone(), chosen, negative), expected)


def test_selecting_and_looking_give_the_same() -> None:
    images = torch.cat([pictures(3)] * 40)
    chosen, negative = RandAugment(2, 9).choose(uniform(0, 0, torch.arange(80), 6, 4), 3)
    results = []
    for select in (False, True):
        rand = RandAugment(2, 9)
        rand.select = select
        results.append(rand.photometric(images.clone(), chosen, negative))
    assert torch.equal(*results)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_half_of_the_rounds_do_nothing_and_the_rest_choose_evenly(channels: int) -> None:
    chosen, negative = RandAugment(2, 9).choose(uniform(0, 0, torch.arange(6000), 6, 4), channels)
    assert chosen.shape == negative.shape == (6000, 2)
    count = len(OPERATIONS) if channels == 3 else len(OPERATIONS) - 1
    assert float((chosen < 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert stats.chisquare(np.bincount(chosen[chosen >= 0], minlength=count)).pvalue > 1e-3
    assert int(chosen.max()) == count - 1
    assert float(negative.double().mean()) == pytest.approx(0.5, abs=0.02)
