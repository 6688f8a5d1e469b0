"""Attention of reduced tokens: recorded as it was, and every map on the image's own grid.

Maps are held against products of whole matrices, `M_L Â_L ... M_1 Â_1` and the like, in float64, with the attention and
the matrices M of a model in NumPy (`tests/model/reduced.py`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import vit
from vit.errors import VitError
from vit.explain.attention_tab import summarise, token_pairs
from vit.explain.diagnostics import attention_distance, patch_mass, sinks
from vit.explain.methods import METHODS, explain, rollout_by_depth, trace
from vit.explain.record import record_attention
from vit.explain.with_rollout import WithRollout
from vit.model import VisionTransformer

Array = np.ndarray
TESTS = Path(__file__).parents[1]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reduced_maps_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


formulas: Any = _load(Path(__file__).with_name("reference.py"))
reduced: Any = _load(TESTS / "model" / "reduced.py")

KEEP = dict(reduction="keep", reduction_schedule=[3, 2, 1])
MERGE = dict(reduction="merge", reduction_schedule=[3, 2, 2])
SMALL: dict[str, Any] = dict(width=8, mlp_ratio=2.0, depth=3, image_size=(12, 16))
MODELS: dict[str, dict[str, Any]] = {
    "keep": KEEP,
    "keep, proportional, rotary": dict(**KEEP, reduction_proportional=True, position="rotary", registers=1, width=16),
    "keep, mean": dict(**KEEP, pool="mean", registers=1),
    "keep, attention pool": dict(**KEEP, pool="attention"),
    "merge": MERGE,
    "merge, registers": dict(**MERGE, registers=2, norm="post"),
    "merge, mean": dict(**MERGE, pool="mean", image_size=(8, 24)),
    "merge, attention pool": dict(**MERGE, pool="attention", registers=1),
    "merge, none in the first layer": dict(reduction="merge", reduction_schedule=[0, 5, 0]),
}
TARGETS = (2, 0)
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def built(name: str) -> tuple[VisionTransformer, torch.Tensor, list[Any], Callable[..., Any]]:
    """A model in float64, two images, what each left in NumPy, and a way to run one again."""
    model = formulas.build({**SMALL, **MODELS[name]}, torch.float64)
    images = formulas.images_for(model)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}

    def run(image: Array, **given: Any) -> Any:
        return reduced.run(image, state, model.architecture, model.reduction.removed_per_layer, formulas.parts, **given)

    return model, images, [run(image) for image in images.numpy()], run


@cache
def gradients(name: str) -> list[tuple[list[Array], Array]]:
    """Of each image's target by every weight, and by the readout: those of the code, some of which a test checks."""
    model, images, passes, _ = built(name)
    t = trace(model, images, torch.tensor(TARGETS))
    assert t.gradients is not None
    by_readout = torch.zeros_like(t.readout) if t.readout_gradients is None else t.readout_gradients
    return [([g[b].numpy() for g in t.gradients], by_readout[b].numpy()) for b in range(len(passes))]


@every_model
def test_gradients_are_differences(name):
    """Of a score as a function of the weights that mix tokens; what is kept is decided by weights of its own."""
    model, images, passes, run = built(name)
    random = np.random.default_rng(0)
    b, step = 1, 1e-5
    done, image, target = passes[b], images[b].numpy(), TARGETS[b]
    by_weights, by_readout = gradients(name)[b]
    unmoved: list[Any] = [None] * len(done.weights)

    def difference(at: Array, place: tuple[int, ...], score: Callable[[Array], Any]) -> float:
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved[place] += sign * step
            ends.append(score(moved).logits[target])
        return (ends[0] - ends[1]) / (2 * step)

    for layer, weights in enumerate(done.weights):
        # the class token's row of the last layer has a gradient, whatever is read
        places = [(0, 0, 1), *(tuple(random.integers(0, weights.shape)) for _ in range(4))]
        for place in places:

            def attended(moved: Array, layer: int = layer) -> Any:
                given = [moved if i == layer else None for i in range(len(unmoved))]
                return run(image, given=given)

            wanted = difference(weights, place, attended)
            np.testing.assert_allclose(by_weights[layer][place], wanted, rtol=1e-4, atol=1e-6)
    if model.pool != "token":
        for place in [(0, model.num_prefix_tokens), (0, done.readout.shape[1] - 1)]:
            wanted = difference(done.readout, place, lambda moved: run(image, readout=moved))
            np.testing.assert_allclose(by_readout[place], wanted, rtol=1e-4, atol=1e-6)


