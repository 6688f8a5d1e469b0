"""What is left to pretrained weights, what may be said beside them, and what is refused in a line."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.bundle import read_bundle, write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.pretrained.create import create_model
from vit.training import auto
from vit.training.auto import auto_augment, auto_epochs, estimate_passes, resolve_auto
from vit.training.config import check_model, load_config
from vit.training.pretrained import default_image_size, describe_resolution


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A bundle whose images are prepared unlike any data set's."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=(28, 42), patch_size=14, num_classes=2, width=32, depth=2, heads=2, registers=1
    )
    how = Preprocessing((28, 42), mean=(0.1, 0.2, 0.3), interpolation="lanczos", crop_pct=0.7, crop_mode="border")
    folder = tmp_path_factory.mktemp("weights") / "bundle"
    write_bundle(folder, model, Description(model.architecture, ["a", "b"], how), onnx=False)
    return folder


@pytest.fixture
def pretrained(compose, weights):
    return lambda *overrides: load_config(compose("model=pretrained", f"model.name={weights}", *overrides))


@pytest.mark.parametrize("data", ["digits", "cifar10", "flowers102", "imagenet", "folder"])
def test_images_are_prepared_as_the_weights_have_it_whatever_the_data_says(pretrained, data):
    config = pretrained(f"data={data}", "data.root=x")
    d = config.data
    assert (d.size, d.channels, d.patch_size) == ((28, 42), 3, 14)
    assert (d.mean, d.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (d.interpolation, d.crop_pct, d.crop_mode) == ("lanczos", 0.7, "border")
    assert d.name == data
    assert config.model.image_size == (28, 42)
    check_model(config)


def test_the_weights_that_a_name_means_are_kept_by_their_tag(compose):
    config = load_config(compose("model=pretrained", "model.name=vit_tiny_patch16_224", "data=digits"))
    assert config.model.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    config = load_config(compose("model=pretrained", "model.name=vit_tiny_patch16_224@main", "data=digits"))
    assert config.model.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k@main"


def test_the_rest_of_the_data_set_stays_its_own(pretrained):
    assert pretrained("data=imagenet", "data.root=x").data.batch_size == 1024
    assert pretrained("data=digits").run.name == "digits"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data.image_size=56", lambda c: (c.data.size, c.model.image_size) == ((56, 56), 56)),
        ("data.mean=[0.5,0.5,0.5]", lambda c: c.data.mean == (0.5, 0.5, 0.5) and c.data.std == (0.5, 0.5, 0.5)),
        ("data.crop_pct=1", lambda c: c.data.crop_pct == 1.0 and c.data.crop_mode == "border"),
        ("data.interpolation=bicubic", lambda c: c.data.interpolation == "bicubic"),
        ("data.patch_size=7", lambda c: (c.data.patch_size, c.model.patch_size) == (7, 7)),
        ("model.patch_size=7", lambda c: c.model.patch_size == 7),
        ("data.channels=4", lambda c: c.model.in_channels == 4 and c.data.mean == pytest.approx((0.2,) * 4)),
        ("model.pool=mean", lambda c: (c.model.pool, c.model.final_norm) == ("mean", None)),
        ("model.distillation_token=true", lambda c: c.model.distillation_token is True),
        ("model.drop_path=0.3", lambda c: c.model.drop_path == 0.3),
        ("model.patch_dropout=0.5", lambda c: c.model.patch_dropout == 0.5),
    ],
)
def test_what_is_typed_wins(pretrained, typed, read):
    config = pretrained(typed)
    assert read(config)
    check_model(config)


def test_an_experiment_wins_as_typing_does(compose, weights, tmp_path):
    import hydra

    from vit.training.app import CONF, resolve_config

    (tmp_path / "experiment").mkdir()
    text = (
        "# @package _global_\ndefaults:\n  - override /model: pretrained\ndata:\n  crop_pct: 0.5\n  mean: [0, 0, 0]\n"
    )
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        search = f"hydra.searchpath=[file://{tmp_path}]"
        composed = hydra.compose("train", [search, "experiment=mine", f"model.name={weights}", "data=flowers102"])
    config = load_config(resolve_config(composed))
    assert (config.data.crop_pct, config.data.mean, config.data.crop_mode) == (0.5, (0.0, 0.0, 0.0), "border")


def test_the_architecture_is_the_weights(pretrained, weights):
    model = pretrained().model
    theirs = read_bundle(weights).architecture
    for key, value in theirs.items():
        if key != "num_classes":
            ours = getattr(model, key)
            assert (list(ours) if isinstance(ours, tuple) else ours) in (
                value,
                value[0] if isinstance(value, list) else value,
            ), key


def test_a_name_of_timms_needs_no_weights_to_be_checked(compose):
    config = load_config(compose("model=pretrained", "model.name=vit_small_patch14_dinov2", "data.image_size=70"))
    assert (config.model.width, config.model.depth, config.model.layer_scale) == (384, 12, 1e-5)
    assert (config.data.size, config.data.mean) == ((70, 70), (0.485, 0.456, 0.406))
    check_model(config)


@pytest.mark.parametrize(
    ("own", "patch", "expected"),
    [
        ((224, 224), (16, 16), [224, 224]),
        ((518, 518), (14, 14), [224, 224]),
        ((512, 512), (15, 15), [210, 210]),
        ((384, 160), (16, 16), [224, 160]),
        ((448, 448), (300, 300), [300, 300]),
        ((98, 98), (14, 14), [98, 98]),
    ],
)
def test_images_are_at_most_224_pixels_in_whole_patches_unless_typed(own, patch, expected):
    assert default_image_size(own, patch) == expected


def test_a_size_that_was_not_typed_is_one_that_can_be_afforded(compose):
    typed = ["model=pretrained", "data=digits"]
    assert load_config(compose(*typed, "model.name=vit_small_patch14_dinov2")).data.size == (224, 224)
    assert load_config(compose(*typed, "model.name=vit_small_patch14_dinov2", "data.patch_size=28")).data.size == (
        224,
        224,
    )
    assert load_config(compose(*typed, "model.name=vit_base_patch16_384")).model.image_size == 224
    assert load_config(compose(*typed, "model.name=vit_small_patch14_dinov2", "data.image_size=518")).data.size == (
        518,
        518,
    )


@pytest.mark.parametrize(
    ("own", "native", "said"),
    [
        ((224, 224), None, "224 x 224: 256 patches, 12.2 GFLOPs an image"),
        ((518, 518), None, "; data.image_size=518, the weights' own: 1,369 patches, 7.6 times the cost"),
        ((224, 224), (128, 128), "; data.image_size=126, about that of the images: 81 patches, 0.3 times the cost"),
        ((224, 224), (300, 300), "12.2 GFLOPs an image"),
    ],
)
def test_the_line_on_the_size_says_what_another_would_cost(own, native, said):
    """GFLOPs against the formula: two for each of 12 N D^2 + 2 N^2 D in 12 layers, embedding and head beside it."""
    architecture = create_model("vit_small_patch14_dinov2", image_size=224, num_classes=5).architecture
    line = describe_resolution(architecture, own, SimpleNamespace(native_size=native, sizes=None))
    assert line.startswith("image size  224 x 224")
    assert line.endswith(said)
    N, D = 257, 384
    whole = 2 * (12 * (12 * N * D**2 + 2 * N**2 * D) + 256 * D * 3 * 14**2 + D * 5)
    assert f"{whole / 1e9:.3g} GFLOPs" in line


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "model.name: whose weights to start from has to be said: a name of timm's"),
        (["model.name=vit_smal_patch16_224"], "timm has no model called 'vit_smal_patch16_224'"),
        (["model.name=runs/nothing"], "no weights at runs/nothing: expected a name of timm's"),
        (["model.name=WEIGHTS", "model.width=64"], "model.width=64: the weights of WEIGHTS have 32, and their archi"),
        (["model.name=WEIGHTS", "model.depth=1"], "leave model.depth out, or choose other weights"),
        (["model.name=WEIGHTS", "model.registers=0"], "model.registers=0: the weights of WEIGHTS have 1"),
        (["model.name=WEIGHTS", "model.qk_norm=true"], "model.qk_norm=true: the weights of WEIGHTS have false"),
        (["model.name=WEIGHTS", "model.size=tiny"], "model.size=tiny is another model: write model=pretrained"),
        (["model.name=WEIGHTS", "data.image_size=64"], "set data.image_size=56 or 70, or another data.patch_size"),
        (["model.name=WEIGHTS", "data.image_size=8"], "set data.image_size=14, or another data.patch_size"),
        (["model.name=WEIGHTS", "model.head=new"], "model.head: expected one of auto, keep, replace, got 'new'"),
        # a slip anywhere is said first: whether there are such weights does not matter yet
        (["model.name=nothing", "optim.lr=-1"], "optim.lr: expected a number above 0, got -1"),
        (["model.name=nothing", "data.crop_pct=2"], "data.crop_pct: expected a number above 0 and up to 1, got 2"),
        (["model.name=WEIGHTS", "finetune.freeze=3"], "finetune.freeze=3: the model has 2 blocks; all: only the head"),
        (["model.name=WEIGHTS", "finetune.freeze=al"], "finetune.freeze: expected a whole number of at least 0 or all"),
        (["model.name=WEIGHTS", "finetune.freeze=1", "lora.rank=2"], "finetune.freeze=1: with lora.rank=2"),
        (["model.name=WEIGHTS", "finetune.unfreeze=0.5", "lora.rank=2"], "finetune.unfreeze=0.5: with lora.rank=2"),
        (["model.name=WEIGHTS", "lora.targets=[qkv,proj2]"], "lora.targets: expected a list of one of qkv, proj"),
        (["model.name=WEIGHTS", "finetune.head=probe", "tune=true"], "tune=true measures with a head at zero"),
        (["model.name=WEIGHTS", "finetune.unfreeze=1", "trainer=fsdp", "optim=adamw"], "use trainer=ddp"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(refused, weights, overrides, told):
    typed = [text.replace("WEIGHTS", str(weights)) for text in overrides]
    assert told.replace("WEIGHTS", str(weights)) in refused("model=pretrained", *typed)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.name=WEIGHTS"], "write model=pretrained model.name=WEIGHTS, without a size"),
        (["finetune.freeze=1"], "finetune.freeze=1: only weights that have learned something"),
        (["finetune.head=probe"], "finetune.head=probe: only weights that have learned something"),
        (["lora.rank=8"], "lora.rank=8: only weights that have learned something"),
        (
            ["model.size=null"],
            "model.size: may only be null where model.width, model.depth and model.heads are all given",
        ),
        (["method=linear_prob"], "did you mean 'linear_probe'?"),
    ],
)
def test_what_needs_weights_is_refused_without(refused, weights, overrides, told):
    typed = [text.replace("WEIGHTS", str(weights)) for text in overrides]
    assert told.replace("WEIGHTS", str(weights)) in refused(*typed)


def test_an_experiment_without_a_name_says_what_it_needs(refused):
    for name in ("finetune", "linear_probe"):
        assert refused(f"experiment={name}", "data.root=x").startswith("model.name: whose weights to start from")


# what the images and the time decide


@pytest.mark.parametrize("rule", [auto.AUGMENT_BY_IMAGES, auto.AUGMENT_BY_PASSES], ids=["images", "passes"])
def test_augmentation_is_the_weaker_of_what_suits_images_and_passes(rule):
    limits = [limit for limit, _ in rule]
    assert limits == sorted(limits)
    for (limit, name), (_, after) in itertools.pairwise(rule):
        for number, expected in ((limit - 0.1, name), (limit, after)):
            many = {"images": 10**9, "passes": 10**9} | {
                "images" if rule is auto.AUGMENT_BY_IMAGES else "passes": number * 10
            }
            assert auto_augment(int(many["images"]), 10, many["passes"] / 10) == expected
    assert auto_augment(10, 10, 1) == auto.AUGMENT_BY_IMAGES[0][1]


@pytest.mark.parametrize(
    ("typed", "passes"),
    [
        (["trainer.max_epochs=7"], 7),
        (["trainer.max_epochs=7", "trainer.max_steps=50", "data.batch_size=100", "optim.accumulate=2"], 7),
        (["trainer.max_epochs=70", "trainer.max_steps=50", "data.batch_size=100", "optim.accumulate=2"], 10),
        (["trainer.max_epochs=null", "trainer.max_steps=3", "data.batch_size=100"], 0.3),
    ],
)
def test_passes_are_those_of_the_budget_that_ends_first(pretrained, typed, passes):
    assert estimate_passes(pretrained(*typed), 1000, 2) == pytest.approx(passes)


def test_passes_in_a_time_grow_with_the_time_and_fall_with_what_an_image_costs(pretrained):
    """And no clock is read: they are the same in every process, and on a machine that is busy."""
    typed = ["trainer.max_epochs=null", "trainer.max_steps=null", "trainer=cpu"]
    one, twice = (estimate_passes(pretrained(*typed, f"trainer.max_time={s}"), 1000, 2) for s in (60, "00:02:00"))
    large = estimate_passes(pretrained(*typed, "trainer.max_time=60", "data.image_size=[280,420]"), 1000, 2)
    assert twice == pytest.approx(2 * one)
    assert large < one / 100


def test_epochs_fall_with_the_images_and_steps_still_grow():
    counts = [10, 100, 1000, 10_000, 100_000, 1_000_000]
    epochs = [auto_epochs(n) for n in counts]
    assert epochs == sorted(epochs, reverse=True)
    assert (epochs[0], epochs[-1]) == (100, 5)
    seen = [n * e for n, e in zip(counts, epochs, strict=True)]
    assert seen == sorted(seen)


class Counted:
    """As much of a data set as the rules look at."""

    def __init__(self, images, classes):
        self.splits, self.class_names = {"train": np.zeros(images)}, [str(k) for k in range(classes)]


def test_what_is_typed_stays_when_the_rest_is_settled(pretrained, weights, compose, caplog):
    caplog.set_level("INFO", logger="vit")
    typed = ["experiment=finetune", "data.root=x", f"model.name={weights}", "augment.flip=0", "augment.rotate=5"]
    config = resolve_auto(load_config(compose(*typed)), Counted(10_000, 2), typed)
    chosen = auto_augment(10_000, 2, auto_epochs(10_000))
    assert config.augment.name == chosen
    plain = load_config(compose(f"augment={chosen}")).augment
    assert plain.flip == 0.5
    assert (config.augment.flip, config.augment.rotate) == (0.0, 5.0)
    assert caplog.messages[1].endswith("; as typed: flip, rotate")
    assert config.augment.label_smoothing == plain.label_smoothing
    assert config.trainer.max_epochs == auto_epochs(10_000)
    typed += ["augment=light", "trainer.max_epochs=3"]
    config = resolve_auto(load_config(compose(*typed)), Counted(10_000, 2), typed)
    assert (config.augment.name, config.trainer.max_epochs) == ("light", 3)


def test_a_choice_that_contradicts_the_rest_is_refused(compose, weights):
    typed = ["experiment=finetune", "data.root=x", f"model.name={weights}", "trainer=ddp_cpu", "data.batch_size=6"]
    typed += ["trainer.max_epochs=200"]
    config = load_config(compose(*typed))
    with pytest.raises(VitError, match=r"data\.batch_size=6 .* even parts"):
        resolve_auto(config, Counted(1_000_000, 2), typed)


def test_plain_types_only(pretrained):
    json.dumps(pretrained().to_dict())
