"""Differential attention: recorded weights are differences, and every map reads them as what it claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vit
from vit.explain import METHODS, explain, record_attention
from vit.explain.attention_tab import summarise
from vit.explain.methods import trace
from vit.model import VisionTransformer

SMALL: dict[str, Any] = dict(
    image_size=(8, 12), patch_size=2, num_classes=5, width=16, depth=3, heads=2, attention="differential"
)
POOLS: dict[str, dict[str, Any]] = {
    "token": dict(registers=1),
    "mean": dict(pool="mean", position="rotary"),
    "attention pool": dict(pool="attention"),
    "merge": dict(reduction="merge", reduction_schedule=[5, 3, 4]),
    "keep": dict(reduction="keep", reduction_schedule=[7, 0, 5]),
}
every_model = pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)


def build(options: dict[str, Any]) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.1 if "lambda" in name else 0.5) * torch.randn(parameter.shape)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@every_model
def test_logits_do_not_change_and_weights_are_differences(options):
    model = build(options)
    with torch.no_grad():
        expected = model(images())
        with record_attention(model) as record:
            assert torch.equal(model(images()), expected)
    with record_attention(model, gradients=True) as whole:
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    assert record.weights.signed
    for ours, theirs in zip(record.weights, whole.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours < 0).any()
        assert ours.shape[1] == 2


@every_model
def test_every_method_gives_maps(options):
    model = build(options)
    for method in METHODS:
        maps = explain(model, images(), method)
        assert maps.shape == (2, 4, 6)
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))
    _, probes, _ = summarise(model, images(), [0, None])
    assert all((probe["rows"] >= 0).all() for probe in probes)


def test_rollout_takes_the_positive_part_by_row():
    model = build(POOLS["token"])
    with torch.no_grad(), record_attention(model) as record:
        model(images())
    positive = [each.clamp(min=0) / each.clamp(min=0).sum(dim=-1, keepdim=True) for each in record.weights]
    given = dict(prefix_tokens=model.num_prefix_tokens, grid=model.grid)
    maps = vit.rollout(record.weights, **given)
    torch.testing.assert_close(maps, vit.rollout(positive, **given))
    torch.testing.assert_close(maps, explain(model, images()))


def test_gradients_are_of_the_differences():
    """The sum of A dA over all entries is what the score changes by when A grows: a check by a step along A."""
    model = build(POOLS["token"])
    found = trace(model, images(), target=1, methods=["relevance"])
    assert found.gradients is not None
    assert found.signed_weights is not None
    assert any((each < 0).any() for each in found.signed_weights)
    changed, step = [], 1e-3
    for sign in (1, -1):
        hook = model.blocks[2].attn.attend.register_forward_hook(lambda m, i, y, sign=sign: (1 + sign * step) * y)  # type: ignore[union-attr]
        with torch.no_grad():
            changed.append(model(images())[:, 1])
        hook.remove()
    wanted = (changed[0] - changed[1]) / (2 * step)
    found_sum = (found.signed_weights[2] * found.gradients[2]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found_sum, wanted, rtol=0.05, atol=0.02)
