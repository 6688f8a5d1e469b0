"""Positions: the waves and the turns against their formulas, and what each kind of position makes a model know."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.model.positions import rotary_2d, rotate, sincos_2d

grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=30)
@given(grid=grids, quarter=st.integers(1, 6))
def test_sine_cosine_is_the_formula(grid, quarter):
    waves = sincos_2d(grid, 4 * quarter)
    assert waves.shape == (grid[0] * grid[1], 4 * quarter)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = [
                wave(position / 10_000 ** (i / quarter))
                for position in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            np.testing.assert_allclose(waves[row * grid[1] + column], expected, atol=1e-6)


def test_sine_cosine_tells_all_places_apart():
    waves = sincos_2d((14, 10), 32)
    distances = torch.cdist(waves, waves) + 10 * torch.eye(140)
    assert distances.min() > 0.1


@pytest.mark.parametrize("width", [2, 6, 7])
def test_widths_that_do_not_fit_the_waves_are_refused(width):
    with pytest.raises(VitError, match=r"model\.width: .*divisible by 4"):
        sincos_2d((2, 2), width)
    with pytest.raises(VitError, match=r"model\.width: .*divisible by 4"):
        rotary_2d((2, 2), width, 0)


@settings(deadline=None, max_examples=30)
@given(grid=grids, quarter=st.integers(1, 4), prefix=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_rotation_is_the_formula_and_leaves_the_prefix_alone(reference, grid, quarter, prefix, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, prefix + grid[0] * grid[1], 4 * quarter, dtype=torch.float64, generator=generator)
    turned = rotate(x, rotary_2d(grid, 4 * quarter, prefix))
    for head in range(2):
        np.testing.assert_allclose(turned[0, head], reference.turn(x[0, head].numpy(), grid, prefix), atol=1e-5)
    torch.testing.assert_close(turned[:, :, :prefix], x[:, :, :prefix], rtol=0, atol=0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), shift=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_rotated_scores_depend_on_the_offset_alone(seed, shift):
    """One query and one key placed anywhere: their score is a function of rows and columns between them."""
    rows, columns, d = 7, 6, 16
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(d, dtype=torch.float64, generator=generator) for _ in range(2))
    rotary = rotary_2d((rows, columns), d, 0)
    everywhere_q = rotate(q.expand(1, 1, rows * columns, d), rotary)[0, 0].view(rows, columns, d)
    everywhere_k = rotate(k.expand(1, 1, rows * columns, d), rotary)[0, 0].view(rows, columns, d)
    down, right = shift
    scores = (everywhere_q[down:, right:] * everywhere_k[: rows - down, : columns - right]).sum(-1)
    torch.testing.assert_close(scores, scores[:1, :1].expand_as(scores), rtol=1e-5, atol=1e-5)


def test_rotated_scores_of_equal_vectors_are_highest_in_place():
    ones = torch.ones(1, 1, 36, 16, dtype=torch.float64)
    scores = (rotate(ones, rotary_2d((6, 6), 16, 0)) @ ones[0, 0, 0]).flatten()
    assert scores[0].item() == pytest.approx(16)
    assert (scores[1:] < 16 - 0.1).all()


def shuffle(images: torch.Tensor, patch: int, order: torch.Tensor) -> torch.Tensor:
    """The same images with their patches in another order."""
    B, C, H, W = images.shape
    blocks = images.view(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks[:, order].view(B, H // patch, W // patch, C, patch, patch)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


@pytest.mark.parametrize("attention", ["multi_head", "scaled_dot_product", "dot_product"])
@pytest.mark.parametrize("pool", ["mean", "token", "attention"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_without_positions_the_order_of_the_patches_changes_nothing(shake, attention, pool, norm):
    model = VisionTransformer(
        image_size=12, patch_size=4, num_classes=5, width=16, depth=2, heads=2, registers=1,
        position="none", pool=pool, attention=attention, norm=norm,
    )  # fmt: skip
    shake(model.double().eval(), 0.3)
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    order = torch.tensor([4, 2, 7, 0, 8, 1, 5, 3, 6])
    with torch.no_grad():
        torch.testing.assert_close(model(shuffle(images, 4, order)), model(images))
        # and inside, patch by patch, only the order of the outputs changes
        x_BND, _ = model.embed(images)
        moved_BND, _ = model.embed(shuffle(images, 4, order))
        for block in model.blocks:
            x_BND, moved_BND = block(x_BND), block(moved_BND)
        prefix = model.num_prefix_tokens
        torch.testing.assert_close(moved_BND[:, prefix:], x_BND[:, prefix:][:, order])


@pytest.mark.parametrize("position", ["learned", "sincos", "rotary"])
def test_with_positions_the_order_matters(shake, position):
    model = VisionTransformer(
        image_size=12, patch_size=4, num_classes=5, width=16, depth=2, heads=2, position=position, pool="mean"
    )
    shake(model.eval(), 0.3)
    images = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert (model(shuffle(images, 4, torch.arange(8, -1, -1))) - model(images)).abs().max() > 1e-2


@pytest.mark.parametrize("prefix_too", [True, False])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_positions_of_the_prefix(position, prefix_too):
    model = VisionTransformer(
        image_size=8, patch_size=4, num_classes=5, width=16, depth=1, heads=2, registers=2,
        position=position, position_prefix=prefix_too,
    )  # fmt: skip
    assert model.pos_embed.shape == (1, 4 + 3 * prefix_too, 16)
    with torch.no_grad():
        model.pos_embed += 1
        prefix = torch.cat([model.cls_token, model.reg_token], dim=1)
        x_BND, _ = model.embed(torch.zeros(1, 3, 8, 8))
    expected = prefix + model.pos_embed[:, :3] if prefix_too else prefix
    torch.testing.assert_close(x_BND[:, :3], expected)
    torch.testing.assert_close(x_BND[:, 3:], model.pos_embed[:, -4:] + model.patch_embed.proj.bias)


def test_sine_cosine_positions_stay_as_they_are():
    model = VisionTransformer(image_size=8, patch_size=4, num_classes=5, width=16, depth=1, heads=2, position="sincos")
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0, 1:], sincos_2d((2, 2), 16))
    assert not model.pos_embed[0, 0].any()


@pytest.mark.parametrize("position", ["learned", "sincos", "rotary"])
def test_a_dropped_patch_takes_its_position_with_it(shake, position):
    """Training on some patches: each one that stays is turned or moved by its own place, not by its new rank.

    Dropping all but a set of patches must equal a model that is given those patches with their places.
    """
    options = dict(
        image_size=12, patch_size=4, num_classes=5, width=16, depth=2, heads=2, registers=1, position=position
    )
    model = shake(VisionTransformer(**options, patch_dropout=0.5).double(), 0.3).train()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(5)
        x_BND, rotary = model.embed(images)
        assert x_BND.shape == (2, 2 + 4, 16)
        model.eval()
        whole_BND, whole_rotary = model.embed(images)
        # which places were kept: found by comparing with the whole sequence
        for b in range(2):
            places = [int((whole_BND[b] - token).abs().sum(-1).argmin()) for token in x_BND[b]]
            assert places[:2] == [0, 1]
            assert places == sorted(set(places))
            torch.testing.assert_close(x_BND[b], whole_BND[b, places])
            if rotary is not None:
                torch.testing.assert_close(rotary[0][b, 0], whole_rotary[0][places])
                torch.testing.assert_close(rotary[1][b, 0], whole_rotary[1][places])
        attention: Any = model.blocks[0].attn
        seen: list[Any] = []
        attention.attend.register_forward_hook(lambda attend, qkv, output: seen.append(qkv))
        attention(x_BND, rotary)
        attention(whole_BND, whole_rotary)
        (q, k, _), (whole_q, whole_k, _) = seen
        torch.testing.assert_close(q[1], whole_q[1][:, places])
        torch.testing.assert_close(k[1], whole_k[1][:, places])
