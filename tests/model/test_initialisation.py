"""What a model starts from: the scale of each parameter, and the shape that mimetic initialisation gives attention."""

from __future__ import annotations

import math

import pytest
import torch

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.model.initialisation import SCHEMES, initialise

OPTIONS = dict(
    image_size=16, patch_size=4, num_classes=10, width=128, depth=2, heads=4, registers=2, layer_scale=1e-4,
    qk_norm=True, pool="attention", class_token=True,
)  # fmt: skip


MORE = dict(
    pool="token", distillation_token=True, norm_layer="rms", embed_norm="tokens", attention_norm=True, mlp_norm=True,
    mlp="swiglu_packed",
)  # fmt: skip


@pytest.mark.parametrize("more", [{}, MORE], ids=["", "more"])
@pytest.mark.parametrize("init", SCHEMES)
def test_every_scheme_sets_what_does_not_depend_on_it(init, more):
    model = VisionTransformer(**{**OPTIONS, **more}, init=init)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "norm" in name:
            assert (parameter == (1 if last == "weight" else 0)).all(), name
        elif last == "bias":
            assert not parameter.any(), name
        elif last == "gamma":
            assert (parameter == 1e-4).all(), name
        elif name in ("cls_token", "dist_token", "reg_token"):
            assert 0 < parameter.abs().max() < 1e-5, name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    for head in (model.head, model.head_dist) if more else (model.head,):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 16) ** -0.5, rel=0.15)


def test_a_model_without_memory_is_not_drawn():
    state = torch.get_rng_state()
    with torch.device("meta"):
        VisionTransformer(**OPTIONS, init="mimetic")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_loss_is_that_of_guessing():
    for init in SCHEMES:
        model = VisionTransformer(image_size=16, patch_size=4, num_classes=10, size="nano", init=init).eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(torch.randn(64, 3, 16, 16)), torch.arange(64) % 10)
        assert loss.item() == pytest.approx(math.log(10), abs=0.15)


def test_trunc_normal_matrices():
    model = VisionTransformer(**OPTIONS, init="trunc_normal")
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_xavier_takes_query_key_and_value_as_three_matrices():
    model = VisionTransformer(**OPTIONS, init="xavier")
    bound = math.sqrt(6 / (128 + 128))
    parts = [*model.blocks[0].attn.qkv.weight.chunk(3), *model.attn_pool.kv.weight.chunk(2), model.attn_pool.q.weight]
    for part in parts:
        assert bound * 0.99 < part.abs().max().item() <= bound
    packed = VisionTransformer(**{**OPTIONS, **MORE}, init="xavier").blocks[0].mlp.fc1.weight
    for part in packed.chunk(2):
        assert math.sqrt(6 / (128 + 512)) * 0.99 < part.abs().max().item() <= math.sqrt(6 / (128 + 512))
    hidden = model.blocks[0].mlp.fc1.weight
    assert hidden.abs().max().item() <= math.sqrt(6 / (128 + 512))


def test_mimetic_attention_looks_like_trained_attention():
    """Query times key is near a multiple of the identity, value times projection near a negative multiple."""
    model = VisionTransformer(image_size=16, patch_size=4, num_classes=10, width=128, depth=1, heads=4, init="mimetic")
    attention = model.blocks[0].attn
    q, k, v = attention.qkv.weight.double().chunk(3)
    for head in range(4):
        own = slice(head * 32, (head + 1) * 32)
        product = q[own].T @ k[own]
        assert torch.linalg.matrix_rank(product) == 32
        assert 0.1 < product.diagonal().mean() < 0.9
        off = product - product.diagonal().diag()
        assert off.mean().abs() < 0.01
    product = v.T @ attention.proj.weight.double().T
    assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.02)
    off = product - product.diagonal().diag()
    assert off.std().item() == pytest.approx(0.4 * 128**-0.5, rel=0.05)


@pytest.mark.parametrize("width", [16, 256])
def test_plain_attention_starts_by_looking_at_all_tokens(width):
    """With nothing learned in its scores, a token that starts out seeing only itself could never look elsewhere."""
    model = VisionTransformer(
        image_size=16, patch_size=4, num_classes=10, width=width, depth=2, heads=1, attention="dot_product"
    )
    x_BND, _ = model.embed(torch.randn(8, 3, 16, 16))
    for block in model.blocks:
        weights = block.attn(block.norm1(x_BND), rows=slice(None))[1]
        assert weights.diagonal(dim1=-2, dim2=-1).max() < 0.3
        assert weights[:, 0, 0, 1:].sum(-1).min() > 0.7  # the class token looks at the patches
        x_BND = block(x_BND)


def test_a_seed_decides_the_start():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in VisionTransformer(**OPTIONS, init="mimetic").parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(VitError, match=r"model\.init: no 'mimetc'; did you mean 'mimetic'"):
        VisionTransformer(**OPTIONS, init="mimetc")
    with pytest.raises(VitError, match=r"model\.init: no scheme 'mimetc'; did you mean 'mimetic'"):
        initialise(torch.nn.Linear(1, 1), "mimetc")
