"""torch.compile takes the model whole: one graph, in place, with equal logits and gradients."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vit.model import VisionTransformer

SMALL: dict[str, Any] = dict(image_size=8, patch_size=4, num_classes=3, width=16, depth=2, heads=2)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(pool="attention", position="rotary", qk_norm=True, registers=1, layer_scale=0.1),
        dict(attention="dot_product", norm="post", pool="mean"),
    ],
    ids=["default", "rotary and attention pool", "dot product, post-norm"],
)
def test_the_graph_has_no_breaks(shake, options):
    """Traced without generating code, so quick; `fullgraph` raises where a part of the model cannot be traced."""
    model = shake(VisionTransformer(**SMALL, **options), 0.2)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    torch._dynamo.reset()
    F.cross_entropy(model(images), labels).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(images)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(model(images), labels).backward()
    for gradient, parameter in zip(plain, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names


def test_patch_dropout_is_in_the_graph_too():
    torch._dynamo.reset()
    model = VisionTransformer(**SMALL, patch_dropout=0.5, drop_path=0.3, dropout=0.1, position="rotary").train()
    model.compile(backend="aot_eager", fullgraph=True)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_code_gives_the_same_logits(shake):
    torch._dynamo.reset()
    model = shake(VisionTransformer(**SMALL, position="rotary", pool="attention"), 0.2).eval()
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        model.compile()
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
