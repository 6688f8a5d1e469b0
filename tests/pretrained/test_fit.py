"""Weights fit whole or not at all, and the report says what became of each."""

from __future__ import annotations

import pytest
import torch

from vit.errors import VitError
from vit.model import VisionTransformer
from vit.pretrained.fit import fit_weights
from vit.pretrained.resample import resample_channels, resample_patches, resample_positions

SIZE = {"width": 32, "depth": 2, "heads": 2}


def make(**options) -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(**{"image_size": 32, "patch_size": 8, "num_classes": 5, **SIZE, **options}).eval()


def weights(**options) -> dict[str, torch.Tensor]:
    """All random, so that nothing fits by chance."""
    torch.manual_seed(2)
    return {name: torch.randn_like(tensor) for name, tensor in make(**options).state_dict().items()}


def refused(model: VisionTransformer, state: dict, match: str, **options) -> None:
    """The weights are refused in one line, and the model is as it was, to the bit."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(VitError, match=match) as caught:
        fit_weights(model, state, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_weights_that_fit_are_loaded():
    model, state = make(), weights()
    report = fit_weights(model, state, source="a file")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert sorted(report.loaded) == sorted(state)
    assert (report.resampled, report.missing, report.unexpected, report.head) == ([], [], [], "kept")
    state["head.bias"].add_(1)  # no tie stays
    assert not torch.equal(model.head.bias, state["head.bias"])


def test_sizes_are_resampled_and_reported():
    state = weights()
    model = make(image_size=(64, 32), patch_size=(8, 4), in_channels=1, num_classes=0)
    report = fit_weights(model, state, head="drop")
    positions = resample_positions(state["pos_embed"], (8, 8), prefix=1)
    kernel = resample_patches(resample_channels(state["patch_embed.proj.weight"], 1), (8, 4))
    assert torch.equal(model.pos_embed, positions)
    assert torch.equal(model.patch_embed.proj.weight, kernel)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    changed = {entry.name: (entry.before, entry.after) for entry in report.resampled}
    assert changed == {
        "pos_embed": ((1, 17, 32), (1, 65, 32)),
        "patch_embed.proj.weight": ((32, 3, 8, 8), (32, 1, 8, 4)),
    }
    assert report.head == "dropped"


def test_a_grid_that_is_no_square_is_known_by_its_shape():
    state = weights(image_size=(64, 16))  # 8 x 2 patches, as many as 4 x 4
    model = make()
    report = fit_weights(model, state, grid=(8, 2))
    assert torch.equal(model.pos_embed, resample_positions(state["pos_embed"], (4, 4), prefix=1, old=(8, 2)))
    assert [entry.name for entry in report.resampled] == ["pos_embed"]
    state = weights(image_size=(24, 40))
    assert fit_weights(make(image_size=(24, 40)), state).resampled == []
    refused(make(), state, "pos_embed has 16 positions: not a square")


def test_a_replaced_head_is_zero_and_nothing_is_drawn():
    model, state = make(num_classes=3), weights()
    generator = torch.random.get_rng_state()
    report = fit_weights(model, state, head="replace")
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert (report.head, report.classes, report.missing) == ("replaced", (5, 3), ["head.bias", "head.weight"])
    assert torch.equal(model(torch.randn(2, 3, 32, 32)).softmax(1), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("options", "head", "match"),
    [
        ({"num_classes": 3}, "keep", "a head of 5 outputs, the model one of 3: a new one is had by head=replace"),
        ({"num_classes": 0}, "keep", "the model has none: set num_classes=5, or head=drop"),
        ({}, "drop", "head=drop, but the model has one of 5 outputs"),
        ({}, "kep", "did you mean 'keep'"),
    ],
)
def test_heads_that_contradict_the_model(options, head, match):
    refused(make(**options), weights(), match, head=head)


def test_a_backbone_has_no_head_to_keep():
    refused(make(), weights(num_classes=0), "has no head, the model one of 5")
    assert fit_weights(make(num_classes=0), weights(num_classes=0)).head == "none"
    assert fit_weights(make(), weights(num_classes=0), head="replace").classes == (0, 5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("blocks.1.attn.proj.bias"), r"missing blocks\.1\.attn\.proj\.bias"),
        (lambda w: w.pop("cls_token"), "missing cls_token"),
        (lambda w: w.pop("norm.weight"), r"missing norm\.weight"),
        (lambda w: w.pop("patch_embed.proj.weight"), "missing patch_embed"),
        (lambda w: w.update({"blocks.2.norm1.weight": torch.ones(32)}), r"unexpected blocks\.2\.norm1"),
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(32)}), r"unexpected blocks\.0\.ls1\.gamma"),
        (lambda w: w.update({"reg_token": torch.ones(1, 4, 32)}), "unexpected reg_token"),
        (lambda w: w.update({"norm_pre.weight": torch.ones(32)}), r"unexpected norm_pre"),
        (lambda w: w.update({f"text.{i}": torch.ones(1) for i in range(2)}), r"unexpected text\.0, text\.1"),
        (lambda w: w.update({"norm.weight": torch.ones(31)}), "misshapen norm.weight 31 instead of 32"),
        (lambda w: w.update({"pos_embed": torch.ones(17, 32)}), "misshapen pos_embed 17 x 32 instead of 1 x 17 x 32"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 19, 32)}), "pos_embed has 19 positions"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(31, 3, 8, 8)}), "misshapen patch_embed"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(32, 192)}), "misshapen patch_embed"),
        (lambda w: w.update({"norm.weight": torch.ones(32, dtype=torch.int8)}), "norm.weight holds torch.int8"),
        (lambda w: w.update({"norm.weight": torch.ones(32).to_sparse()}), "norm.weight holds"),
        (lambda w: w.update({"norm.weight": [1.0] * 32}), "norm.weight is list, not a tensor"),
        (lambda w: w.clear(), "no head"),
    ],
)
def test_what_fits_badly_is_refused_and_the_model_untouched(change, match):
    state = weights()
    change(state)
    refused(make(), state, match)


def test_a_few_tensors_of_nothing_are_left_over_and_reported():
    report = fit_weights(make(), {**weights(), "logit_scale": torch.ones(())})
    assert report.unexpected == ["logit_scale"]


def test_weights_of_another_project_altogether():
    refused(make(), {f"layer{i}.conv.weight": torch.ones(3) for i in range(50)}, "no head")
    refused(make(num_classes=0), {f"layer{i}.conv": torch.ones(3) for i in range(50)}, "missing cls_token.*unexpected")


def test_half_precision_becomes_the_models():
    state = {name: tensor.half() for name, tensor in weights().items()}
    model = make()
    fit_weights(model, state)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, state["head.weight"].float())


def test_pooling_otherwise_moves_the_last_norm():
    state = weights()
    model = make(pool="mean", class_token=True, num_classes=3)
    report = fit_weights(model, state, head="replace")
    assert torch.equal(model.fc_norm.weight, state["norm.weight"])
    assert report.notes == ["norm.* is used as fc_norm.*, since the model pools otherwise"]
    back = make()
    fit_weights(back, {**model.state_dict(), **{k: v for k, v in state.items() if k.startswith("head")}})
    assert torch.equal(back.norm.weight, state["norm.weight"])


def test_pooling_by_attention_is_new_with_a_new_head_only():
    model = make(pool="attention", class_token=True, num_classes=3)
    latent = model.attn_pool.latent.clone()
    report = fit_weights(model, weights(), head="replace")
    assert torch.equal(model.attn_pool.latent, latent)
    assert "attn_pool.latent" in report.missing
    refused(make(pool="attention", class_token=True), weights(), r"missing attn_pool\.")
    other = make(pool="mean", num_classes=3)
    assert fit_weights(other, weights(pool="attention"), head="replace").notes[-1].startswith("attn_pool is left out")
    refused(make(pool="mean"), weights(pool="attention"), r"unexpected attn_pool\.")


def test_a_distillation_token_starts_as_the_class_token():
    state = weights()
    model = make(distillation_token=True, num_classes=3)
    report = fit_weights(model, state, head="replace")
    assert torch.equal(model.dist_token, state["cls_token"])
    assert torch.equal(model.pos_embed[:, :2], state["pos_embed"][:, :1].expand(-1, 2, -1))
    assert torch.equal(model.pos_embed[:, 2:], state["pos_embed"][:, 1:])
    assert {"dist_token", "head_dist.weight"} <= set(report.missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = model.embed(images)
    assert torch.equal(tokens[:, 0], tokens[:, 1])


def test_the_table_is_short_plain_and_complete():
    model = make(image_size=64, num_classes=3)
    report = fit_weights(model, {**weights(), "logit_scale": torch.ones(())}, head="replace", source="weights.pth")
    assert report.table().splitlines() == [
        "weights     weights.pth",
        "loaded      29 tensors as they are",
        "resampled   pos_embed  1 x 17 x 32 -> 1 x 65 x 32",
        "missing     head.bias",
        "            head.weight",
        "unexpected  logit_scale",
        "head        replaced: 5 -> 3 outputs, from zero",
    ]
    assert report.to_dict()["resampled"] == [["pos_embed", [1, 17, 32], [1, 65, 32]]]


def test_patches_too_large_to_resample_are_refused_before_they_fill_the_memory():
    state = {**weights(), "patch_embed.proj.weight": torch.ones(32, 3, 256, 256)}
    refused(make(), state, "patches of 256 x 256")