@every_model
def test_the_record_is_what_happened(name):
    model, images, passes, _ = built(name)
    with record_attention(model) as record:
        logits = model(images)
    assert isinstance(record.weights, list)
    assert len(record.token_maps) == 4
    assert record.token_maps[0] is None
    for b, done in enumerate(passes):
        np.testing.assert_allclose(logits[b].detach(), done.logits, atol=1e-6)
        np.testing.assert_allclose(record.readout[b], done.readout, atol=1e-6)
        for layer, (weights, matrix) in enumerate(zip(done.weights, done.matrices, strict=True)):
            np.testing.assert_allclose(record.weights[layer][b], weights, atol=1e-6)
            token_map = record.token_maps[layer + 1]
            np.testing.assert_allclose(
                np.eye(len(matrix)) if token_map is None else token_map.matrix[b], matrix, atol=1e-6
            )
            found = [token.x for token in done.tokens[layer]]
            np.testing.assert_allclose(record.tokens[layer][b], found, atol=1e-6)
            sizes = record.sizes[layer]
            wanted = [token.size for token in done.tokens[layer]]
            np.testing.assert_allclose(np.ones(len(wanted)) if sizes is None else sizes[b], wanted)


@every_model
def test_recording_changes_no_logit_and_every_part_of_a_record_agrees(name):
    model, images, _, _ = built(name)
    with torch.no_grad():
        before = model(images)
    with record_attention(model) as record, torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert len(record.token_maps) == len(record.weights) + 1
    with record_attention(model, gradients=True) as whole:
        torch.testing.assert_close(model(images), before)
    for ours, theirs in zip(whole.weights, record.weights, strict=True):
        torch.testing.assert_close(ours, theirs)


def on_image(name: str, method: str, b: int, layer: int) -> Array:
    """The map of image `b` up to `layer`, from products of whole matrices."""
    model, _, passes, _ = built(name)
    done, prefix = passes[b], model.num_prefix_tokens
    by_weights, by_readout = gradients(name)[b]
    depth = len(done.weights)
    top = layer % depth
    by_class = method not in ("raw", "rollout")
    no_gradient = model.pool == "token" or top < depth - 1 or not by_class
    row = formulas.read_for_class(done.readout, None if no_gradient else by_readout)
    for matrix in reversed(done.matrices[top:]):
        row = row @ matrix
    before = np.eye(prefix + model.grid[0] * model.grid[1])
    for i in range(top + 1):
        weights = done.weights[i]
        residual = np.eye(weights.shape[-1])
        if method == "rollout":
            attended = (formulas.fuse(weights, "mean") + residual) / 2
        elif method == "raw":
            attended = formulas.fuse(weights, "mean") if i == top else residual
        elif method == "gradient_rollout":
            attended = formulas.with_residual(formulas.positive(weights, by_weights[i]))
        else:
            attended = residual + formulas.positive(weights, by_weights[i])
        before = attended @ before
        if i < top:
            before = done.matrices[i] @ before
    return formulas.as_map(row @ before, prefix, model.grid)


@every_model
@pytest.mark.parametrize("method", ["raw", "rollout", "gradient_rollout", "relevance"])
def test_every_method_is_a_product_of_matrices(name, method):
    model, images, passes, _ = built(name)
    for layer in (None, 0, 1):
        maps = explain(model, images, method, target=torch.tensor(TARGETS), layer=layer)
        formulas.assert_maps(maps, 2, model.grid)
        for b, done in enumerate(passes):
            if method == "raw" and layer is None and model.pool == "attention":
                row = done.readout.mean(axis=0)
                for matrix in reversed(done.matrices):
                    row = row @ matrix
                wanted = formulas.as_map(row, model.num_prefix_tokens, model.grid)
            else:
                wanted = on_image(name, method, b, -1 if layer is None else layer)
            np.testing.assert_allclose(maps[b], wanted, rtol=1e-4, atol=1e-6, err_msg=f"{method}, layer {layer}")


@every_model
def test_every_method_gives_maps_of_sum_one(name):
    model, images, _, _ = built(name)
    t = trace(model, images)
    for maps_of in METHODS.values():
        for layer in (None, 0, -1):
            formulas.assert_maps(maps_of(t, layer=layer), 2, model.grid)
    by_depth = rollout_by_depth(t)
    for layer in range(3):
        torch.testing.assert_close(by_depth[layer], METHODS["rollout"](t, layer=layer))


