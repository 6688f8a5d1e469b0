"""The optimisers against formulas written out: Muon by singular values and step by step, AdamW against torch's own."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.training.optim import Muon, build_optimizer, build_parameter_groups, layer_index, orthogonalise


def with_singular_values(values: torch.Tensor, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
    return left * values @ right.T


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    count=st.integers(1, 3),
    size=st.sampled_from([1e-5, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(rows, columns, count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = size * (0.05 + 0.95 * torch.rand(count, min(rows, columns), generator=generator, dtype=torch.float64))
    g_KMN = torch.stack([with_singular_values(v, rows, columns, seed + k) for k, v in enumerate(values)])
    result = orthogonalise(g_KMN.float())
    assert result.shape == g_KMN.shape
    assert result.dtype == torch.float32
    u, _, vh = torch.linalg.svd(g_KMN, full_matrices=False)
    levelled = u.mT @ result.double() @ vh.mT
    diagonal = levelled.diagonal(dim1=-2, dim2=-1)
    assert (diagonal > 0.6).all()
    assert (diagonal < 1.3).all()
    # what is left beside the diagonal would mean other singular vectors
    torch.testing.assert_close(levelled, torch.diag_embed(diagonal), atol=2e-3, rtol=0)
    spanned = u @ levelled @ vh
    torch.testing.assert_close(result.double(), spanned, atol=2e-3, rtol=0)


def test_orthogonalise_treats_each_matrix_alone_and_survives_zero():
    g_KMN = torch.randn(4, 6, 9)
    g_KMN[2] = 0
    together = orthogonalise(g_KMN)
    assert not together[2].any()
    for alone, result in zip(g_KMN, together, strict=True):
        torch.testing.assert_close(orthogonalise(alone[None])[0], result, atol=1e-5, rtol=1e-5)


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024, for one matrix: X <- a X + (b A + c A A) X with A = X Xᵀ, five times, on the shorter side."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.sqrt((x**2).sum()) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_a_batched_muon_step_is_the_formula_one_by_one():
    """Matrices of several shapes, qkv in three parts, four steps, a learning rate that changes; in float64 by NumPy."""
    shapes = [(6, 6), (6, 6), (12, 6), (6, 12), (12, 6)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    qkv = [nn.Parameter(torch.randn(18, 6)) for _ in range(2)]
    optimizer = Muon(
        [
            dict(params=params, muon=True, lr=0.02, weight_decay=0.1),
            dict(params=qkv, muon=True, parts=3, lr=0.03, weight_decay=0.0),
        ],
        lr=1.0,
        momentum=0.9,
    )
    every = [(p, 1, 0.02, 0.1) for p in params] + [(p, 3, 0.03, 0.0) for p in qkv]
    expected = [p.detach().double().numpy().copy() for p, *_ in every]
    buffers = [np.zeros_like(value) for value in expected]
    for step in range(4):
        rate = 1 / (1 + step)
        for group, lr in zip(optimizer.param_groups, (0.02, 0.03), strict=True):
            group["lr"] = lr * rate
        for k, (p, parts, lr, decay) in enumerate(every):
            p.grad = torch.randn_like(p)
            gradient = p.grad.double().numpy()
            buffers[k] = 0.9 * buffers[k] + 0.1 * gradient
            update = 0.1 * gradient + 0.9 * buffers[k]
            expected[k] = expected[k] * (1 - lr * rate * decay)
            for part in range(parts):
                rows = len(update) // parts
                own = slice(part * rows, (part + 1) * rows)
                scale = math.sqrt(max(1, rows / update.shape[1]))
                expected[k][own] -= lr * rate * scale * newton_schulz(update[own])
        optimizer.step()
        for (p, *_), value in zip(every, expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_adamw_in_muon_is_torchs(weight_decay):
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((5,), (3, 4), (1, 1, 7))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
    muon, adamw = Muon([dict(params=ours)], **options), torch.optim.AdamW(theirs, **options)
    for step in range(20):
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step % 5 - 3)
            q.grad = p.grad.clone()
        muon.step()
        adamw.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_the_adamw_in_muon_counts_each_parameters_own_steps():
    """A parameter without a gradient sits a step out; its bias correction must not run ahead or fall behind."""
    ours = [nn.Parameter(torch.randn(4)) for _ in range(2)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon, adamw = (
        Muon([dict(params=ours)], lr=1e-2, betas=(0.9, 0.95)),
        torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(6):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if step < 3 and k == 0 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step()
        adamw.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def model_for(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        **{
            **dict(image_size=8, patch_size=4, num_classes=5, width=16, depth=2, heads=2, registers=2),
            **dict(layer_scale=0.1, qk_norm=True),
            **options,
        }
    )


MODELS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean": dict(pool="mean"),
    "attention pool": dict(pool="attention", class_token=True),
    "sine-cosine": dict(position="sincos"),
    "dot product, post-norm": dict(attention="dot_product", qk_norm=False, norm="post"),
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_trainable_parameter_is_in_one_group_with_its_own_decay_and_rate(options, kind, layer_decay):
    model = model_for(**options)
    groups = build_parameter_groups(
        model, kind=kind, lr=1e-3, matrix_lr=0.02, weight_decay=0.05, layer_decay=layer_decay
    )
    assert len({group["name"] for group in groups}) == len(groups)
    found = [id(p) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(found) == sorted(names)
    for group in groups:
        for name in (names[id(p)] for p in group["params"]):
            matrix = name.endswith(".weight") and "norm" not in name
            assert group["weight_decay"] == (0.05 if matrix else 0.0), name
            muon = kind == "muon" and matrix and name.startswith("blocks.")
            assert group.get("muon", False) == muon, name
            assert group.get("parts", 1) == (3 if muon and "qkv" in name else 1), name
            layer = 0
            if name.startswith("blocks."):
                layer = int(name.split(".")[1]) + 1
            elif not name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed")):
                layer = 3
            assert group["lr"] == pytest.approx((0.02 if muon else 1e-3) * layer_decay ** (3 - layer)), name


def test_layers_are_counted_from_the_embedding_to_the_head():
    assert [layer_index(name, 12) for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias")] == [
        0
    ] * 4
    assert layer_index("blocks.0.attn.qkv.weight", 12) == 1
    assert layer_index("blocks.11.mlp.fc2.bias", 12) == 12
    assert [layer_index(name, 12) for name in ("norm.weight", "fc_norm.bias", "attn_pool.q.weight", "head.bias")] == [
        13
    ] * 4


def test_frozen_parameters_are_left_out():
    model = model_for()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups = build_parameter_groups(model, kind="muon", lr=1e-3, matrix_lr=0.02, weight_decay=0.05, layer_decay=0.7)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.head.parameters()}
    assert all(group["lr"] == pytest.approx(1e-3) for group in groups)


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_every_optimiser_lowers_the_loss_and_resumes_where_it_stopped(name):
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 5
    images[torch.arange(32), labels % 3] += labels[:, None, None] - 2.0

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        return loss.item()

    lr = 0.05 if name == "sgd" else 3e-3
    model = model_for(layer_scale=None, pool="mean")
    optimizer = build_optimizer(model, name=name, lr=lr, weight_decay=0.01)
    first = steps(model, optimizer, 1)
    steps(model, optimizer, 9)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    last = steps(model, optimizer, 10)
    assert last < 0.8 * first

    again = model_for(layer_scale=None, pool="mean")
    again.load_state_dict(saved[0])
    resumed = build_optimizer(again, name=name, lr=lr, weight_decay=0.01)
    resumed.load_state_dict(saved[1])
    assert steps(again, resumed, 10) == last
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_muon_checkpoint_holds_plain_things(tmp_path):
    model = model_for()
    optimizer = build_optimizer(model, name="muon", lr=1e-3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]


def test_muon_takes_a_closure_and_leaves_parameters_without_gradient_alone():
    weight, still = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    before = still.detach().clone()
    optimizer = Muon([dict(params=[weight, still], muon=True)], lr=0.1, weight_decay=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert torch.equal(still, before)
    assert still not in optimizer.state


def test_an_unknown_optimiser_gets_the_ones_there_are():
    with pytest.raises(VitError, match=r"optim\.name: .*'adamw'"):
        build_optimizer(model_for(), name="adam", lr=1e-3)


def test_the_heads_own_rate_multiplies_that_of_its_layer_and_no_others():
    model = VisionTransformer(
        image_size=8, patch_size=4, num_classes=3, width=16, depth=2, heads=2, distillation_token=True
    )
    options = {"kind": "adamw", "lr": 0.1, "matrix_lr": 1.0, "weight_decay": 0.5}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer_decay in (1.0, 0.5):
        plain, own = (
            build_parameter_groups(model, **options, layer_decay=layer_decay, head_lr=rate) for rate in (1.0, 10.0)
        )
        plain, own = ({names[p]: group["lr"] for group in groups for p in group["params"]} for groups in (plain, own))
        assert own.keys() == plain.keys() == set(names.values())
        for name, rate in own.items():
            factor = 10 if name.startswith(("head.", "head_dist.")) else 1
            assert rate == pytest.approx(factor * plain[name]), name
    labels = [group["name"] for group in build_parameter_groups(model, **options, layer_decay=1.0, head_lr=10.0)]
    assert len(set(labels)) == len(labels) == 4


def test_layers_are_counted_from_the_whole_model_when_only_its_head_learns():
    model = VisionTransformer(image_size=8, patch_size=4, num_classes=3, width=16, depth=4, heads=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "blocks.3.")))
    groups = build_parameter_groups(model, kind="adamw", lr=1.0, matrix_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["name"]: group["lr"] for group in groups} == {
        "decay_layer05": 1.0, "no_decay_layer05": 1.0, "decay_layer04": 0.5, "no_decay_layer04": 0.5
    }  # fmt: skip
