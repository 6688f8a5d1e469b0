"""Layers that learn at their time: the rule against a list written out, and tensors that stay equal to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit.model import VisionTransformer
from vit.training.freezing import Freezing, count_trainable, lowest_layer
from vit.training.optim import build_optimizer, layer_index

DEPTH = 3


def model(**options):
    torch.manual_seed(0)
    return VisionTransformer(image_size=8, patch_size=4, num_classes=3, width=16, depth=DEPTH, heads=2, **options)


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "lowest"),
    [
        (0, 0.0, [0, 0, 0, 0, 0]),
        (1, 0.0, [2, 2, 2, 2, 2]),
        (3, 0.0, [4, 4, 4, 4, 4]),
        ("all", 0.0, [4, 4, 4, 4, 4]),
        # four layers wait (three blocks and the embedding): one comes free at each quarter of the time
        (0, 1.0, [4, 3, 2, 1, 0]),
        (0, 0.5, [4, 2, 0, 0, 0]),
        # two wait: blocks 2 and 1
        (1, 1.0, [4, 4, 3, 3, 2]),
        ("all", 1.0, [4, 4, 4, 4, 4]),
    ],
)
def test_which_layers_learn_at_each_quarter(freeze, unfreeze, lowest):
    found = [lowest_layer(k / 4, depth=DEPTH, freeze=freeze, unfreeze=unfreeze) for k in range(5)]
    assert found == lowest


@given(
    depth=st.integers(1, 48),
    unfreeze=st.floats(0.01, 1),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=5).map(sorted),
    data=st.data(),
)
def test_layers_only_come_free_and_all_that_may_are_free_in_the_end(depth, unfreeze, shares, data):
    freeze = data.draw(st.integers(0, depth) | st.just("all"))
    found = [lowest_layer(share, depth=depth, freeze=freeze, unfreeze=unfreeze) for share in shares]
    assert found == sorted(found, reverse=True)
    assert lowest_layer(0.0, depth=depth, freeze=freeze, unfreeze=unfreeze) == depth + 1
    always = lowest_layer(1.0, depth=depth, freeze=freeze, unfreeze=0.0)
    assert lowest_layer(unfreeze, depth=depth, freeze=freeze, unfreeze=unfreeze) == always
    assert min(found) >= always


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "sgd"])
def test_a_frozen_layer_stays_as_it_is_to_the_bit_and_then_moves(optimiser):
    net = model()
    freezing = Freezing(net, freeze=1, unfreeze=1.0)
    optim = build_optimizer(net, name=optimiser, lr=0.01, weight_decay=0.1)
    held = sum(p.numel() for group in optim.param_groups for p in group["params"])
    assert held == count_trainable(net) < sum(p.numel() for p in net.parameters())
    for progress, lowest in ((0.0, 4), (0.5, 3), (1.0, 2)):
        assert freezing.update(progress) == lowest
        assert freezing.update(progress) is None
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for _ in range(2):
            optim.zero_grad()
            net(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optim.step()
        for name, parameter in net.named_parameters():
            frozen = layer_index(name, DEPTH) < lowest
            assert frozen is torch.equal(parameter, before[name]), name
            assert not frozen or parameter.grad is None


def test_fixed_positions_are_never_learned():
    net = model(position="sincos")
    Freezing(net, unfreeze=1.0).update(1.0)
    assert not net.pos_embed.requires_grad
    assert net.patch_embed.proj.weight.requires_grad


def test_names_belong_to_the_layers_that_they_are_in():
    net = model(embed_norm="tokens", distillation_token=True, registers=2, layer_scale=1e-5)
    found = {name: layer_index(name, DEPTH) for name, _ in net.named_parameters()}
    embedding = {"cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.weight", "patch_embed.proj.bias"}
    assert {name for name, layer in found.items() if layer == 0} >= embedding
    assert found["blocks.2.ls1.gamma"] == 3
    assert {found[name] for name in ("norm.weight", "head.weight", "head_dist.bias")} == {DEPTH + 1}