@every_model
@pytest.mark.parametrize("options", [dict(), dict(fusion="max"), dict(discard=0.3)], ids=str)
def test_the_public_rollout_takes_a_record_as_it_is(name, options):
    """`vit.rollout(record.weights, prefix_tokens, grid)` reads the class token, or the mean of the patches."""
    model, images, _, _ = built(name)
    with record_attention(model) as record, torch.no_grad():
        model(images)
    given: dict[str, Any] = dict(prefix_tokens=model.num_prefix_tokens, grid=model.grid)
    maps = vit.rollout(record.weights, **given, **options)
    formulas.assert_maps(maps, 2, model.grid)
    torch.testing.assert_close(
        vit.rollout(list(record.weights), token_maps=record.token_maps, **given, **options), maps
    )
    if model.pool == "token" or (model.pool == "mean" and not model.num_prefix_tokens):
        torch.testing.assert_close(vit.rollout(record.weights, readout=record.readout, **given, **options), maps)
    if record.weights[0].shape != record.weights[-1].shape:
        with pytest.raises(VitError, match=r"were tokens reduced\? Give record\.weights as they are"):
            vit.rollout(list(record.weights), **given)


def test_with_reduction_off_nothing_differs():
    model = formulas.build(SMALL)
    images = formulas.images_for(model)
    before = {method: explain(model, images, method) for method in METHODS}
    model.reduce("merge", reduction_rate=0.0)
    for method, maps in before.items():
        torch.testing.assert_close(explain(model, images, method), maps, rtol=0, atol=0)
    with record_attention(model) as record:
        model(images)
    assert record.token_maps == [None] * 4
    assert record.sizes == [None] * 3


@every_model
def test_the_exported_module_gives_the_same_map(name):
    model, images, _, _ = built(name)
    with torch.no_grad():
        logits, maps = WithRollout(model)(images)
        torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(maps, explain(model, images).double(), check_dtype=False)


@every_model
def test_what_the_tab_shows_is_on_the_grid(name):
    """Class rows, and pairs: patches that are one token attend alike, and share what it is attended to."""
    model, images, passes, _ = built(name)
    _, probes, t = summarise(model, images, [0, None])
    P, prefix = model.grid[0] * model.grid[1], model.num_prefix_tokens
    for i, done in enumerate(passes):
        pairs = token_pairs(t, i, per_head=True)["attention"]
        assert pairs.shape == (3, 2, prefix + P, prefix + P)
        gone = np.eye(prefix + P)
        row = done.readout.mean(axis=0)
        for layer in range(3):
            place = gone.argmax(axis=0)
            wanted = (done.weights[layer] @ gone)[:, place]
            np.testing.assert_allclose(pairs[layer], wanted, rtol=1e-5, atol=1e-6)
            own = row
            for matrix in reversed(done.matrices[layer:]):
                own = own @ matrix
            rows = np.stack([own @ head @ gone for head in done.weights[layer]])[:, prefix:]
            np.testing.assert_allclose(probes[i]["rows"][layer], rows, rtol=1e-5, atol=1e-6)
            gone = done.matrices[layer] @ gone


@every_model
def test_numbers_about_reduced_attention(name):
    model, images, passes, _ = built(name)
    t = trace(model, images)
    P, prefix = model.grid[0] * model.grid[1], model.num_prefix_tokens
    places = np.array([(row, column) for row in range(model.grid[0]) for column in range(model.grid[1])], dtype=float)
    wanted = np.zeros((3, 2))
    for done in passes:
        gone = np.eye(prefix + P)
        for layer, weights in enumerate(done.weights):
            at = gone[prefix:, prefix:] @ places
            apart = np.linalg.norm(at[:, None] - at[None], axis=-1)
            between = weights[:, prefix:, prefix:]
            wanted[layer] += ((between * apart).sum(axis=-1) / between.sum(axis=-1)).mean(axis=-1) / 2
            gone = done.matrices[layer] @ gone
    found = attention_distance(t.select_layers(range(3)), prefix, model.grid)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(attention_distance(t.select_layers([2]), prefix, model.grid)[0], wanted[2], rtol=1e-5)
    assert patch_mass(t).shape == (3, 2)
    top, outliers = sinks(t)
    assert ((top > 0) & (top <= 1)).all()
    assert ((outliers >= 0) & (outliers <= 1)).all()
