"""Recording: the weights are the model's own, the logits do not change, and nothing stays behind."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vit
from vit.errors import VitError
from vit.explain.record import find, record_attention


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
POOLS = {"token": dict(registers=1), "mean": dict(pool="mean", registers=1), "attention": dict(pool="attention")}
every_pool = pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)
both_paths = pytest.mark.parametrize("gradients", [False, True], ids=["beside", "with gradients"])


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def state_of(model: nn.Module) -> list[Any]:
    """All that a module is: what hangs on each instance, its hooks, its mode, its parameters."""
    found: list[Any] = []
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items() if key != "training"}
        hooks = {key: list(value) for key, value in module.__dict__.items() if key.endswith("_hooks")}
        found.append((name, type(module), module.training, attributes, hooks))
    for name, parameter in model.named_parameters():
        found.append((name, id(parameter), parameter.requires_grad, parameter._version, id(parameter.grad)))
    return found


# the logits


@every_model
def test_logits_do_not_change(options):
    model = build(options)
    images = images_for(model, 3)
    with torch.no_grad():
        expected = model(images)
        with record_attention(model):
            assert torch.equal(model(images), expected), "to the bit, where the fused kernel runs"
        with record_attention(model, gradients=True):
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(images), expected)


DROPS = dict(dropout=0.2, attention_dropout=0.3, drop_path=0.4, patch_dropout=0.4)


@pytest.mark.parametrize(
    "options",
    [
        *POOLS.values(),
        dict(position="rotary", image_size=(8, 12)),
        dict(attention="dot_product"),
        dict(attention="scaled_dot_product", norm="post"),
    ],
    ids=str,
)
def test_training_is_the_same_with_the_same_seed(options):
    """Also the generator's state afterwards, so a run that records goes on as one that does not; and the gradients."""
    model = build({**options, **DROPS}, image_size=(8, 12)).train()
    images = images_for(model, 4)

    def step() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        model.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return logits.detach(), torch.get_rng_state(), *gradients

    expected = step()
    with record_attention(model) as record:
        recorded = step()
    assert len(recorded) == len(expected) > 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recorded, expected, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(), expected, strict=True))
    assert model.training
    kept = model.num_prefix_tokens + 4  # 6 patches, 40% of them dropped
    for weights in record.weights:
        assert weights.shape[2:] == (kept, kept)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert record.readout.shape[2] == kept


@every_pool
def test_training_with_gradients_is_the_same_where_attention_is_not_dropped(options):
    model = build({**options, **DROPS, "attention_dropout": 0.0}).train()
    images = images_for(model, 4)
    torch.manual_seed(3)
    expected = model(images)
    state = torch.get_rng_state()
    with record_attention(model, gradients=True):
        torch.manual_seed(3)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@both_paths
@every_pool
def test_the_parameters_gradients_are_the_same(options, gradients):
    model = build(options)
    images = images_for(model)
    model(images)[:, 0].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with record_attention(model, gradients=gradients):
        logits = model(images)
    logits[:, 0].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(expected)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference_mode", "no_grad", "enable_grad", "autocast"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["block around", "block inside"])
@every_pool
def test_it_works_in_every_context(options, around, inside):
    model = build(options)
    images = images_for(model)
    with around():
        expected = model(images)
    outer, inner = (around(), contextlib.nullcontext()) if inside else (contextlib.nullcontext(), around())
    with outer, record_attention(model) as record, inner:
        logits = model(images)
    assert torch.equal(logits, expected)
    assert logits.dtype == expected.dtype
    assert logits.requires_grad == expected.requires_grad
    for weights in [*record.weights, record.readout]:
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [*POOLS.values(), dict(attention="dot_product")], ids=str)
def test_half_precision_is_recorded_in_single(options):
    """Rows sum to 1 as in single precision, though the model's own would not."""
    model = build(options).bfloat16()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        with record_attention(model) as record:
            assert torch.equal(model(images), expected)
    for weights in [*record.weights, record.readout]:
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)


