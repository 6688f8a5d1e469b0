"""Each method against its formula in float64, with gradients by differences, and what follows from the formulas."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vit
from vit.errors import VitError
from vit.explain.methods import CLASS_SPECIFIC, METHODS, Trace, explain, rollout, rollout_by_depth, trace
from vit.explain.record import record_attention


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
every_method = pytest.mark.parametrize("method", METHODS)
POOLS = {"token": dict(registers=1), "mean": dict(pool="mean", registers=1), "attention": dict(pool="attention")}
every_pool = pytest.mark.parametrize("pool", POOLS)
CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def assert_maps(maps: torch.Tensor, B: int, grid: tuple[int, int]) -> None:
    assert maps.shape == (B, *grid)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(B))


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
            own_part = slice(naive.prefix, None)  # what no head reads has no weight to move
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


# rollout on weights alone


def draw_weights(seed: int, L: int, B: int, H: int, N: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(L, B, H, N, N, generator=generator, dtype=torch.float64)
    return list(scores.softmax(-1))


sizes = dict(
    seed=st.integers(0, 2**31),
    L=st.integers(1, 4),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    prefix=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)


@settings(deadline=None, max_examples=60)
@given(
    **sizes,
    fusion=st.sampled_from(["mean", "max", "min"]),
    discard=st.one_of(st.just(0.0), st.floats(0, 0.99)),
    given_readout=st.booleans(),
)
def test_rollout_is_its_formula(seed, L, B, H, prefix, grid, fusion, discard, given_readout):
    """Of every image of a batch, not only the first; and a class token's column is never discarded."""
    N = prefix + grid[0] * grid[1]
    weights = draw_weights(seed, L, B, H, N)
    readout = None
    by_default = torch.zeros(B, 1, N, dtype=torch.float64)
    by_default[:, 0, slice(0, 1) if prefix else slice(None)] = 1 if prefix else 1 / N
    if given_readout:
        readout = draw_weights(seed + 1, 1, B, 2, N)[0][:, :, 0]
    maps = rollout(weights, prefix, grid, readout, fusion=fusion, discard=discard)
    assert_maps(maps, B, grid)
    for b in range(B):
        rows = (by_default if readout is None else readout)[b].numpy()
        expected = reference.rollout([w[b].numpy() for w in weights], rows, prefix, grid, fusion, discard)
        np.testing.assert_allclose(maps[b], expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(**sizes, fusion=st.sampled_from(["mean", "max", "min"]), discard=st.floats(0, 0.99))
def test_heads_have_no_order_and_images_no_company(seed, L, B, H, prefix, grid, fusion, discard):
    weights = draw_weights(seed, L, B, H, prefix + grid[0] * grid[1])
    maps = rollout(weights, prefix, grid, fusion=fusion, discard=discard)
    order = torch.randperm(H, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        rollout([w[:, order] for w in weights], prefix, grid, fusion=fusion, discard=discard), maps
    )
    alone = [rollout([w[b : b + 1] for w in weights], prefix, grid, fusion=fusion, discard=discard) for b in range(B)]
    torch.testing.assert_close(torch.cat(alone), maps)


@settings(deadline=None, max_examples=40)
@given(**sizes, fusion=st.sampled_from(["mean", "max", "min"]))
def test_uniform_attention_gives_a_uniform_map(seed, L, B, H, prefix, grid, fusion):
    N = prefix + grid[0] * grid[1]
    weights = [torch.full((B, H, N, N), 1 / N) for _ in range(L)]
    maps = rollout(weights, prefix, grid, fusion=fusion)
    torch.testing.assert_close(maps, torch.full((B, *grid), 1 / (grid[0] * grid[1])))


@settings(deadline=None, max_examples=40)
@given(**sizes, fusion=st.sampled_from(["mean", "max", "min"]), place=st.integers(0, 8))
def test_identity_attention_moves_nothing(seed, L, B, H, prefix, grid, fusion, place):
    """A readout of one patch stays there; of a class token, which saw no patch, nothing is left to show: all alike."""
    P = grid[0] * grid[1]
    weights = [torch.eye(prefix + P).expand(B, H, -1, -1)] * L
    readout = torch.zeros(B, prefix + P)
    readout[:, prefix + place % P] = 1
    maps = rollout(weights, prefix, grid, readout, fusion=fusion)
    expected = torch.zeros(B, P)
    expected[:, place % P] = 1
    torch.testing.assert_close(maps, expected.view(B, *grid))
    torch.testing.assert_close(rollout(weights, prefix, grid, fusion=fusion), torch.full((B, *grid), 1 / P))


def test_attention_moves_from_the_last_layer_down():
    """Layers do not commute: the head's token reads patch 1 in the last layer, and patch 1 had read patch 2 before."""
    first, last = torch.eye(4).repeat(2, 1, 1)
    first[2] = torch.tensor([0.0, 0, 0, 1])  # the patch at place 1 takes all from the patch at place 2
    last[0] = torch.tensor([0.0, 0, 1, 0])
    weights = [first[None, None], last[None, None]]
    torch.testing.assert_close(rollout(weights, 1, (1, 3)), torch.tensor([[[0.0, 0.5, 0.5]]]))
    torch.testing.assert_close(rollout(weights[::-1], 1, (1, 3)), torch.tensor([[[0.0, 1.0, 0.0]]]))


def test_discarding_keeps_what_is_largest_of_each_image():
    """The second image's largest weights are smaller than all of the first's, and are kept all the same."""
    weights = torch.zeros(2, 1, 3, 3)
    weights[0, 0] = torch.tensor([[0.02, 0.58, 0.40], [0.02, 0.58, 0.40], [0.02, 0.58, 0.40]])
    weights[1, 0] = torch.tensor([[0.80, 0.08, 0.12], [0.80, 0.08, 0.12], [0.80, 0.08, 0.12]])
    maps = rollout([weights], 1, (1, 2), discard=0.5)
    torch.testing.assert_close(maps, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))


