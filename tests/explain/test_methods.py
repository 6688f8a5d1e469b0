"""Each method against its formula in float64, with gradients by differences, and what follows from the formulas."""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vit.explain.methods import METHODS, Trace, explain, trace
from vit.map_methods import BY_CLASS


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_formulas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference: Any = _load(Path(__file__).with_name("reference.py"))
VARIANTS, build, images_for = reference.VARIANTS, reference.build, reference.images_for
every_model = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
assert_maps = reference.assert_maps
every_method = pytest.mark.parametrize("method", METHODS)
POOLS = {"token": dict(registers=1), "mean": dict(pool="mean", registers=1), "attention": dict(pool="attention")}
every_pool = pytest.mark.parametrize("pool", POOLS)
CLOSE = dict(rtol=1e-5, atol=1e-6)


# against the formulas, on whole models

# small enough that every attention weight is moved on its own
TINY: dict[str, Any] = dict(width=8, mlp_ratio=2.0)
DIFFERENTIATED: dict[str, dict[str, Any]] = {
    "class token": dict(image_size=(8, 12)),
    "three layers, registers": dict(registers=1, depth=3),
    "mean": dict(pool="mean", registers=1, image_size=(8, 12)),
    "attention pool": dict(pool="attention", registers=1, image_size=(12, 8)),
    "rotary, QK norm, LayerScale": dict(position="rotary", qk_norm=True, layer_scale=0.5),
    "post-norm": dict(norm="post", image_size=(4, 12)),
    "post-norm, attention pool": dict(norm="post", pool="attention"),
    "dot product, mean": dict(attention="dot_product", pool="mean", image_size=(4, 12)),
    "one head": dict(attention="scaled_dot_product"),
}
TARGETS = (2, 0)


@cache
def differentiated(name: str) -> tuple[Any, torch.Tensor, Any, list[Any], list[Any], list[Any]]:
    """A model in float64 and two images, with all that the formulas need; gradients of class 2 and of class 0."""
    model = build({**TINY, **DIFFERENTIATED[name]}, torch.float64)
    images, naive = images_for(model), reference.formulas(model)
    pixels = images.numpy()
    return (
        model,
        images,
        naive,
        [naive.run(image) for image in pixels],
        [naive.gradients(image, target) for image, target in zip(pixels, TARGETS, strict=True)],
        [naive.own_gradients(image, target) for image, target in zip(pixels, TARGETS, strict=True)],
    )


every_differentiated = pytest.mark.parametrize("name", DIFFERENTIATED)


@every_differentiated
def test_a_trace_is_what_the_formulas_say(name):
    """Layer l's gradient is by layer l's weights, the one image's by its own target."""
    model, images, naive, passes, gradients, own = differentiated(name)
    t = trace(model, images, torch.tensor(TARGETS))
    assert (t.prefix_tokens, t.grid, t.pool) == (naive.prefix, naive.grid, model.pool)
    assert t.target.tolist() == list(TARGETS)
    assert t.gradients is not None
    assert t.legrad is not None
    close = dict(rtol=1e-5, atol=1e-6)
    for b, done in enumerate(passes):
        by_weights, by_readout = gradients[b]
        np.testing.assert_allclose(t.logits[b], done.logits, **close)
        np.testing.assert_allclose(t.readout[b], done.readout, **close)
        np.testing.assert_allclose(t.tokens[b], done.tokens[-1], **close)
        for layer, w_HNN in enumerate(done.weights):
            np.testing.assert_allclose(t.weights[layer][b], w_HNN, **close)
            np.testing.assert_allclose(t.gradients[layer][b], by_weights[layer], **close)
            positive = np.maximum(own[b][layer], 0)
            mean_N = positive.reshape(-1, positive.shape[-1]).mean(axis=0)
            np.testing.assert_allclose(t.legrad[layer][b], mean_N, **close)
            assert np.abs(by_weights[layer]).max() > 1e-3
        if model.pool == "token":
            assert t.readout_gradients is None
        else:
            assert t.readout_gradients is not None
            own_part = slice(naive.prefix, None)  # what no head reads has no weight to token_map
            np.testing.assert_allclose(
                t.readout_gradients[b][:, own_part] * t.readout[b][:, own_part],
                (by_readout * done.readout)[:, own_part],
                **close,
            )


