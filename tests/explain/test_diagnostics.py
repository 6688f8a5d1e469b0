"""Numbers about attention, against loops in float64 and against what a change of the model really does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vit.explain.diagnostics import OUTLIER, attention_distance, entropy, head_importance, patch_mass, sinks
from vit.explain.methods import Trace, trace
from vit.model import VisionTransformer


@pytest.fixture(scope="module", params=["token", "mean", "attention"])
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = VisionTransformer(
            image_size=(8, 12), patch_size=4, num_classes=4, width=16, depth=2, heads=2, pool=request.param, registers=1
        )
        for parameter in model.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
        return model.eval().double()


@pytest.fixture(scope="module")
def traced(model):
    images = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return trace(model, images)


def test_distance_is_the_mean_over_patches_of_the_attended_distance(traced):
    found = attention_distance(traced.weights, traced.prefix_tokens, traced.grid)
    places = [(r, c) for r in range(2) for c in range(3)]
    for layer, weights in enumerate(traced.weights):
        for head in range(2):
            total = []
            for b in range(3):
                a = weights[b, head].double().numpy()[traced.prefix_tokens :, traced.prefix_tokens :]
                for i, p in enumerate(places):
                    total.append(sum(a[i, j] * math.dist(p, q) for j, q in enumerate(places)) / a[i].sum())
            assert float(found[layer, head]) == pytest.approx(np.mean(total), rel=1e-5)


def test_distance_of_attention_to_oneself_is_0_and_of_even_attention_the_mean_distance():
    myself = torch.eye(6)[None, None]
    even = torch.full((1, 1, 6, 6), 1 / 6)
    assert float(attention_distance([myself], 0, (2, 3))[0, 0]) == pytest.approx(0, abs=1e-6)
    places = [(r, c) for r in range(2) for c in range(3)]
    mean = np.mean([[math.dist(p, q) for q in places] for p in places])
    assert float(attention_distance([even], 0, (2, 3))[0, 0]) == pytest.approx(mean, rel=1e-5)


def test_entropy_is_0_for_one_token_and_log_n_for_all():
    one, even = torch.eye(5)[None, None], torch.full((1, 1, 5, 5), 0.2)
    assert entropy([one, even]).flatten().tolist() == pytest.approx([0, math.log(5)], abs=1e-6)


def test_entropy_is_the_definition(traced):
    found = entropy(traced.weights)
    for layer, weights in enumerate(traced.weights):
        a = weights.double().numpy()
        wanted = -(a * np.log(a)).sum(-1).mean(axis=(0, 2))
        assert found[layer].double().numpy() == pytest.approx(wanted, rel=1e-5)


def test_patch_mass_is_what_the_readout_sends_to_patches(traced):
    found = patch_mass(traced)
    for layer, weights in enumerate(traced.weights):
        for head in range(2):
            shares = []
            for b in range(3):
                row = traced.readout[b].mean(dim=0).double().numpy() @ weights[b, head].double().numpy()
                shares.append(row[traced.prefix_tokens :].sum())
            assert float(found[layer, head]) == pytest.approx(np.mean(shares), rel=1e-5)


def test_importance_is_how_the_score_answers_to_a_gate_on_the_head(model, traced):
    """A head's output is linear in its values: scaling their rows of `qkv` by 1 ± e is a gate on the head."""
    images = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, e, width, d = head_importance(traced), 1e-5, 16, 8
    for layer in range(2):
        qkv = model.blocks[layer].attn.qkv
        for head in range(2):
            rows = slice(2 * width + head * d, 2 * width + (head + 1) * d)
            scores = []
            for sign in (1, -1):
                kept = qkv.weight.data[rows].clone(), qkv.bias.data[rows].clone()
                qkv.weight.data[rows] *= 1 + sign * e
                qkv.bias.data[rows] *= 1 + sign * e
                with torch.no_grad():
                    scores.append(model(images).gather(1, traced.target[:, None])[:, 0])
                qkv.weight.data[rows], qkv.bias.data[rows] = kept
            change = (scores[0] - scores[1]) / (2 * e)
            assert float(found[layer, head]) == pytest.approx(float(change.abs().mean()), rel=1e-3, abs=1e-6)


def test_importance_needs_gradients(model):
    plain = trace(model, torch.zeros(1, 3, 8, 12, dtype=torch.float64), methods=["raw"])
    with pytest.raises(ValueError, match="gradients"):
        head_importance(plain)


def test_sinks_see_a_planted_one():
    weights = torch.full((2, 1, 5, 5), 0.2)
    weights[1, 0, 0] = torch.tensor([0.2, 0.62, 0.06, 0.06, 0.06])  # class token, then four patches
    tokens = torch.ones(2, 5, 3)
    tokens[1, 2] *= 2 * OUTLIER
    tokens[:, 0] *= 100  # a long class token is none
    readout = torch.zeros(2, 1, 5)
    readout[:, :, 0] = 1
    planted = Trace(torch.zeros(2, 2), torch.zeros(2), [weights], readout, tokens, 1, (2, 2), "token")
    mass, outliers = sinks(planted)
    assert mass.tolist() == pytest.approx([0.25, 0.775])
    assert outliers.tolist() == pytest.approx([0, 0.25])
