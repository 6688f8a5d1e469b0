"""Rollout on weights alone: its formula for any sizes, what follows from it, and what does not fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vit
from vit.errors import VitError
from vit.explain.methods import explain, rollout_by_depth, trace
from vit.explain.record import record_attention
from vit.explain.rollout import rollout


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
POOLS = {"token": dict(registers=1), "mean": dict(pool="mean", registers=1), "attention": dict(pool="attention")}
every_pool = pytest.mark.parametrize("pool", POOLS)
CLOSE = dict(rtol=1e-5, atol=1e-6)


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


def test_single_rows_are_no_rollout():
    model = build({})
    with torch.no_grad(), record_attention(model) as record:
        model(images_for(model))
    with pytest.raises(VitError, match="rows"):
        rollout([weights[:, :, :1] for weights in record.weights], model.num_prefix_tokens, model.grid)


def test_patches_dropped_in_training_are_no_grid():
    model = build(dict(patch_dropout=0.5), image_size=16).train()
    with torch.no_grad(), record_attention(model) as record:
        model(images_for(model))
    with pytest.raises(VitError, match="Record in evaluation mode"):
        rollout(record.weights, model.num_prefix_tokens, model.grid)