@every_differentiated
def test_every_method_is_its_formula(name):
    model, images, naive, passes, gradients, own = differentiated(name)
    place = (naive.prefix, naive.grid)
    for method in METHODS:
        maps = explain(model, images, method, target=torch.tensor(TARGETS))
        assert_maps(maps, 2, naive.grid)
        for b, done in enumerate(passes):
            by_weights, by_readout = gradients[b]
            row = reference.read_for_class(done.readout, None if model.pool == "token" else by_readout)
            if method == "raw":
                # the pooling head is the last attention where there is one
                last = reference.fuse(done.weights[-1], "mean")
                read = done.readout.mean(axis=0)
                expected = reference.as_map(read if model.pool == "attention" else read @ last, *place)
            elif method == "rollout":
                expected = reference.rollout(done.weights, done.readout, *place)
            elif method == "gradient_rollout":
                expected = reference.gradient_rollout(done.weights, by_weights, row, *place)
            elif method == "relevance":
                expected = reference.relevance(done.weights, by_weights, row, *place)
            elif method == "legrad":
                expected = reference.legrad(own[b], *place)
            else:
                continue
            np.testing.assert_allclose(maps[b], expected, rtol=1e-4, atol=1e-6, err_msg=method)


@every_differentiated
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_lower_layers_are_as_if_the_head_read_there(name, layer):
    model, images, naive, passes, gradients, own = differentiated(name)
    place, depth = (naive.prefix, naive.grid), len(model.blocks)
    below = layer % depth + 1
    for method in METHODS:
        maps = explain(model, images, method, target=torch.tensor(TARGETS), layer=layer)
        for b, done in enumerate(passes):
            by_weights, by_readout = gradients[b]
            no_gradient = model.pool == "token" or below < depth
            row = reference.read_for_class(done.readout, None if no_gradient else by_readout)
            if method == "raw":
                read = done.readout.mean(axis=0) @ reference.fuse(done.weights[layer], "mean")
                expected = reference.as_map(read, *place)
            elif method == "rollout":
                expected = reference.rollout(done.weights[:below], done.readout, *place)
            elif method == "gradient_rollout":
                expected = reference.gradient_rollout(done.weights[:below], by_weights[:below], row, *place)
            elif method == "relevance":
                expected = reference.relevance(done.weights[:below], by_weights[:below], row, *place)
            elif method == "legrad":
                expected = reference.legrad(own[b][:below], *place)
            else:
                continue
            np.testing.assert_allclose(maps[b], expected, rtol=1e-4, atol=1e-6, err_msg=method)


@pytest.mark.parametrize("name", ["class token", "mean", "attention pool"])
@pytest.mark.parametrize("head", [0, 1, -1])
def test_one_head_alone(name, head):
    model, images, naive, passes, gradients, _ = differentiated(name)
    place = (naive.prefix, naive.grid)
    for method in ("raw", "rollout", "gradient_rollout", "relevance"):
        maps = explain(model, images, method, target=torch.tensor(TARGETS), head=head)
        for b, done in enumerate(passes):
            by_weights, by_readout = gradients[b]
            row = reference.read_for_class(done.readout, None if model.pool == "token" else by_readout)
            one, its = [w[[head]] for w in done.weights], [g[[head]] for g in by_weights]
            if method == "raw" and model.pool == "attention":
                expected = reference.as_map(done.readout[head], *place)
            elif method == "raw":
                expected = reference.as_map(done.readout.mean(axis=0) @ one[-1][0], *place)
            elif method == "rollout":
                expected = reference.rollout(one, done.readout, *place)
            else:
                expected = getattr(reference, method)(one, its, row, *place)
            np.testing.assert_allclose(maps[b], expected, rtol=1e-4, atol=1e-6, err_msg=method)


