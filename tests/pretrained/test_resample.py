"""Resampled weights are those of timm, and what their formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch.nn import functional as F

from vit.errors import VitError
from vit.pretrained.resample import resample_channels, resample_patches, resample_positions, square_grid

SIDE = st.integers(1, 12)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), prefix=st.integers(0, 5))
def test_positions_of_any_grid_are_timms(old, new, prefix):
    positions = drawn(1, prefix + old[0] * old[1], 6)
    ours = resample_positions(positions, new, prefix=prefix, old=old)
    theirs = resample_abs_pos_embed(positions, list(new), old_size=list(old), num_prefix_tokens=prefix)
    assert ours.shape == (1, prefix + new[0] * new[1], 6)
    assert torch.equal(ours[:, :prefix], positions[:, :prefix])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def cubic(distance: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys 1981, equation 4: the cubic convolution kernel; Pillow's and torch's antialiased filter have a = -0.5."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much each old pixel counts for each new one; the filter widens with the scale as it shrinks."""
    scale = old / new
    wide = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    counted = cubic((np.arange(old) + 0.5 - centres[:, None]) / wide)
    return counted / counted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((3, 8), (6, 5)), ((16, 16), (37, 20))])
def test_positions_follow_the_formula_in_float64(old, new):
    positions = drawn(1, 2 + old[0] * old[1], 3)
    grid = positions[0, 2:].double().numpy().reshape(*old, 3)
    written = np.einsum("rh,cw,hwd->rcd", weights(old[0], new[0]), weights(old[1], new[1]), grid)
    ours = resample_positions(positions, new, prefix=2, old=old)[0, 2:].numpy().reshape(*new, 3)
    np.testing.assert_allclose(ours, written, atol=1e-5)  # float32 against float64


def test_positions_without_a_grid_are_square_or_refused():
    assert resample_positions(drawn(1, 17, 2), (2, 2), prefix=1).shape == (1, 5, 2)
    with pytest.raises(VitError, match="pos_embed has 17 positions: not a square of patches after 0 tokens"):
        resample_positions(drawn(1, 17, 2), (2, 2), prefix=0)
    with pytest.raises(VitError, match="not 3 x 3 of patches after 1 tokens"):
        resample_positions(drawn(1, 17, 2), (2, 2), prefix=1, old=(3, 3))
    with pytest.raises(VitError, match="not a square"):
        resample_positions(drawn(1, 1, 2), (2, 2), prefix=1)
    assert [square_grid(n) for n in (-1, 0, 1, 2, 4, 37 * 37)] == [None, None, (1, 1), None, (2, 2), (37, 37)]


def test_positions_of_equal_count_but_another_shape_are_resampled():
    positions = drawn(1, 16, 2)
    assert resample_positions(positions, (4, 4), prefix=0) is positions
    assert not torch.equal(resample_positions(positions, (4, 4), prefix=0, old=(2, 8)), positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    assert resample_positions(drawn(1, 10, 2).to(dtype), (2, 2), prefix=1).dtype == dtype
    assert resample_patches(drawn(2, 3, 4, 4).to(dtype), (2, 2)).dtype == dtype
    assert resample_channels(drawn(2, 3, 4, 4).to(dtype), 1).dtype == dtype


@settings(max_examples=40, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE))
def test_patches_of_any_size_are_timms(old, new):
    kernel = drawn(4, 3, *old)
    theirs = resample_patch_embed(kernel, list(new))
    torch.testing.assert_close(resample_patches(kernel, new), theirs, rtol=1e-4, atol=1e-4 * float(kernel.abs().max()))


@pytest.mark.parametrize(("old", "new"), [((16, 16), (14, 14)), ((14, 14), (16, 16)), ((16, 16), (32, 32))])
def test_patches_of_the_fields_sizes_are_timms(old, new):
    kernel = drawn(8, 3, *old)
    torch.testing.assert_close(
        resample_patches(kernel, new), resample_patch_embed(kernel, list(new)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((3, 5), (6, 7)), ((8, 8), (16, 8))])
def test_enlarged_patches_give_the_tokens_that_they_gave_before(old, new):
    """FlexiViT's claim, exact where nothing is lost: <x, w> = <B x, w'>."""
    patches, kernel = drawn(5, 3, *old, dtype=torch.float64), drawn(4, 3, *old, dtype=torch.float64)
    enlarged = F.interpolate(patches, size=new, mode="bicubic", antialias=True)
    before, after = (
        F.conv2d(x, w).flatten(1) for x, w in ((patches, kernel), (enlarged, resample_patches(kernel, new)))
    )
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


def test_shrunk_patches_lose_least():
    """The written-out least squares: no kernel near the pseudo-inverse's answers unit-variance patches better."""
    old, new = (6, 6), (4, 4)
    kernel = drawn(1, 1, *old, dtype=torch.float64)
    units = torch.eye(36, dtype=torch.float64).reshape(36, 1, *old)
    resize = F.interpolate(units, size=new, mode="bicubic", antialias=True).flatten(1).T
    expected = torch.linalg.lstsq(resize.T, kernel.flatten()[:, None]).solution.reshape(new)
    torch.testing.assert_close(resample_patches(kernel, new)[0, 0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 12])
def test_channels_are_timms(channels):
    kernel = drawn(4, 3, 5, 5)
    theirs = adapt_input_conv(channels, kernel.clone())
    torch.testing.assert_close(resample_channels(kernel, channels), theirs, rtol=0, atol=1e-6)


def test_channels_keep_the_tokens_of_images_whose_channels_are_equal():
    kernel, image = drawn(4, 3, 5, 5, dtype=torch.float64), drawn(2, 1, 5, 5, dtype=torch.float64)
    expected = F.conv2d(image.expand(-1, 3, -1, -1), kernel)
    for channels in (1, 6):
        tokens = F.conv2d(image.expand(-1, channels, -1, -1), resample_channels(kernel, channels))
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
