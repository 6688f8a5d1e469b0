"""Each attention mechanism against its formula in NumPy, and what follows from the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.model.attention import (
    CrossAttention,
    DifferentialAttention,
    DotProductAttention,
    MultiHeadAttention,
    dot_product_attention,
    scaled_dot_product_attention,
)

CLOSE = dict(rtol=1e-9, atol=1e-9)
shapes = dict(
    B=st.integers(1, 3), N=st.integers(1, 7), M=st.integers(1, 7), d=st.integers(1, 6), seed=st.integers(0, 2**31)
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_weights(layer: torch.nn.Module, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output, computed from the weights that its `attend` has, and these weights."""
    found = []

    def replace(attend: Any, qkv: Any, options: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(attend.weights(*qkv[:2], **options))
        return attend.average(found[-1], qkv[2])

    handle = layer.attend.register_forward_hook(replace, with_kwargs=True)
    try:
        return layer(*inputs), found[-1]
    finally:
        handle.remove()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {f"a.{name}": tensor.numpy() for name, tensor in module.state_dict().items()}


@settings(deadline=None, max_examples=40)
@given(**{key: shapes[key] for key in ("B", "N", "d", "seed")})
def test_dot_product_attention_is_the_formula(reference, B, N, d, seed):
    x = draw(seed, B, N, d)
    outputs, weights = dot_product_attention(x)
    for b in range(B):
        y_ND, w_NN = reference.dot_product_attention(x[b].numpy())
        np.testing.assert_allclose(weights[b], w_NN, **CLOSE)
        np.testing.assert_allclose(outputs[b], y_ND, **CLOSE)
    np.testing.assert_allclose(weights.sum(-1), 1, **CLOSE)


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_scaled_dot_product_attention_is_the_formula(reference, B, N, M, d, seed):
    q, k, v = draw(seed, B, N, d), draw(seed + 1, B, M, d), draw(seed + 2, B, M, d)
    outputs, weights = scaled_dot_product_attention(q, k, v)
    for b in range(B):
        y_Nd, w_NM = reference.attention(q[b].numpy(), k[b].numpy(), v[b].numpy())
        np.testing.assert_allclose(weights[b], w_NM, **CLOSE)
        np.testing.assert_allclose(outputs[b], y_Nd, **CLOSE)
    np.testing.assert_allclose(weights.sum(-1), 1, **CLOSE)


@settings(deadline=None, max_examples=30)
@given(
    B=st.integers(1, 2),
    N=st.integers(1, 6),
    heads=st.integers(1, 4),
    d=st.integers(1, 5),
    qk_norm=st.booleans(),
    qkv_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_multi_head_attention_is_the_formula_by_both_paths(reference, shake, B, N, heads, d, qk_norm, qkv_bias, seed):
    attention = MultiHeadAttention(heads * d, heads, qk_norm=qk_norm, qkv_bias=qkv_bias).double()
    shake(attention, 0.5, seed)
    x = draw(seed, B, N, heads * d)
    with torch.no_grad():
        fused = attention(x)
        written_out, weights = by_weights(attention, x)
    assert weights.shape == (B, heads, N, N)
    np.testing.assert_allclose(weights.sum(-1), 1, **CLOSE)
    for b in range(B):
        y_ND, w_HNN = reference.self_attention(x[b].numpy(), arrays(attention), "a", heads)
        np.testing.assert_allclose(weights[b], w_HNN, **CLOSE)
        np.testing.assert_allclose(written_out[b], y_ND, **CLOSE)
        np.testing.assert_allclose(fused[b], y_ND, **CLOSE)


@settings(deadline=None, max_examples=20)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    prefix=st.integers(0, 2),
    heads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_rotary_attention_is_the_formula_by_both_paths(reference, shake, grid, prefix, heads, seed):
    from vit.model.positions import rotary_2d

    attention = shake(MultiHeadAttention(heads * 8, heads).double(), 0.5, seed)
    x = draw(seed, 1, prefix + grid[0] * grid[1], heads * 8)
    rotary = rotary_2d(grid, 8, prefix)
    with torch.no_grad():
        fused = attention(x, rotary)
        written_out, weights = by_weights(attention, x, rotary)
    y_ND, w_HNN = reference.self_attention(x[0].numpy(), arrays(attention), "a", heads, grid=grid, prefix=prefix)
    # the angles are stored in float32
    for ours, theirs in ((fused[0], y_ND), (written_out[0], y_ND), (weights[0], w_HNN)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(heads=st.integers(1, 3), **shapes)
def test_cross_attention_is_the_formula_by_both_paths(reference, shake, heads, B, N, M, d, seed):
    attention = shake(CrossAttention(heads * d, heads).double(), 0.5, seed)
    x, context = draw(seed, B, N, heads * d), draw(seed + 1, B, M, heads * d)
    with torch.no_grad():
        fused = attention(x, context)
        written_out, weights = by_weights(attention, x, context)
    assert weights.shape == (B, heads, N, M)
    for b in range(B):
        y_ND, w_HNM = reference.cross_attention(x[b].numpy(), context[b].numpy(), arrays(attention), "a", heads)
        np.testing.assert_allclose(weights[b], w_HNM, **CLOSE)
        np.testing.assert_allclose(written_out[b], y_ND, **CLOSE)
        np.testing.assert_allclose(fused[b], y_ND, **CLOSE)


def test_differential_attention_is_the_formula(shake):
    """Ye et al. 2024, equations 1 to 3: two maps in each head, their difference, and a norm of each head's outputs."""
    layer, (B, N, H, d) = 3, (2, 5, 2, 3)  # d of a map
    attention = shake(DifferentialAttention(2 * H * d, H, layer=layer).double(), 0.5)
    x = draw(0, B, N, 2 * H * d)
    with torch.no_grad():
        outputs, weights, _ = attention(x, rows=slice(None))
    a = {name.removeprefix("a."): tensor for name, tensor in arrays(attention).items()}
    first = 0.8 - 0.6 * np.exp(-0.3 * layer)
    share = np.exp(a["lambda_q1"] @ a["lambda_k1"]) - np.exp(a["lambda_q2"] @ a["lambda_k2"]) + first
    np.testing.assert_allclose(weights.sum(-1), 1 - share, **CLOSE)
    assert (weights < 0).any()
    for b in range(B):
        q, k, v = np.split(x[b].numpy() @ a["qkv.weight"].T + a["qkv.bias"], 3, axis=1)
        heads = []
        for h in range(H):
            maps = []
            for each in (2 * h, 2 * h + 1):
                own = slice(each * d, (each + 1) * d)
                powers = np.exp(q[:, own] @ k[:, own].T / d**0.5)
                maps.append(powers / powers.sum(axis=1, keepdims=True))
            difference = maps[0] - share * maps[1]
            np.testing.assert_allclose(weights[b, h], difference, **CLOSE)
            out = difference @ v[:, 2 * h * d : 2 * (h + 1) * d]
            out = out / np.sqrt((out**2).mean(axis=1, keepdims=True) + 1e-5) * a["sub_norm.weight"]
            heads.append((1 - first) * out)
        wanted = np.concatenate(heads, axis=1) @ a["proj.weight"].T + a["proj.bias"]
        np.testing.assert_allclose(outputs[b], wanted, **CLOSE)


def test_cross_attention_to_itself_with_equal_matrices_is_self_attention(shake):
    own = shake(MultiHeadAttention(12, 3).double())
    cross = CrossAttention(12, 3).double()
    weight, bias = own.qkv.weight.detach(), own.qkv.bias.detach()
    cross.load_state_dict(
        {"q.weight": weight[:12], "q.bias": bias[:12], "kv.weight": weight[12:], "kv.bias": bias[12:]}
        | {"proj.weight": own.proj.weight, "proj.bias": own.proj.bias}
    )
    x = draw(3, 2, 5, 12)
    torch.testing.assert_close(cross(x, x), own(x))


def test_plain_attention_turns_with_its_input():
    """Only inner products matter: in a rotated space the weights are the same and the outputs are rotated."""
    x = draw(0, 2, 6, 5)
    rotation = torch.linalg.qr(draw(1, 5, 5)).Q
    outputs, weights = dot_product_attention(x)
    turned_outputs, turned_weights = dot_product_attention(x @ rotation)
    torch.testing.assert_close(turned_weights, weights)
    torch.testing.assert_close(turned_outputs, outputs @ rotation)


def test_plain_attention_does_not_know_the_order():
    x, order = draw(0, 2, 6, 5), torch.tensor([3, 0, 5, 1, 4, 2])
    outputs, weights = dot_product_attention(x)
    shuffled_outputs, shuffled_weights = dot_product_attention(x[:, order])
    torch.testing.assert_close(shuffled_outputs, outputs[:, order])
    torch.testing.assert_close(shuffled_weights, weights[:, order][:, :, order])


def test_plain_attention_gives_means_of_its_inputs():
    """Each output is a weighted mean, so no channel leaves the range of the inputs; equal inputs share equally."""
    x = draw(0, 3, 8, 4)
    outputs, weights = dot_product_attention(x)
    assert (weights > 0).all()
    assert (outputs <= x.amax(1, keepdim=True) + 1e-12).all()
    assert (outputs >= x.amin(1, keepdim=True) - 1e-12).all()
    same, uniform = dot_product_attention(x[:, :1].expand(-1, 8, -1))
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 8))
    torch.testing.assert_close(same, x[:, :1].expand(-1, 8, -1))


def test_the_layer_of_plain_attention_has_no_parameters():
    layer, x = DotProductAttention(), draw(0, 2, 6, 5)
    assert list(layer.parameters()) == []
    outputs, weights = dot_product_attention(x)
    torch.testing.assert_close(layer(x), outputs)
    torch.testing.assert_close(layer(x, rows=slice(None))[1], weights[:, None])


def test_scaling_keeps_the_scores_at_unit_variance():
    for d in (4, 64, 1024):
        q, k = draw(0, 1, 200, d), draw(1, 1, 200, d)
        _, weights = scaled_dot_product_attention(q, k, k)
        scores = weights.log() - weights.log().mean(-1, keepdim=True)
        assert scores.std().item() == pytest.approx(1, abs=0.05)


def test_dropout_drops_weights_in_training_only():
    attention = MultiHeadAttention(8, 2, attention_dropout=0.5, dropout=0.5)
    x = torch.randn(2, 6, 8)
    attention.train()
    assert not torch.equal(attention(x), attention(x))
    assert not torch.equal(by_weights(attention, x)[0], by_weights(attention, x)[0])
    weights = by_weights(attention, x)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6), msg="the weights shown are those before dropout")
    attention.eval()
    torch.testing.assert_close(attention(x), attention(x), rtol=0, atol=0)
    torch.testing.assert_close(attention(x), by_weights(attention, x)[0])