@every_pool
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.35, 0.9])
def test_fusion_and_discard_on_a_model(pool, fusion, discard):
    model = build(POOLS[pool], torch.float64, image_size=(8, 12))
    images, naive = images_for(model, 3), reference.formulas(model)
    maps = explain(model, images, fusion=fusion, discard=discard)
    assert_maps(maps, 3, (2, 3))
    for b, image in enumerate(images.numpy()):
        done = naive.run(image)
        expected = reference.rollout(done.weights, done.readout, naive.prefix, naive.grid, fusion, discard)
        np.testing.assert_allclose(maps[b], expected, **CLOSE)


# what holds for every method


@every_model
def test_maps_are_shares_of_the_grid(options):
    model = build(options)
    t = trace(model, images_for(model, 3))
    for method, function in METHODS.items():
        maps = function(t)
        assert_maps(maps, 3, model.grid)
        assert not maps.requires_grad
        assert (maps[0] - maps[1]).abs().max() > 1e-4, f"images differ, so do their maps: {method}"


@every_method
@every_pool
def test_a_batch_is_its_images(pool, method):
    model = build(POOLS[pool])
    images, targets = images_for(model, 4), torch.tensor([2, 0, 1, 2])
    maps = explain(model, images, method, target=targets)
    alone = [explain(model, images[b : b + 1], method, target=int(targets[b])) for b in range(4)]
    if method == "random":  # a noise for each place in the batch
        alone[1:] = [maps[b : b + 1] for b in range(1, 4)]
    torch.testing.assert_close(torch.cat(alone), maps, rtol=1e-3, atol=1e-5)


@every_pool
def test_maps_depend_on_the_class_where_they_should(pool):
    model = build(POOLS[pool])
    images = images_for(model)
    for method in METHODS:
        maps = [explain(model, images, method, target=k) for k in range(3)]
        differences = [(a - b).abs().amax((1, 2)).min().item() for a, b in pairwise(maps)]
        assert all((d > 1e-3) == (method in BY_CLASS) for d in differences), (method, differences)


@every_method
def test_without_a_target_it_is_the_predicted_class(method):
    model = build({})
    images = images_for(model, 4)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    assert len(predicted.unique()) > 1
    assert torch.equal(trace(model, images).target, predicted)
    torch.testing.assert_close(explain(model, images, method), explain(model, images, method, target=predicted))


@every_pool
def test_one_trace_serves_every_method(pool):
    model = build(POOLS[pool])
    images = images_for(model)
    t = trace(model, images, 1)
    for method, function in METHODS.items():
        torch.testing.assert_close(function(t), explain(model, images, method, target=1), **CLOSE)


def test_random_is_its_seed():
    model = build({})
    images = images_for(model, 3)
    maps = explain(model, images, "random", seed=1)
    assert torch.equal(maps, explain(model, images, "random", seed=1))
    assert not torch.equal(maps, explain(model, images, "random", seed=2))
    assert len(maps.flatten(1).unique(dim=0)) == 3


@pytest.mark.parametrize("pool", [*POOLS, "post-norm"])
def test_permuting_a_models_heads_changes_no_map(pool):
    """The same function with its heads numbered otherwise."""
    options = dict(norm="post") if pool == "post-norm" else POOLS[pool]
    model, other = build(options, heads=4), build(options, heads=4)
    order = torch.tensor([2, 0, 3, 1])
    columns = torch.arange(16).view(4, 4)[order].flatten()
    with torch.no_grad():
        for block in other.blocks:
            for part in (block.attn.qkv.weight, block.attn.qkv.bias):
                part.copy_(part.view(3, 16, -1)[:, columns].reshape(part.shape))
            block.attn.proj.weight.copy_(block.attn.proj.weight[:, columns])
    images = images_for(model)
    for method in METHODS:
        torch.testing.assert_close(
            explain(other, images, method, target=1), explain(model, images, method, target=1), rtol=1e-3, atol=1e-5
        )


