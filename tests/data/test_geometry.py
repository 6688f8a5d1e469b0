"""Moving pixels: against padding and slicing by hand, SciPy's affine_transform, Pillow and timm."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from vit.data import geometry


def pictures(batch: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    border=st.sampled_from(geometry.BORDERS),
    moves=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=6),
)
def test_shift_is_pad_slice_and_mirror(channels, height, width, border, moves) -> None:
    images = pictures(len(moves), channels, height, width)
    fill = torch.arange(10, 10 + channels, dtype=torch.uint8)
    down, right, flip = (torch.tensor(values) for values in zip(*moves, strict=True))
    got = geometry.shift(images, down, right, flip, 3, border, fill)
    for image, (y, x, mirrored), result in zip(images.numpy(), moves, got.numpy(), strict=True):
        if border == "reflect":
            padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="reflect")
        else:
            padded = np.stack(
                [
                    np.pad(c, 3, constant_values=int(f) if border == "mean" else 0)
                    for c, f in zip(image, fill, strict=True)
                ]
            )
        expected = padded[:, 3 + y : 3 + y + height, 3 + x : 3 + x + width]
        assert np.array_equal(result, expected[:, :, ::-1] if mirrored else expected)


def test_shift_without_mirroring() -> None:
    images = pictures(3, 1, 5, 5)
    zero = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(geometry.shift(images, zero, zero, None, 2, "zero", torch.zeros(1, dtype=torch.uint8)), images)


def test_mirror() -> None:
    images = pictures(4, 3, 5, 6)
    flip = torch.tensor([True, False, True, False])
    got = geometry.mirror(images, flip)
    assert torch.equal(got[0::2], images[0::2].flip(-1))
    assert torch.equal(got[1::2], images[1::2])


def by_scipy(image: np.ndarray, matrix: np.ndarray, mode: str, fill: float) -> np.ndarray:
    """The same reading of pixels, in float64. `matrix` is centred, x first; SciPy's rows come first."""
    height, width = image.shape
    swap = np.array([[0, 1], [1, 0]])
    linear = swap @ matrix[:2, :2] @ swap
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = centre + swap @ matrix[:2, 2] - linear @ centre
    return ndimage.affine_transform(image.astype(np.float64), linear, offset, order=1, mode=mode, cval=fill)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    angle=st.floats(-3.2, 3.2),
    right=st.floats(-4, 4),
    down=st.floats(-4, 4),
    scale=st.floats(0.4, 2.5),
    shear=st.floats(-0.8, 0.8),
    border=st.sampled_from(geometry.BORDERS),
)
def test_affine_sampling_is_scipys(height, width, angle, right, down, scale, shear, border) -> None:
    image = pictures(1, 2, height, width).to(torch.float32)
    numbers = [torch.tensor([value]) for value in (angle, right, down, scale, shear)]
    matrix = geometry.affine_matrix(*numbers)
    fill = torch.tensor([40.0, 200.0])
    got = geometry.sample(image, matrix, border, fill)[0]

    # forward: enlarge, shear, rotate (y down, counter-clockwise as seen), move; SciPy is given the inverse
    c, s = math.cos(angle), math.sin(angle)
    forward = np.array([[1, 0, right], [0, 1, down], [0, 0, 1]]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    forward = forward @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]]) @ np.diag([scale, scale, 1])
    mode = "reflect" if border == "reflect" else "grid-constant"  # SciPy's "reflect" repeats the edge
    for channel in range(2):
        level = float(fill[channel]) if border == "mean" else 0.0
        expected = by_scipy(image[0, channel].numpy(), np.linalg.inv(forward), mode, level)
        # positions are float32: the error is theirs times the slope between neighbours, up to 255
        np.testing.assert_allclose(got[channel].numpy(), expected, atol=0.02)


@pytest.mark.parametrize("degrees", [10, -25, 90])
def test_rotation_is_pillows(degrees: float) -> None:
    image = ndimage.gaussian_filter(pictures(1, 1, 33, 33)[0, 0].numpy().astype(float), 2)
    image = ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)
    zero, one = torch.zeros(1), torch.ones(1)
    matrix = geometry.affine_matrix(torch.tensor([math.radians(degrees)]), zero, zero, one, zero)
    got = geometry.sample(torch.tensor(image)[None, None].float(), matrix, "zero", zero)[0, 0].round().numpy()
    expected = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)).astype(float)
    # within one level, away from the edge, which Pillow does not blend with what lies outside
    y, x = np.mgrid[:33, :33] - 16
    assert np.abs(got - expected)[x**2 + y**2 < 14**2].max() <= 1


def test_crop_matrix_reads_the_box_as_pillow_resizes_it() -> None:
    image = pictures(1, 1, 12, 16)
    box = torch.tensor([[3.0, 2.0, 8.0, 6.0]])
    got = geometry.sample(image.float(), geometry.crop_matrix(box, (12, 16)), "reflect", torch.zeros(1))
    whole = Image.fromarray(image[0, 0].numpy()).convert("F")
    expected = np.asarray(whole.resize((16, 12), Image.Resampling.BILINEAR, box=(3, 2, 11, 8)))
    # the box's own edge rows blend with what lies beside the box here, and not in Pillow
    np.testing.assert_allclose(got[0, 0, 1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.05)


def test_composition_reads_through_the_operations_in_order() -> None:
    images = pictures(5, 2, 9, 7)
    fill = torch.zeros(2)
    down, right = torch.tensor([1, -2, 0, 2, -1]), torch.tensor([0, 1, -2, 2, -1])
    flip = torch.tensor([True, False, True, False, True])
    copied = geometry.shift(images, down, right, flip, 2, "zero", fill.to(torch.uint8))
    matrix = geometry.shift_matrix(down, right) @ geometry.mirror_matrix(flip)
    sampled = geometry.sample(images.float(), matrix, "zero", fill)
    torch.testing.assert_close(sampled, copied.float(), atol=0.01, rtol=0)
