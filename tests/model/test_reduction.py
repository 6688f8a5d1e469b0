"""Token reduction: against a model in NumPy that sorts and loops, what it leaves alone, and what is on record of it."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.model.arguments import removed_per_layer
from vit.model.attention import attention_weights
from vit.model.reduction import (
    SCHEDULES,
    Reduction,
    TokenMap,
    clamp_removed,
    compose_all,
    format_reduction,
    gather_tokens,
    max_removable,
    parse,
    schedule,
)

SMALL: dict[str, Any] = dict(image_size=(8, 10), patch_size=2, num_classes=5, width=16, depth=3, heads=2)

VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token and registers": dict(registers=2, layer_scale=0.5),
    "mean": dict(pool="mean", qk_norm=True),
    "mean of all tokens": dict(pool="mean", pool_prefix=True, class_token=True, registers=1),
    "attention pool": dict(pool="attention", registers=1),
    "rotary": dict(position="rotary", registers=1, pool="mean"),
    "DINOv3": dict(position="rotary_box", registers=2),
    "DeiT": dict(distillation_token=True),
    "post-norm": dict(norm="post"),
    "dot product": dict(attention="dot_product"),
    "BEiT-3": dict(attention_norm=True, mlp_norm=True, mlp="swiglu", norm_layer="rms", pool="mean", class_token=True),
}
PLANS: dict[str, dict[str, Any]] = {
    "keep": dict(reduction="keep", reduction_schedule=[7, 0, 5]),
    "keep, proportional": dict(reduction="keep", reduction_schedule=[1, 6, 4], reduction_proportional=True),
    "merge": dict(reduction="merge", reduction_schedule=[5, 3, 4]),
    "merge, as many as it goes, not proportional": dict(
        reduction="merge", reduction_schedule=[10, 5, 2], reduction_proportional=False
    ),
}


@pytest.fixture(scope="session")
def reduced() -> ModuleType:
    """The reference, loaded by its place."""
    spec = importlib.util.spec_from_file_location("reduced_in_numpy", Path(__file__).with_name("reduced.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def build(**options: Any) -> VisionTransformer:
    return VisionTransformer(**{**SMALL, **options})


def images_for(model: VisionTransformer, count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.image_size, generator=generator).to(dtype)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_model_is_its_formula(reference, reduced, shake, options, plan):
    model = shake(build(**options, **plan).double().eval(), 0.2)
    images = images_for(model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert model.reduction is not None
    for image, found in zip(images.numpy(), logits.numpy(), strict=True):
        wanted = reduced.run(image, state, model.architecture, model.reduction.removed_per_layer, reference).logits
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("options", [{}, dict(pool="mean", position="rotary", registers=1)], ids=["token", "mean"])
def test_where_tokens_went_is_on_record(reference, reduced, shake, options, plan):
    model = shake(build(**options, **plan).double().eval(), 0.2)
    images = images_for(model, dtype=torch.float64)
    assert model.reduction is not None
    with torch.no_grad():
        x_BND, rotary = model.embed(images)
        reducer = model.reduction.begin(x_BND.shape[1], rotary)
        for block in model.blocks:
            x_BND = block(x_BND, rotary, reducer)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for i, image in enumerate(images.numpy()):
        wanted = reduced.run(image, state, model.architecture, model.reduction.removed_per_layer, reference).matrices
        for token_map, matrix in zip(reducer.token_maps, wanted, strict=True):
            if token_map is None:
                np.testing.assert_array_equal(matrix, np.eye(len(matrix)))
            else:
                np.testing.assert_allclose(token_map.matrix[i], matrix, atol=1e-9)
                np.testing.assert_allclose(matrix.sum(axis=1), 1)


class TestMoves:
    @settings(max_examples=60, deadline=None)
    @given(
        method=st.sampled_from(["keep", "merge"]),
        patches=st.integers(2, 40),
        prefix=st.integers(0, 3),
        rates=st.lists(st.floats(0, 1), min_size=1, max_size=4),
        rotary=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_tokens_are_the_matrix_times_tokens(self, method, patches, prefix, rates, rotary, seed):
        random = torch.Generator().manual_seed(seed)
        left, planned = patches, []
        for rate in rates:
            planned.append(round(rate * max_removable(method, left)))
            left -= planned[-1]
        read = slice(0, 1) if prefix else slice(0, None)
        plan = Reduction(method, planned, patches, proportional=True, prefix=prefix, read=read)
        x = torch.randn(2, prefix + patches, 3, dtype=torch.float64, generator=random)
        angles = torch.randn(prefix + patches, 4, dtype=torch.float64, generator=random) if rotary else None
        reducer = plan.begin(prefix + patches, None if angles is None else (angles.cos(), angles.sin()))
        first, before = x[:, :prefix], [x]
        for _ in planned:
            q, k = torch.randn(2, 2, 2, x.shape[1], 4, dtype=torch.float64, generator=random)
            rows = () if reducer.rows is None else (attention_weights(q[:, :, reducer.rows], k, reducer.bias()), k)
            x = reducer.reduce(x, *rows)
            before.append(x)
        assert x.shape == (2, prefix + left, 3)
        torch.testing.assert_close(x[:, :prefix], first)
        for start, token_map, end in zip(before, reducer.token_maps, before[1:], strict=False):
            if token_map is None:
                assert start is end
                continue
            torch.testing.assert_close(token_map.matrix @ start, end)
            torch.testing.assert_close(
                token_map.matrix.sum(dim=2), torch.ones(2, token_map.tokens, dtype=torch.float64)
            )
            assert token_map.matrix[:, :prefix, :prefix].equal(torch.eye(prefix, dtype=torch.float64).expand(2, -1, -1))
        whole = compose_all(reducer.token_maps)
        if whole is not None:
            torch.testing.assert_close(whole.matrix @ before[0], x)
            rows = torch.rand(2, 5, whole.tokens, dtype=torch.float64, generator=random)
            torch.testing.assert_close(whole.unmerge(rows), rows @ whole.matrix)
            sizes = whole.scatter_sum(torch.ones(2, prefix + patches, dtype=torch.float64))
            torch.testing.assert_close(sizes, reducer.sizes_BN)
        if angles is not None and reducer.rotary is not None:
            assert all(each.shape[-2:] == (prefix + left, 4) for each in reducer.rotary)

    def test_patches_stay_in_the_order_of_the_image(self, shake):
        """A patch that is still itself stands behind those in front of it, and has its own angle."""
        model = shake(build(position="rotary", reduction="merge", reduction_rate=0.6), 0.2).eval()
        assert model.reduction is not None
        with torch.no_grad():
            x, rotary = model.embed(images_for(model))
            assert rotary is not None
            reducer = model.reduction.begin(x.shape[1], rotary)
            for block in model.blocks:
                x = block(x, rotary, reducer)
        whole = compose_all(reducer.token_maps)
        assert whole is not None
        assert reducer.rotary is not None
        for i in range(3):
            alone = (whole.fraction_BN[i] == 1).nonzero()[:, 0]
            assert (whole.index_BN[i, alone].diff() > 0).all()
            torch.testing.assert_close(reducer.rotary[0][i, 0, whole.index_BN[i, alone]], rotary[0][alone])

    def test_rows_are_taken_by_image(self):
        x = torch.randn(3, 5, 2)
        rows = torch.tensor([[0, 4], [2, 2], [3, 1]])
        torch.testing.assert_close(gather_tokens(x, rows), torch.stack([x[i, row] for i, row in enumerate(rows)]))

    def test_nothing_moves_nothing(self):
        assert compose_all([None, None]) is None
        token_map = TokenMap(torch.tensor([[0, 0, 1]]), torch.tensor([[0.25, 0.75, 1.0]]), 2)
        assert compose_all([None, token_map, None]) is token_map


class TestOff:
    @pytest.mark.parametrize("plan", [
        dict(reduction="none", reduction_rate=0.9), dict(reduction="merge", reduction_rate=0.0),
        dict(reduction="keep", reduction_schedule=[0, 0, 0]),
    ], ids=str)  # fmt: skip
    def test_nothing_to_reduce_is_the_model_without(self, shake, plan):
        model = shake(build(), 0.2).eval()
        with torch.no_grad():
            before = model(images_for(model))
            torch.testing.assert_close(model.reduce(**plan)(images_for(model)), before, rtol=0, atol=0)
        assert model.reduction is None

    def test_weights_are_the_same_and_it_is_undone(self, shake):
        model = shake(build(), 0.2).eval()
        with torch.no_grad():
            before = model(images_for(model))
            names = list(model.state_dict())
            changed = model.reduce("merge", reduction_rate=0.7)(images_for(model))
            assert list(model.state_dict()) == names
            assert not torch.allclose(changed, before)
            torch.testing.assert_close(model.reduce()(images_for(model)), before, rtol=0, atol=0)

    def test_a_refused_change_changes_nothing(self):
        model = build(reduction="merge", reduction_rate=0.5)
        before, planned = dict(model.architecture), model.reduction
        with pytest.raises(VitError, match="10 of them at most, not 11"):
            model.reduce("merge", reduction_schedule=[11, 0, 0])
        with pytest.raises(VitError, match=r"no option 'rate'; .*reduction_rate"):
            model.reduce("merge", rate=0.5)
        assert model.architecture == before
        assert model.reduction is planned


class TestModel:
    @pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
    def test_an_image_does_not_depend_on_its_neighbours(self, shake, plan):
        model = shake(build(**plan), 0.2).eval()
        images = images_for(model, 5)
        with torch.no_grad():
            alone = torch.cat([model(image[None]) for image in images])
            torch.testing.assert_close(model(images), alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
    def test_it_trains(self, shake, plan):
        """Gradients reach every parameter, and steps lower the loss; patch dropout keeps the shares."""
        model = build(**plan, patch_dropout=0.4, drop_path=0.1, position="rotary", registers=1).train()
        images, labels = images_for(model, 8), torch.arange(8) % 5
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[-5:]) < 0.5 * losses[0]

    def test_attention_that_keeps_has_a_gradient_through_the_rest(self):
        """The weights of the fused token are attention, so what is looked at is learned through it, too."""
        model = build(reduction="keep", reduction_schedule=[14, 0, 0], pool="token").double()
        model.eval()
        assert model.reduction is not None
        x, _ = model.embed(images_for(model, 1, torch.float64))
        reducer = model.reduction.begin(x.shape[1], None)
        _, rows, keys = model.blocks[0].attn(x.detach(), rows=reducer.rows)
        assert rows.shape == (1, 2, 1, 21)
        rows = rows.detach().requires_grad_()
        reducer.reduce(x, rows, keys)[0, -1, 0].backward()
        assert rows.grad is not None
        assert rows.grad[..., 1:].abs().sum() > 0
        assert rows.grad[..., 0].abs().sum() == 0

    @pytest.mark.parametrize("method", ["keep", "merge"])
    def test_half_precision_stays_finite(self, shake, method):
        model = shake(build(reduction=method, reduction_rate=0.6), 0.2).eval()
        images = images_for(model)
        with torch.no_grad():
            exact = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                cast = model(images)
            half = model.bfloat16()(images.bfloat16())
        for rough in (cast, half):
            assert rough.isfinite().all()
            assert F.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0) > 0.9

    @pytest.mark.parametrize("method", ["keep", "merge"])
    def test_the_graph_has_no_breaks(self, shake, method):
        torch._dynamo.reset()
        model = shake(build(reduction=method, reduction_rate=0.6, position="rotary"), 0.2)
        images = images_for(model)
        expected = model(images).detach()
        model.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        model(images).sum().backward()


class TestSchedules:
    @settings(max_examples=200, deadline=None)
    @given(
        method=st.sampled_from(["keep", "merge"]),
        rate=st.floats(0, 0.999),
        name=st.sampled_from(SCHEDULES),
        patches=st.integers(1, 400),
        depth=st.integers(1, 24),
    )
    def test_every_schedule_can_be(self, method, rate, name, patches, depth):
        found = schedule(method, rate, name, patches, depth)
        assert len(found) == depth
        assert all(each >= 0 for each in found)
        assert clamp_removed(method, found, patches) == found
        assert sum(found) <= round(rate * patches) + 1
        if name == "decreasing":
            assert all(after <= before + 1 for before, after in itertools.pairwise(found))

    def test_as_written(self):
        assert schedule("merge", 0.5, "constant", 196, 12) == (8, 8, 8, 9, 8, 8, 8, 8, 9, 8, 8, 8)
        assert schedule("merge", 96 / 196, "decreasing", 196, 12) == (15, 14, 13, 11, 10, 9, 7, 6, 5, 3, 2, 1)
        # a share of 0.7 three times, at layers 4, 7 and 10 counted from 1, as Liang et al. have it
        stages = schedule("keep", 1 - 0.7**3, "stages", 196, 12)
        assert [i for i, each in enumerate(stages) if each] == [3, 6, 9]
        assert [196 - sum(stages[: i + 1]) for i in (3, 6, 9)] == [137, 96, 67]

    def test_counts_of_an_architecture(self):
        a = build(reduction="merge", reduction_schedule=[4, 0, 2]).architecture
        assert removed_per_layer(a) == (4, 0, 2)
        assert VisionTransformer(**a).reduction.removed_per_layer == (4, 0, 2)  # type: ignore[union-attr]
        assert removed_per_layer({**a, "reduction": "none"}) is None
        assert build(reduction="keep", reduction_rate=0.5).reduction.removed_per_layer == (4, 3, 3)  # type: ignore[union-attr]

    @pytest.mark.parametrize(("options", "says"), [
        (dict(reduction="merg"), r"model\.reduction: no 'merg'; did you mean 'merge'"),
        (dict(reduction="keep", reduction_rate=1.0), r"model\.reduction_rate: expected a share from 0 to under 1"),
        (dict(reduction="keep", reduction_schedule="stage"), r"model\.reduction_schedule: no 'stage'; .*stages"),
        (dict(reduction="keep", reduction_schedule=[1, 2]), r"one for each of 3 layers, not \[1, 2\]"),
        (dict(reduction="keep", reduction_schedule=[1, 2, -3]), r"whole numbers of tokens"),
        (dict(reduction="merge", reduction_schedule=[10, 6, 0]), r"layer 1 .* has 10 patch .* 5 of them at most"),
        (dict(reduction="keep", reduction_schedule=[0, 19, 0]), r"layer 1 \(from 0\) has 20 .* 18 of them"),
        (dict(reduction="keep", reduction_proportional="yes"), r"model\.reduction_proportional: expected true, false"),
    ], ids=str)  # fmt: skip
    def test_what_cannot_be_is_said(self, options, says):
        with pytest.raises(VitError, match=says):
            build(**options)


class TestLine:
    @pytest.mark.parametrize("line", [
        "none", "merge:0.5:constant", "keep:0.66:stages", "keep:0.25:decreasing", "merge:8-8-0-4",
    ])  # fmt: skip
    def test_back_and_forth(self, line):
        assert format_reduction(parse(line)) == line

    def test_what_is_left_out(self):
        assert format_reduction(parse("merge")) == "merge:0.5:constant"
        assert format_reduction(parse("keep:0.3")) == "keep:0.3:stages"
        assert format_reduction({}) == "none"

    @pytest.mark.parametrize(("line", "says"), [
        ("mrege:0.5", "no method 'mrege'; did you mean 'merge'"),
        ("merge:1.5", "a share of patches such as"),
        ("merge:0.5:constnt", "no schedule 'constnt'; did you mean 'constant'"),
        ("none:0.5", "expected none, or a method"),
        ("merge:8-x", "for each layer such as"),
        ("merge:0.5:constant:2", "expected none, or a method"),
        ("", "no method ''"),
    ])  # fmt: skip
    def test_what_it_cannot_read(self, line, says):
        with pytest.raises(VitError, match=says):
            parse(line)
