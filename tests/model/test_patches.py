"""Cutting an image into patches, and training on some of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.errors import VitError
from vit.model.patches import PatchEmbed, drop_patches, pair


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 5),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_patch_embedding_is_cut_flatten_multiply(reference, grid, patch, channels, width, seed):
    size = (grid[0] * patch[0], grid[1] * patch[1])
    embed = PatchEmbed(size, patch, channels, width).double()
    images = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tokens = embed(images)
    kernel, bias = embed.proj.weight.detach().numpy(), embed.proj.bias.detach().numpy()
    assert embed.grid == grid
    for b in range(2):
        expected = reference.patches(images[b].numpy(), patch) @ kernel.reshape(width, -1).T + bias
        np.testing.assert_allclose(tokens[b], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 9), (2, 3, 16, 16), (2, 8, 8, 3)])
def test_images_of_another_shape_are_refused_in_words(shape):
    with pytest.raises(VitError, match=r"\(B, 3, 8, 8\), not \("):
        PatchEmbed((8, 8), (4, 4), 3, 6)(torch.zeros(shape))


@settings(deadline=None, max_examples=100)
@given(
    B=st.integers(1, 4),
    P=st.integers(1, 30),
    rate=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_dropping_patches_keeps_a_subset_in_order_with_its_places(B, P, rate, seed):
    torch.manual_seed(seed)
    tokens = torch.randn(B, P, 3)
    kept, places = drop_patches(tokens, rate)
    K = max(1, round(P * (1 - rate)))
    assert kept.shape == (B, K, 3)
    assert places.shape == (B, K)
    for b in range(B):
        chosen = places[b].tolist()
        assert chosen == sorted(set(chosen))
        assert all(0 <= place < P for place in chosen)
        torch.testing.assert_close(kept[b], tokens[b][chosen], rtol=0, atol=0)


def test_every_patch_is_kept_equally_often_and_images_differ():
    _, places = drop_patches(torch.zeros(20_000, 8, 1), 0.5)
    counts = torch.bincount(places.flatten(), minlength=8) / 20_000
    torch.testing.assert_close(counts, torch.full((8,), 0.5), atol=0.02, rtol=0)
    assert len({tuple(row) for row in places.tolist()}) == 70  # every choice of 4 out of 8


@pytest.mark.parametrize("value", [8, (8, 8), [8, 8]])
def test_a_size_is_one_number_or_two(value):
    assert pair(value, "x") == (8, 8)


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, True, None, "8", "88", (8,), (8, 8, 8), [8, 0], [8, 2.0], {}, [], [None, 1]]
)
def test_what_is_not_a_size_is_refused_by_name(value):
    with pytest.raises(VitError, match=r"^data\.image_size: expected one positive whole number"):
        pair(value, "data.image_size")