def test_columns_of_prefix_tokens_are_never_discarded():
    """The smallest weights are those to the class token and the register, on which the patches' shares hang."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 1, 6, 6, generator=generator, dtype=torch.float64)
    weights[..., :2] *= 1e-3
    weights = weights / weights.sum(-1, keepdim=True)
    readout = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    row_N = readout[0].numpy()
    maps = rollout([weights, weights], 2, (2, 2), readout, discard=0.75)
    kept = weights.clone()[0, 0].numpy()
    patches = kept[:, 2:]
    patches[patches < np.sort(patches.ravel())[18]] = 0
    assert (kept[:, :2] > 0).all()
    mixed = reference.with_residual(kept)
    np.testing.assert_allclose(maps[0], reference.as_map(row_N @ mixed @ mixed, 2, (2, 2)), **CLOSE)


def test_the_contract():
    """As `import vit` promises it."""
    model = build(dict(registers=2), image_size=(8, 12))
    images = images_for(model, 3)
    with torch.no_grad(), vit.record_attention(model) as record:
        model(images)
    maps = vit.rollout(record.weights, prefix_tokens=model.num_prefix_tokens, grid=model.grid)
    assert_maps(maps, 3, (2, 3))
    torch.testing.assert_close(maps, explain(model, images))


@every_model
def test_rollout_of_a_record_is_the_models(options):
    """With the readout that was recorded; also from a recording in the graph, and as one tensor."""
    model = build(options)
    images = images_for(model)
    maps = explain(model, images, "rollout")
    for gradients in (False, True):
        with record_attention(model, gradients=gradients) as record:
            model(images)
        again = rollout(record.weights, record.prefix_tokens, record.grid, record.readout)
        torch.testing.assert_close(again.detach(), maps, **CLOSE)
    together = torch.stack(record.weights).detach()
    again = rollout(together, record.prefix_tokens, record.grid, record.readout.detach())  # type: ignore[arg-type]
    torch.testing.assert_close(again, maps, **CLOSE)


def test_a_readout_may_have_another_precision():
    weights = draw_weights(0, 2, 2, 2, 5)
    single = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    expected = rollout(weights, 1, (2, 2), single.double())
    torch.testing.assert_close(rollout(weights, 1, (2, 2), single), expected)
    whole = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    torch.testing.assert_close(rollout(weights, 1, (2, 2), whole), rollout(weights, 1, (2, 2), whole.double()))


@every_pool
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_by_depth_is_the_rollout_of_each_depth(pool, fusion):
    model = build(POOLS[pool], depth=3)
    images = images_for(model)
    maps = rollout_by_depth(trace(model, images, methods=()), fusion=fusion, discard=0.2)
    assert maps.shape == (3, 2, 2, 2)
    for layer in range(3):
        torch.testing.assert_close(
            maps[layer], explain(model, images, layer=layer, fusion=fusion, discard=0.2), **CLOSE
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(weights=[]), "no weights"),
        (dict(weights=[torch.rand(2, 5, 5)]), "B, H, N, N"),
        (dict(weights=[torch.rand(2, 2, 1, 5)]), "B, H, N, N"),
        (dict(weights=[torch.rand(2, 2, 5, 5), torch.rand(2, 2, 4, 4)]), "B, H, N, N"),
        (dict(weights=[torch.rand(2, 2, 5, 5), torch.rand(1, 2, 5, 5)]), "B, H, N, N"),
        (dict(grid=(2, 3)), "4 patch tokens do not make a grid of 2 x 3"),
        (dict(prefix_tokens=0), "5 patch tokens"),
        (dict(readout=torch.ones(2, 4)), "each of 5 tokens of 2 images"),
        (dict(readout=torch.ones(5)), "each of 5 tokens of 2 images"),
        (dict(readout=torch.ones(3, 1, 5)), "each of 5 tokens of 2 images"),
        (dict(fusion="sum"), "no 'sum'; choose from mean, max, min"),
        (dict(fusion="maxx"), "did you mean 'max'"),
        (dict(discard=1.0), "from 0 to under 1, not 1.0"),
        (dict(discard=-0.1), "from 0 to under 1"),
        (dict(discard=float("nan")), "from 0 to under 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_said(change, says):
    arguments: dict[str, Any] = dict(weights=[torch.rand(2, 2, 5, 5)], prefix_tokens=1, grid=(2, 2))
    with pytest.raises(VitError, match=says):
        rollout(**{**arguments, **change})


def test_a_recording_of_single_rows_is_no_rollout():
    model = build({})
    with torch.no_grad(), record_attention(model, rows="readout") as record:
        model(images_for(model))
    with pytest.raises(VitError, match="rows"):
        rollout(record.weights, model.num_prefix_tokens, model.grid)


def test_patches_dropped_in_training_are_no_grid():
    model = build(dict(patch_dropout=0.5), image_size=16).train()
    with torch.no_grad(), record_attention(model) as record:
        model(images_for(model))
    with pytest.raises(VitError, match="Record in evaluation mode"):
        rollout(record.weights, model.num_prefix_tokens, model.grid)


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
        assert all((d > 1e-3) == (method in CLASS_SPECIFIC) for d in differences), (method, differences)


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


by_class = pytest.mark.parametrize("method", sorted(CLASS_SPECIFIC))


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


# a model stays as it was


@pytest.mark.parametrize("training", [False, True])
@every_pool
def test_tracing_touches_nothing(pool, training):
    """Gradients, flags, modes, the generators and the next step are as if nobody had looked."""
    model = build({**POOLS[pool], "dropout": 0.2, "patch_dropout": 0.5, "attention_dropout": 0.2}).train(training)
    model.blocks[0].train(not training)
    model.head.bias.requires_grad_(False)
    images = images_for(model)
    model(images).sum().backward()
    modes = [module.training for module in model.modules()]
    parameters = {n: (p.requires_grad, p._version, p.clone(), p.grad) for n, p in model.named_parameters()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    versions, generator = images._version, torch.get_rng_state()
    for method in METHODS:
        explain(model, images, method)
    with pytest.raises(VitError):
        explain(model, images, "relevance", target=99)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert not images.requires_grad
    assert images._version == versions
    for name, p in model.named_parameters():
        flag, version, value, gradient = parameters[name]
        assert p.requires_grad == flag
        assert p._version == version
        assert torch.equal(p, value)
        assert p.grad is gradient
        if gradient is not None:
            assert torch.equal(gradient, grads[name])
    assert "pool_tokens" not in model.__dict__
    assert all("forward" not in block.attn.__dict__ for block in model.blocks)
    assert not any(block._forward_hooks for block in model.blocks)


def test_parameters_get_no_gradient():
    model = build(dict(pool="attention"))
    trace(model, images_for(model))
    assert all(p.grad is None for p in model.parameters())


def test_maps_in_training_mode_are_those_of_evaluation():
    model = build(dict(dropout=0.5, patch_dropout=0.5, attention_dropout=0.5, drop_path=0.5))
    images = images_for(model)
    expected = {method: explain(model, images, method, target=1) for method in METHODS}
    model.train()
    for method, maps in expected.items():
        assert torch.equal(explain(model, images, method, target=1), maps)


@every_pool
def test_a_frozen_model_is_traced_the_same(pool):
    model = build(POOLS[pool])
    images = images_for(model)
    expected = trace(model, images, 1)
    frozen = trace(model.requires_grad_(False), images, 1)
    assert expected.gradients is not None
    assert frozen.gradients is not None
    for ours, theirs in zip(frozen.gradients, expected.gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@every_pool
def test_it_works_in_every_context(pool, around):
    model = build(POOLS[pool])
    images = images_for(model)
    expected = {method: explain(model, images, method, target=1) for method in METHODS}
    with around():
        own = images_for(model)  # images, too, may come from there
        for method, maps in expected.items():
            assert torch.equal(explain(model, own, method, target=1), maps)
        t = trace(model, own)
    assert t.logits.dtype == torch.float32


def test_images_in_a_graph_stay_out_of_it():
    model = build({})
    images = images_for(model).requires_grad_()
    maps = explain(model, images * 1, "relevance")
    assert not maps.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_pool
def test_any_precision_gives_maps(pool, dtype):
    model = build(POOLS[pool])
    images = images_for(model)
    expected = {method: explain(model, images, method, target=1) for method in METHODS}
    model.to(dtype)
    t = trace(model, images.to(dtype), 1)
    assert t.gradients is not None
    assert all(g.dtype == w.dtype != torch.bfloat16 for g, w in zip(t.gradients, t.weights, strict=True))
    assert t.readout.dtype == t.weights[0].dtype
    for method, maps in expected.items():
        found = explain(model, images.to(dtype), method, target=1)
        assert_maps(found, 2, model.grid)
        torch.testing.assert_close(found, maps, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 1e-5)


@every_pool
def test_a_trace_holds_no_graph(pool):
    model = build(POOLS[pool])
    t = trace(model, images_for(model))
    assert t.gradients is not None
    assert t.legrad is not None
    parts = [t.logits, t.readout, t.tokens, *t.weights, *t.gradients, *t.legrad]
    parts += [] if t.readout_gradients is None else [t.readout_gradients]
    assert not any(part.requires_grad for part in parts)


def test_a_trace_has_what_its_methods_need():
    model = build({})
    images = images_for(model)
    plain = trace(model, images, methods=["rollout", "raw"])
    assert plain.gradients is plain.legrad is None
    some = trace(model, images, methods=["relevance"])
    assert some.gradients is not None
    assert some.legrad is None
    every = trace(model, images)
    for t in (plain, some):
        torch.testing.assert_close(METHODS["rollout"](t), METHODS["rollout"](every), **CLOSE)
        torch.testing.assert_close(t.logits, every.logits, **CLOSE)


def test_recorded_maps_inside_a_recording():
    """Explaining what one is recording disturbs neither."""
    model = build(dict(pool="mean"))
    images = images_for(model)
    expected = explain(model, images, "relevance", target=1)
    with record_attention(model) as record:
        logits = model(images)
        kept = [*record.weights, record.readout]
        assert torch.equal(explain(model, images, "relevance", target=1), expected)
        torch.testing.assert_close([*record.weights, record.readout], kept)
        assert torch.equal(model(images), logits)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)


def test_a_wrapped_and_a_compiled_model_are_explained():
    model = build({})
    images = images_for(model)
    compiled = torch.compile(model, backend="eager")
    for method in METHODS:
        expected = explain(model, images, method)
        assert torch.equal(explain(Wrapper(model).train(), images, method), expected)
        assert torch.equal(explain(compiled, images, method), expected)


# mistakes


def test_a_method_that_does_not_exist():
    model = build({})
    with pytest.raises(VitError, match="did you mean 'relevance'"):
        explain(model, images_for(model), "relevence")
    with pytest.raises(VitError, match="did you mean 'relevance'"):
        trace(model, images_for(model), methods=["rollout", "relevence"])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (3, "classes 0 to 2, not 3"),
        (-1, "classes 0 to 2, not -1"),
        (torch.tensor([0, 7]), "classes 0 to 2, not 7"),
        (torch.tensor([0, 1, 2]), r"one for each of 2 images, not shape \(3,\)"),
        (torch.tensor([[0], [1]]), r"one for each of 2 images, not shape \(2, 1\)"),
        (1.0, "whole number"),
        (torch.tensor([0.0, 1.0]), "whole number"),
        (torch.tensor([True, False]), "whole number"),
    ],
)
@pytest.mark.parametrize("method", ["rollout", "relevance"])
def test_a_target_that_does_not_exist(target, says, method):
    model = build({})
    with pytest.raises(VitError, match=says):
        explain(model, images_for(model), method, target=target)


def test_targets_of_any_whole_type():
    model = build({})
    images = images_for(model)
    expected = explain(model, images, "relevance", target=torch.tensor([2, 2]))
    for target in (2, torch.tensor(2), torch.tensor([2, 2], dtype=torch.uint8), np.int64(2), [2, 2]):
        assert torch.equal(explain(model, images, "relevance", target=target), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "random"])
def test_a_layer_that_does_not_exist(method):
    model = build({})
    with pytest.raises(VitError, match="layers 0 to 1"):
        explain(model, images_for(model), method, layer=2)


@pytest.mark.parametrize("head", [2, -3, True, 0.5])
@every_pool
def test_a_head_that_does_not_exist(pool, head):
    model = build(POOLS[pool])
    t = trace(model, images_for(model))
    for method in ("raw", "rollout", "relevance", "gradient_rollout"):
        with pytest.raises(VitError, match="heads 0 to 1"):
            METHODS[method](t, head=head)


def test_options_of_rollout_are_checked():
    model = build({})
    with pytest.raises(VitError, match="choose from mean, max, min"):
        explain(model, images_for(model), fusion="sum")  # type: ignore[arg-type]
    with pytest.raises(VitError, match="from 0 to under 1"):
        explain(model, images_for(model), discard=1)


def test_images_of_another_size_leave_the_model_as_it_was():
    model = build({}).train()
    with pytest.raises(VitError, match="takes images"):
        explain(model, torch.zeros(1, 2, 9, 9))
    assert model.training
    assert "pool_tokens" not in model.__dict__
    with pytest.raises(VitError, match="holds none"):
        explain(nn.Linear(2, 2), torch.zeros(1, 2, 8, 8))
