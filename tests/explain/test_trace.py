"""Explaining leaves the model as it was, in every mode, context and precision, and names mistakes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vit.errors import VitError
from vit.explain.methods import METHODS, explain, trace
from vit.explain.record import record_attention


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_formulas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference: Any = _load(Path(__file__).with_name("reference.py"))
build, images_for = reference.build, reference.images_for
assert_maps = reference.assert_maps
POOLS = {"token": dict(registers=1), "mean": dict(pool="mean", registers=1), "attention": dict(pool="attention")}
every_pool = pytest.mark.parametrize("pool", POOLS)
CLOSE = dict(rtol=1e-5, atol=1e-6)


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