# the weights


@both_paths
@every_model
def test_weights_tokens_and_readout_are_those_of_the_formula(options, gradients):
    """A whole model, in NumPy from its state dict."""
    model = build(options, torch.float64)
    images = images_for(model)
    naive = reference.formulas(model)
    with torch.no_grad(), record_attention(model, gradients=gradients) as record:
        model(images)
    assert len(record.weights) == len(model.blocks)
    assert (record.prefix_tokens, record.grid) == (naive.prefix, naive.grid)
    heads, N = naive.heads, naive.prefix + naive.grid[0] * naive.grid[1]
    for b, image in enumerate(images.numpy()):
        done = naive.run(image)
        np.testing.assert_allclose(record.readout[b].detach(), done.readout, rtol=1e-5, atol=1e-6)
        for weights, tokens, w_HNN, x_ND in zip(record.weights, record.tokens, done.weights, done.tokens, strict=True):
            assert weights.shape == (len(images), heads, N, N)
            np.testing.assert_allclose(weights[b], w_HNN, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(tokens[b], x_ND, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(weights[b].sum(-1), 1, rtol=1e-6)


def test_the_models_in_these_tests_do_attend():
    """Uniform weights would hide an error."""
    for options in VARIANTS.values():
        model = build(options)
        with torch.no_grad(), record_attention(model) as record:
            model(images_for(model))
        assert all(weights.std(-1).mean() > 0.02 for weights in record.weights)


@every_model
def test_gradients_reach_every_layer_also_after_the_block(options):
    model = build(options)
    with record_attention(model, gradients=True) as record:
        logits = model(images_for(model))
    found = torch.autograd.grad(logits[:, 1].sum(), record.weights)
    assert all(gradient.abs().sum() > 0 for gradient in found)
    assert all(p.grad is None for p in model.parameters())


def test_without_gradients_the_record_is_off_the_graph():
    model = build(dict(pool="attention"))
    with record_attention(model) as record:
        logits = model(images_for(model))
    assert logits.requires_grad
    assert not any(t.requires_grad for t in [*record.weights, *record.tokens, record.readout])


@pytest.mark.parametrize("what", ["weights", "readout", "tokens"])
def test_before_the_model_ran_there_is_nothing(what):
    model = build({})
    with record_attention(model) as record, pytest.raises(VitError, match="call the model inside"):
        getattr(record, what)
    with pytest.raises(VitError, match="call the model inside"):
        getattr(record, what)


def test_the_last_pass_is_kept_also_of_another_size():
    model = build({})
    first, last = images_for(model, 4, seed=1), images_for(model, 2, seed=2)
    with torch.no_grad():
        with record_attention(model) as record:
            model(first)
            model(last)
        model(first)
        with record_attention(model) as alone:
            model(last)
    for ours, theirs in zip([*record.weights, record.readout], [*alone.weights, alone.readout], strict=True):
        assert torch.equal(ours, theirs)


def test_an_empty_batch_is_recorded():
    model = build(dict(pool="mean"))
    with torch.no_grad(), record_attention(model) as record:
        model(images_for(model, 0))
    assert record.weights[0].shape == (0, 2, 4, 4)
    assert vit.rollout(record.weights, 0, model.grid).shape == (0, 2, 2)


# nothing stays behind


class Stop(Exception):
    pass


@both_paths
@every_pool
def test_the_model_is_as_it_was(options, gradients):
    model = build({**options, **DROPS}).train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.norm.register_forward_pre_hook(lambda *_: None)
    before = state_of(model)
    with record_attention(model, gradients=gradients):
        model(images_for(model))
    assert state_of(model) == before
    with contextlib.suppress(Stop), record_attention(model, gradients=gradients):
        model(images_for(model))
        raise Stop
    assert state_of(model) == before
    with pytest.raises(VitError, match="takes images"), record_attention(model, gradients=gradients):
        model(torch.zeros(1, 1, 3, 3))
    assert state_of(model) == before


def test_an_error_in_the_middle_of_a_pass_leaves_nothing_either():
    model = build({})

    def fail(*_: Any) -> None:
        raise Stop

    handle = model.blocks[1].mlp.register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(Stop), record_attention(model):
        model(images_for(model))
    assert state_of(model) == before
    handle.remove()
    with record_attention(model) as record:
        model(images_for(model))
    assert len(record.weights) == 2


def test_a_method_that_someone_replaced_is_put_back():
    model = build({})
    images = images_for(model)
    attn = model.blocks[0].attn
    attn.forward = own = attn.forward  # type: ignore[method-assign]
    with record_attention(model) as record:
        model(images)
    assert attn.__dict__["forward"] is own
    assert len(record.weights) == 2


def test_the_model_can_be_copied_and_saved_meanwhile_and_afterwards(tmp_path):
    model = build({})
    names = list(model.state_dict())
    with record_attention(model):
        assert list(model.state_dict()) == names
        model(images_for(model))
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(twin(images_for(model)), model(images_for(model)))


# one recording in another


@pytest.mark.parametrize("inner_gradients", [False, True])
@pytest.mark.parametrize("outer_gradients", [False, True])
@every_pool
def test_recordings_nest(options, outer_gradients, inner_gradients):
    """Every pass inside a recording is recorded there, whatever is recorded inside it."""
    model = build(options, depth=3)
    first, second, third = (images_for(model, 2, seed) for seed in range(3))
    alone = []
    before = state_of(model)
    for images in (first, second, third):
        with record_attention(model) as record:
            expected = model(images)
        alone.append((record, expected))
    with record_attention(model, gradients=outer_gradients) as outer:
        model(first)
        with record_attention(model, gradients=inner_gradients) as inner:
            torch.testing.assert_close(model(second), alone[1][1], rtol=1e-5, atol=1e-5)
            in_the_middle = [*outer.weights, outer.readout, *outer.tokens]
        model(third)
    assert state_of(model) == before

    def everything(record: Any) -> list[torch.Tensor]:
        return [*record.weights, record.readout, *record.tokens]

    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([t.detach() for t in in_the_middle], everything(alone[1][0]), **close)
    torch.testing.assert_close([t.detach() for t in everything(outer)], everything(alone[2][0]), **close)
    torch.testing.assert_close([t.detach() for t in everything(inner)], everything(alone[1][0]), **close)


def test_a_nested_recording_changes_no_logit_in_training():
    model = build(DROPS).train()
    images = images_for(model)
    torch.manual_seed(5)
    expected = model(images)
    with record_attention(model) as outer, record_attention(model) as inner:
        torch.manual_seed(5)
        assert torch.equal(model(images), expected)
    for ours, theirs in zip(outer.weights, inner.weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", ["inside", "outside"])
@every_pool
def test_a_recording_beside_one_with_gradients_takes_none_away(options, order):
    model = build(options)
    images = images_for(model)
    with record_attention(model, gradients=True) as alone:
        expected = torch.autograd.grad(model(images)[:, 1].sum(), alone.weights)
    first, second = order == "inside", order == "outside"
    with record_attention(model, gradients=first) as outer, record_attention(model, gradients=second) as inner:
        logits = model(images)
    with_gradients, without = (outer, inner) if first else (inner, outer)
    found = torch.autograd.grad(logits[:, 1].sum(), with_gradients.weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not without.weights[0].requires_grad


def test_two_models_are_recorded_beside_each_other():
    one, other = build({}), build(dict(pool="mean"), depth=1)
    with record_attention(one) as first, record_attention(other) as second:
        one(images_for(one, 3))
        other(images_for(other, 2))
    assert [len(w) for w in first.weights] == [3, 3]
    assert [len(w) for w in second.weights] == [2]


# compiled


class Counting:
    """A compiler that runs the graph as it is, and counts."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.ran += 1
            return graph.forward(*arguments)

        return run


@pytest.mark.parametrize(
    ("options", "gradients", "how"),
    [
        (POOLS["token"], False, "in place"),
        (POOLS["mean"], True, "in place"),
        (POOLS["attention"], False, "wrapped"),
        (POOLS["token"], True, "wrapped"),
        (POOLS["mean"], False, "a step"),
        (POOLS["attention"], False, "its blocks"),
    ],
    ids=str,
)
def test_a_compiled_model_is_recorded_and_stays_compiled(options, gradients, how):
    model, counting = build(options), Counting()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        call: Any = model
        if how == "in place":
            model.compile(backend=counting)
        elif how == "its blocks":
            for block in model.blocks:
                block.compile(backend=counting)
        else:
            call = torch.compile(model if how == "wrapped" else lambda x: model(x), backend=counting)
        with record_attention(call if how == "wrapped" else model, gradients=gradients) as record:
            torch.testing.assert_close(call(images), expected, rtol=1e-5, atol=1e-5)
        assert counting.compiled == counting.ran == 0
        call(images)
        compiled, ran = counting.compiled, counting.ran
        assert ran > 0
        before = state_of(model)
        with record_attention(model, gradients=gradients) as again:
            torch.testing.assert_close(call(images), expected, rtol=1e-5, atol=1e-5)
        assert counting.ran == ran
        assert state_of(model) == before
        torch.testing.assert_close(call(images), expected, rtol=1e-5, atol=1e-5)
        assert (counting.compiled, counting.ran) == (compiled, 2 * ran), "the compiled code runs again, not a new one"
    for ours, theirs in zip(record.weights, again.weights, strict=True):
        assert torch.equal(ours, theirs)
    assert len(record.weights) == 2


def test_an_error_inside_leaves_a_compiled_model_compiled():
    model, counting = build({}), Counting()
    model.compile(backend=counting)
    with torch.no_grad():
        model(images_for(model))
        with pytest.raises(Stop), record_attention(model):
            raise Stop
        model(images_for(model))
    assert (counting.compiled, counting.ran) == (1, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_code_and_recording_take_turns(wrapped):
    """With torch's own compiler, in training, on one model."""
    model = build(dict(position="rotary", pool="attention")).train()
    images = images_for(model)
    expected = model(images).detach()
    call: Any = model
    if wrapped:
        call = torch.compile(model)
    else:
        model.compile()
    for _ in range(2):
        torch.testing.assert_close(call(images), expected, rtol=1e-5, atol=1e-5)
        with record_attention(call) as record:
            torch.testing.assert_close(call(images), expected, rtol=1e-5, atol=1e-5)
        assert len(record.weights) == 2


# where the model is


class Wrapper(nn.Module):
    """As a distributed or a training module holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)


def test_the_model_is_found_inside_a_wrapper():
    model = build({})
    wrapped = Wrapper(Wrapper(model))
    assert find(model) is model
    assert find(wrapped) is model
    with record_attention(wrapped) as record:
        wrapped(images_for(model))
    with record_attention(model) as direct:
        model(images_for(model))
    assert torch.equal(record.weights[1], direct.weights[1])


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@both_paths
@pytest.mark.parametrize("kind", ["DDP", "FSDP"])
def test_distributed_models_are_recorded(one_process, kind, gradients):
    model = build({})
    images = images_for(model)
    with record_attention(model) as plain:
        expected = model(images).detach()
    if kind == "DDP":
        call: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        call = fully_shard(model, mesh=mesh)
    with record_attention(call, gradients=gradients) as record:
        logits = call(images)
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(record.weights, plain.weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential()], ids=["Linear", "Sequential"])
def test_another_module_is_refused(module):
    with pytest.raises(VitError, match=f"{type(module).__name__} holds none"), record_attention(module):
        pass


def test_two_models_in_one_module_are_refused():
    pair = nn.ModuleList([build({}), build({})])
    with pytest.raises(VitError, match="ModuleList holds 2"), record_attention(pair):
        pass
