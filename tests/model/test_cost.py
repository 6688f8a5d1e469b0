"""FLOPs counted from arguments against those that torch counts while a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit.model import VisionTransformer
from vit.model.cost import flops, products, relative

SMALL: dict[str, Any] = dict(image_size=(16, 24), patch_size=2, num_classes=7, width=32, depth=3, heads=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers, gated": dict(registers=3, mlp="swiglu", mlp_ratio=2.7),
    "packed, DeiT": dict(mlp="swiglu_packed", distillation_token=True, in_channels=1),
    "mean": dict(pool="mean"),
    "attention pool of all tokens": dict(pool="attention", pool_prefix=True, registers=2),
    "attention pool": dict(pool="attention", registers=1),
    "no head": dict(num_classes=0),
    "pixels left over": dict(image_size=(17, 25), crop_to_patches=True),
}


def counted(model: VisionTransformer) -> int:
    model.requires_grad_(False)
    images = torch.zeros(1, model.patch_embed.proj.in_channels, *model.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_without_reduction_it_is_exact(options):
    model = VisionTransformer(**{**SMALL, **options}).eval()
    assert flops(model.architecture) == counted(model)
    assert len(products(model.architecture)) == 5
    assert relative(model.architecture) == 1


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("plan", [
    dict(reduction="keep", reduction_rate=0.6), dict(reduction="keep", reduction_schedule=[0, 50, 0]),
    dict(reduction="merge", reduction_rate=0.7), dict(reduction="merge", reduction_schedule=[48, 24, 12]),
], ids=str)  # fmt: skip
def test_with_reduction_it_is_what_torch_counts(options, plan):
    model = VisionTransformer(**{**SMALL, **options, **plan}).eval()
    assert flops(model.architecture) == counted(model)
    assert 0.2 < relative(model.architecture) < 0.9


def test_the_formula_of_the_paper():
    """12 N D^2 + 2 N^2 D a layer, and the patches: a ViT-S/16 at 224 pixels."""
    a = VisionTransformer(image_size=224, patch_size=16, num_classes=1000, size="small").architecture
    N, D = 197, 384
    assert flops(a) == 2 * (12 * (12 * N * D**2 + 2 * N**2 * D) + 196 * D * 768 + 1000 * D)
    merged = {**a, "reduction": "merge", "reduction_schedule": [8] * 12}
    assert 1 / relative(merged) == pytest.approx(1.34, abs=0.02)
