"""The Transformer block, before and after the norm, and the parts of its branches, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.model.attention import DotProductAttention, MultiHeadAttention
from vit.model.blocks import Block, DropPath, LayerScale, Mlp, PostNormBlock


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {f"b.{name}": tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("kind", "norm"), [(Block, "pre"), (PostNormBlock, "post")])
@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 2),
    N=st.integers(1, 5),
    heads=st.integers(1, 3),
    d=st.integers(1, 4),
    hidden=st.integers(1, 9),
    learned=st.booleans(),
    layer_scale=st.sampled_from([None, 1e-5, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_a_block_is_its_formula(reference, shake, kind, norm, B, N, heads, d, hidden, learned, layer_scale, seed):
    width = heads * d
    attention = MultiHeadAttention(width, heads) if learned else DotProductAttention()
    block = shake(kind(width, attention, Mlp(width, hidden), layer_scale=layer_scale).double(), 0.4, seed)
    x = draw(seed, B, N, width)
    architecture = {"norm": norm, "heads": heads, "attention": "multi_head" if learned else "dot_product"}
    with torch.no_grad():
        y = block(x)
    for b in range(B):
        expected = reference.block(x[b].numpy(), arrays(block), "b", architecture)
        np.testing.assert_allclose(y[b], expected, rtol=1e-8, atol=1e-8)


def test_the_two_norms_differ_in_what_they_keep(shake):
    """Pre-norm leaves the sum free to grow, post-norm gives every token mean 0 and variance 1."""
    x = 10 * draw(0, 2, 5, 16)
    pre = Block(16, MultiHeadAttention(16, 2), Mlp(16, 32)).double()
    post = PostNormBlock(16, MultiHeadAttention(16, 2), Mlp(16, 32)).double()
    assert pre(x).std() > 5
    torch.testing.assert_close(post(x).mean(-1), torch.zeros(2, 5).double())
    torch.testing.assert_close(post(x).var(-1, correction=0), torch.ones(2, 5).double(), rtol=1e-4, atol=1e-4)


def test_mlp_is_its_formula_on_each_token_alone(reference, shake):
    mlp, x = shake(Mlp(6, 13).double(), 0.5), draw(0, 2, 4, 6)
    with torch.no_grad():
        y = mlp(x)
    np.testing.assert_allclose(y, reference.mlp(x.numpy(), arrays(mlp) | {}, "b"), rtol=1e-9)
    torch.testing.assert_close(mlp(x[:, 2:3]), y[:, 2:3])


def test_layer_scale_multiplies_each_channel():
    scale, x = LayerScale(4, 0.1).double(), draw(0, 2, 3, 4)
    torch.testing.assert_close(scale(x), 0.1 * x, rtol=1e-6, atol=0)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
    torch.testing.assert_close(scale(x), x * torch.tensor([1.0, -2.0, 0.0, 3.0]).double(), rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_stochastic_depth_drops_whole_images_and_keeps_the_expectation(rate):
    drop, n = DropPath(rate).train(), 20_000
    x = draw(0, 1, 3, 2).expand(n, -1, -1)
    y = drop(x)
    ratio = (y / x).flatten(1)
    kept = ratio[:, 0] != 0
    torch.testing.assert_close(ratio, (kept[:, None] / (1 - rate)).expand(-1, 6).double())  # all of an image, or none
    share, spread = kept.double().mean().item(), (rate * (1 - rate) / n) ** 0.5
    assert abs(share - (1 - rate)) < 5 * spread
    assert abs(ratio[:, 0].mean().item() - 1) < 5 * spread / (1 - rate)


def test_stochastic_depth_is_nothing_in_evaluation():
    drop, x = DropPath(0.9).eval(), draw(0, 8, 3, 2)
    assert drop(x) is x


def test_a_block_drops_its_branches_for_some_images_only():
    block = Block(8, MultiHeadAttention(8, 2), Mlp(8, 16), drop_path=0.5).train()
    x = torch.randn(1, 4, 8).expand(64, -1, -1)
    y = block(x)
    untouched = (y == x).flatten(1).all(1)
    assert 2 <= untouched.sum() <= 40  # both branches dropped: a quarter of the images
    assert len({tuple(row) for row in y.flatten(1).round(decimals=4).tolist()}) == 4  # each branch dropped or not


def test_layer_scale_may_start_at_a_whole_number():
    assert LayerScale(4, 1).gamma.dtype == torch.float32
