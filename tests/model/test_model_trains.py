"""Every option trains: gradients reach every parameter, and a few steps lower the loss on a task to be learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vit.model import VisionTransformer

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention: one head": dict(attention="scaled_dot_product"),
    "attention: dot product": dict(attention="dot_product"),
    "attention: differential": dict(attention="differential"),
    "norm: post": dict(norm="post"),
    "norm: post, dot product": dict(norm="post", attention="dot_product"),
    "position: sincos": dict(position="sincos"),
    "position: rotary": dict(position="rotary"),
    "position: none": dict(position="none"),
    "position: bare prefix": dict(position_prefix=False, registers=1),
    "pool: mean": dict(pool="mean"),
    "pool: mean, class token": dict(pool="mean", class_token=True),
    "pool: attention": dict(pool="attention"),
    "pool: attention, one head": dict(pool="attention", attention="scaled_dot_product"),
    "pool: attention, dot product": dict(pool="attention", attention="dot_product"),
    "registers": dict(registers=3),
    "layer scale": dict(layer_scale=0.1),
    "QK norm": dict(qk_norm=True),
    "no biases in qkv": dict(qkv_bias=False),
    "dropout": dict(dropout=0.1),
    "attention dropout": dict(attention_dropout=0.1),
    "attention dropout, dot product": dict(attention_dropout=0.1, attention="dot_product"),
    "stochastic depth": dict(drop_path=0.2),
    "patch dropout": dict(patch_dropout=0.25),
    "patch dropout, rotary": dict(patch_dropout=0.25, position="rotary"),
    "patch dropout, attention pool": dict(patch_dropout=0.25, pool="attention"),
    "init: xavier": dict(init="xavier"),
    "init: mimetic": dict(init="mimetic"),
    "not square": dict(image_size=(8, 16), patch_size=(4, 8)),
    "MLP ratio": dict(mlp_ratio=1.5),
    "everything": dict(
        norm="post", position="rotary", pool="attention", class_token=True, registers=2, layer_scale=0.5, qk_norm=True,
        dropout=0.05, attention_dropout=0.05, drop_path=0.05, patch_dropout=0.1, init="xavier",
    ),
}  # fmt: skip


def task(model: VisionTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty images of noise, each class brighter in its own channel: easy, and impossible without looking."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    images = torch.randn(40, 3, *model.image_size, generator=generator)
    images[torch.arange(40), labels] += 1.0
    return images, labels


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_reach_every_parameter_and_the_loss_falls(options):
    torch.manual_seed(3)
    defaults = dict(image_size=8, patch_size=4, num_classes=3, width=32, depth=2, heads=2)
    model = VisionTransformer(**{**defaults, **options})
    images, labels = task(model)

    def loss_now() -> float:
        model.eval()
        with torch.no_grad():
            return F.cross_entropy(model(images), labels).item()

    before = loss_now()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=3e-3)
    for step in range(25):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        if step == 0:
            for name, parameter in trainable.items():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
            still = [name for name, p in trainable.items() if not p.grad.any()]
            assert not still, still
        optimizer.step()
    assert loss_now() < 0.7 * before


def test_training_is_the_same_for_the_same_seed():
    def trained() -> torch.Tensor:
        torch.manual_seed(11)
        model = VisionTransformer(
            image_size=8, patch_size=4, num_classes=3, width=16, depth=2, heads=2,
            dropout=0.1, drop_path=0.2, patch_dropout=0.3, attention_dropout=0.1,
        )  # fmt: skip
        images, labels = task(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(), trained())


def test_checkpointed_gradients_are_the_same(shake):
    """Blocks have no hidden state, so activation checkpointing works on them from outside."""
    from torch.utils.checkpoint import checkpoint

    model = shake(VisionTransformer(image_size=8, patch_size=4, num_classes=3, width=16, depth=2, heads=2), 0.1)
    images, labels = task(model)
    F.cross_entropy(model(images), labels).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x_BND, rotary = model.embed(images)
    for block in model.blocks:
        x_BND = checkpoint(block, x_BND, rotary, use_reentrant=False)
    F.cross_entropy(model.forward_head(model.norm(x_BND)), labels).backward()
    for expected, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)