# a trace by hand


def by_hand(scale: float = 1.0, gradient: float | None = None, pool: str = "token", L: int = 2) -> Trace:
    """Random weights and gradients of a given size, of four patches behind a class token."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 3, 5, 5, generator=generator).softmax(-1) for _ in range(L)]
    gradients = [scale * torch.randn(2, 3, 5, 5, generator=generator) for _ in range(L)]
    if gradient is not None:
        gradients = [torch.full_like(each, gradient) for each in gradients]
    readout = torch.tensor([[[1.0, 0, 0, 0, 0]]] * 2)
    by_readout = None
    if pool == "mean":
        readout = torch.tensor([[[0.0, 0.25, 0.25, 0.25, 0.25]]] * 2)
        by_readout = scale * torch.randn(2, 1, 5, generator=generator)
        if gradient is not None:
            by_readout = torch.full_like(by_readout, gradient)
    return Trace(
        logits=torch.zeros(2, 3),
        target=torch.zeros(2, dtype=torch.int64),
        weights=weights,
        readout=readout,
        tokens=torch.zeros(2, 5, 4),
        prefix_tokens=1,
        grid=(2, 2),
        pool=pool,
        gradients=gradients,
        readout_gradients=by_readout,
        legrad=[g.clamp(min=0).mean((1, 2)) for g in gradients],
    )


by_class = pytest.mark.parametrize("method", sorted(BY_CLASS))


@by_class
@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("gradient", [0.0, -0.0, -1.0, -1e-44])
def test_where_nothing_speaks_for_a_class_every_patch_is_alike(method, pool, gradient):
    maps = METHODS[method](by_hand(gradient=gradient, pool=pool))
    torch.testing.assert_close(maps, torch.full((2, 2, 2), 0.25))


@by_class
@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-39, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e15])
def test_maps_are_finite_for_gradients_of_any_size(method, pool, scale):
    """Also for those that are hardly numbers any more (denormal)."""
    assert_maps(METHODS[method](by_hand(scale, pool=pool)), 2, (2, 2))


@by_class
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6])
def test_small_gradients_still_make_a_map(method, scale):
    """Where each is small, one layer's relevance is what its gradients say, whatever their unit."""
    small, smaller = (METHODS[method](by_hand(scale * step, L=1)) for step in (1, 1e-3))
    torch.testing.assert_close(small, smaller, rtol=1e-3, atol=1e-6)
    assert (small - 0.25).abs().max() > 0.01


@by_class
def test_gradients_belong_to_their_layers(method):
    """Layers in reverse order are another map, so a wrong pairing would be seen."""
    t, reverse = by_hand(), by_hand()
    assert reverse.gradients is not None
    reverse.gradients = reverse.gradients[::-1]
    same = (METHODS[method](t) - METHODS[method](reverse)).abs().max() < 1e-3
    assert same == (method == "legrad")


@pytest.mark.parametrize("method", ["gradient_rollout", "relevance"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_methods_of_a_trace_are_their_formulas(method, pool):
    t = by_hand(3.0, pool=pool)
    assert t.gradients is not None
    maps = METHODS[method](t)
    for b in range(2):
        weights, gradients = ([each[b].double().numpy() for each in group] for group in (t.weights, t.gradients))
        by_readout = None if t.readout_gradients is None else t.readout_gradients[b].double().numpy()
        row = reference.read_for_class(t.readout[b].double().numpy(), by_readout)
        expected = getattr(reference, method)(weights, gradients, row, 1, (2, 2))
        np.testing.assert_allclose(maps[b], expected, rtol=1e-4, atol=1e-6)
