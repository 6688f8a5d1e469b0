"""The learned query that asks the patches, against its formula."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.model.heads import AttentionPool


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 3),
    P=st.integers(1, 7),
    heads=st.integers(1, 3),
    d=st.integers(1, 4),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_attention_pool_is_the_formula(reference, shake, B, P, heads, d, hidden, seed):
    pool = shake(AttentionPool(heads * d, heads, hidden).double(), 0.5, seed)
    patches = torch.randn(B, P, heads * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        fused = pool(patches)
        found = []
        hook = pool.attend.register_forward_hook(lambda attend, qkv, _: found.append(attend.weights(*qkv[:2])))
        assert torch.equal(pool(patches), fused)
        hook.remove()
    weights = found[0][:, :, 0]
    assert weights.shape == (B, heads, P)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-9)
    state = {f"p.{name}": tensor.numpy() for name, tensor in pool.state_dict().items()}
    for b in range(B):
        y_D, w_HP = reference.attention_pool(patches[b].numpy(), state, "p", heads)
        np.testing.assert_allclose(weights[b], w_HP, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(fused[b], y_D, rtol=1e-8, atol=1e-9)


def test_the_pool_does_not_know_the_order_of_the_patches(shake):
    pool = shake(AttentionPool(12, 3, 24).double(), 0.5)
    patches = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(pool(patches[:, torch.randperm(9)]), pool(patches))