@pytest.mark.parametrize("path", ["fused", "written out"])
@pytest.mark.parametrize(
    "attention", [MultiHeadAttention(8, 2, attention_dropout=0.3), DotProductAttention(attention_dropout=0.3)]
)
def test_attention_dropout_keeps_the_expected_output(attention, path):
    attention.double()
    x = draw(0, 1, 6, 8).expand(20_000, -1, -1)
    with torch.no_grad():
        without = attention.eval()(x[:1])[0]
        attention.train()
        dropped = attention(x) if path == "fused" else by_weights(attention, x)[0]
    assert len(dropped.unique(dim=0)) > 100
    spread = dropped.std(0) / 20_000**0.5
    assert ((dropped.mean(0) - without).abs() < 6 * spread + 1e-9).all()


@pytest.mark.parametrize("kind", [MultiHeadAttention, DotProductAttention])
def test_rows_come_beside_the_output_in_single_precision(kind):
    """Chosen rows of the weights and the keys, for whoever reduces tokens; the output is the same."""
    layer = kind(8, 2) if kind is MultiHeadAttention else kind()
    x, bias = draw(0, 2, 6, 8).float(), draw(1, 2, 1, 1, 6).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, rows, keys = layer(x, None, bias, slice(1, 4))
        assert torch.equal(output, layer(x, None, bias))
    assert rows.dtype == torch.float32
    with torch.no_grad():
        whole = layer(x, None, bias, slice(None))[1]
    assert keys.shape == (2, layer.heads, 6, 8 // layer.heads)
    torch.testing.assert_close(rows, whole[:, :, 1:4], rtol=0.05, atol=0.02)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]))


def test_large_scores_stay_finite():
    x = 1e4 * torch.randn(1, 5, 8)
    for outputs, weights in (dot_product_attention(x), scaled_dot_product_attention(x, x, x)):
        assert outputs.isfinite().all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5))
