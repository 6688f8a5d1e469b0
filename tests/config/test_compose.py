"""Every file of conf/ composes to a configuration that passes its checks, and says what it is for."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import yaml

from vit import options
from vit.data.catalogue import CATALOGUE, DataConfig
from vit.errors import VitError
from vit.model import SIZES, VisionTransformer
from vit.model.arguments import CHOICES
from vit.training import sections
from vit.training.app import CONF
from vit.training.config import Config, EvalConfig, check_model, load_config, load_eval_config
from vit.training.sections import ModelConfig

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
}
FILES = [(group, name) for group, names in GROUPS.items() for name in names]
NEEDS_FOLDER = {("data", "folder"), ("data", "imagenet"), ("data", "parquet")}
NEEDS_FOLDER |= {("experiment", name) for name in ("folder", "imagenet_small", "finetune", "linear_probe")}
NEEDS_WEIGHTS = {("model", "pretrained"), ("experiment", "finetune"), ("experiment", "linear_probe")}
NEEDS_GPU = {"gpu", "ddp", "fsdp", "mps"}


@pytest.fixture
def needed(small_bundle):
    """What a choice cannot do without."""
    return lambda group, name: list(_needed(group, name, small_bundle))


def _needed(group, name, weights):
    if (group, name) in NEEDS_FOLDER:
        yield "data.root=photos"
    if (group, name) in NEEDS_WEIGHTS:
        yield f"model.name={weights}"
    if (group, name) == ("trainer", "fsdp"):
        yield "optim=adamw"


def test_the_groups_are_those_that_are_promised():
    assert set(GROUPS) == {
        "data", "model", "augment", "optim", "schedule", "trainer", "logging", "experiment", "debug"
    }  # fmt: skip
    assert set(GROUPS["data"]) == set(CATALOGUE)
    assert set(GROUPS["model"]) >= {"vit", *SIZES}
    assert set(GROUPS["trainer"]) >= {"auto", "cpu", "gpu", "mps", "ddp", "ddp_cpu", "fsdp"}


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_every_choice_composes_to_a_checked_configuration(group, name, compose, needed):
    values = compose(f"{group}={name}", *needed(group, name))
    config = load_config(values)
    if group == "trainer" and name in NEEDS_GPU:
        values["trainer"]["accelerator"] = "auto"  # whether a GPU is here is not the file's business
        if name == "fsdp":
            values["trainer"]["strategy"] = "ddp"
        config = load_config(values)
    check_model(config, num_classes=10)
    if group in ("data", "augment", "optim", "schedule", "trainer"):
        assert getattr(config, group).name == name


@pytest.mark.parametrize("debug", GROUPS["debug"])
@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_debug_run_of_every_experiment_composes(experiment, debug, compose, needed):
    if debug == "tiny" and ("experiment", experiment) in NEEDS_WEIGHTS:
        with pytest.raises(VitError, match=r"^model\.\w+=.*: the weights of .* leave model\.\w+ out"):
            load_config(compose(f"experiment={experiment}", "debug=tiny", *needed("experiment", experiment)))
        return
    config = load_config(compose(f"experiment={experiment}", f"debug={debug}", *needed("experiment", experiment)))
    check_model(config)
    assert config.run.name == "debug"  # where it cannot be taken for a result


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_files_and_dataclasses_have_the_same_keys(compose):
    assert sorted(leaves(compose())) == sorted(key.name for key in options.list_keys(Config))
    values = compose("checkpoint=runs/x", config_name="eval")
    assert sorted(leaves(values)) == sorted(key.name for key in options.list_keys(EvalConfig))


def whole(group, name):
    """Whether a file may set any key, not only those of its group."""
    return group in ("experiment", "debug") or (group, name) == ("model", "pretrained")


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_every_key_that_a_file_sets_exists(group, name):
    written = yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}
    written.pop("defaults", None)
    prefix = "" if whole(group, name) else f"{group}."
    assert set(leaves(written, prefix)) <= {key.name for key in options.list_keys(Config)}


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_every_file_opens_with_the_command_that_uses_it(group, name):
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    if whole(group, name):
        assert lines.pop(0) == "# @package _global_"
    assert re.match(rf"# python train\.py (.* )?{group}={name}( |$)", lines[0])
    assert re.match(r"# \S.{15,}", lines[1])  # and says what it is for
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_the_command_in_a_file_composes(group, name, compose, small_bundle):
    text = (CONF / group / f"{name}.yaml").read_text()
    command = re.search(r"^# python train\.py (.*)$", text, re.M)
    assert command is not None
    # the file's own example of a name is on a hub
    load_config(compose(*re.sub(r"model\.name=\S+", f"model.name={small_bundle}", command.group(1)).split()))


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_data_file_and_the_catalogue_agree(name, compose, needed):
    data = load_config(compose(f"data={name}", *needed("data", name))).data
    entry = CATALOGUE[name]
    for key in ("image_size", "channels", "patch_size", "batch_size"):
        assert getattr(data, key) == getattr(entry, key)


def test_the_model_section_is_the_models_own_arguments():
    arguments = inspect.signature(VisionTransformer).parameters
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - set(sections.SOURCE_KEYS) == set(arguments) - {"num_classes"}
    rules = {key.name: key.rule for key in options.list_keys(ModelConfig)}
    assert tuple(SIZES) == sections.SIZES
    for key, allowed in CHOICES.items():
        assert set(rules[key].choices) == set(allowed)


def test_the_models_starts_are_the_ones_that_it_knows():
    rules = {key.name: key.rule for key in options.list_keys(ModelConfig)}
    for start in rules["init"].choices:
        VisionTransformer(image_size=8, patch_size=4, num_classes=2, width=16, depth=1, heads=2, init=start)


def test_the_model_follows_the_data(compose):
    config = load_config(compose("data=cifar10", "data.image_size=[32,64]", "data.channels=4", "data.patch_size=8"))
    assert (config.model.image_size, config.model.in_channels, config.model.patch_size) == ((32, 64), 4, 8)
    assert config.run.name == "cifar10"
    assert load_config(compose("data=cifar10", "model.patch_size=2")).model.patch_size == 2


@pytest.mark.parametrize(
    "override",
    ["model.attention=dot_product", "model.attention=scaled_dot_product", "model.norm=post", "model.pool=attention",
     "model.pool=mean", "model.pool=token", "model.position=rotary", "model.position=sincos", "model.registers=4"],
)  # fmt: skip
def test_each_mechanism_is_one_override(override, compose):
    check_model(load_config(compose(override)), num_classes=10)


def test_experiments_win_over_groups_and_debug_over_experiments(compose):
    config = load_config(compose("experiment=fashion_mnist_cpu", "debug=fast"))
    assert config.data.name == "fashion_mnist"
    assert (config.trainer.max_epochs, config.trainer.max_time) == (1, None)
    assert load_config(compose("experiment=fashion_mnist_cpu", "data.batch_size=64", "optim=sgd")).optim.name == "sgd"


def test_a_configuration_survives_being_written_down(compose):
    config = load_config(compose("data=imagenet", "data.root=x", "augment=deit"))
    assert load_config(config.to_dict()) == config
    assert load_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_an_evaluation_gets_only_what_was_given(compose):
    plain = load_eval_config(compose("checkpoint=runs/x", config_name="eval"))
    assert (plain.checkpoint, plain.data, plain.split) == ("runs/x", {}, "test")
    moved = load_eval_config(compose("checkpoint=runs/x", "data.root=elsewhere", config_name="eval"))
    assert moved.data == {"root": "elsewhere"}
    other = load_eval_config(compose("checkpoint=runs/x", "data=folder", "data.root=photos", config_name="eval"))
    assert other.data["name"] == "folder"
    assert other.data["root"] == "photos"
    DataConfig(**other.data)
