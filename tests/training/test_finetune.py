"""Whole runs from pretrained weights on the real digits: what is taken over, what learns, what is refused."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys

import hydra
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vit.data.catalogue import open_data
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.bundle import read_bundle, write_bundle
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.model import VisionTransformer
from vit.training.app import CONF, resolve_config
from vit.training.build import build_model
from vit.training.config import load_config
from vit.training.freezing import Freezing
from vit.training.optim import layer_index
from vit.training.run import train

DIGITS = [str(k) for k in range(10)]
ODD = Preprocessing(
    image_size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8,
    crop_mode="squash",
)  # fmt: skip
SMALL = ["optim=adamw", "data.max_images=160", "data.batch_size=32", "augment=none", "trainer.max_epochs=2"]
SMALL += ["export.onnx=false", "logging.tensorboard=false", "logging.progress=false"]


def make(folder, names=("a", "b", "c"), preprocessing=ODD, **options):
    """A bundle of a model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        options = {"width": 32, "depth": 3, "heads": 2, "patch_size": 8, "in_channels": 3, **options}
        model = VisionTransformer(image_size=preprocessing.image_size, num_classes=len(names), **options).eval()
    write_bundle(folder, model, Description(model.architecture, list(names), preprocessing), onnx=False)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights to start from, for other classes.  Read only."""
    return make(tmp_path_factory.mktemp("source") / "bundle")


def compose(*overrides):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return load_config(resolve_config(hydra.compose("train", [*SMALL, *overrides])))


@pytest.fixture
def tune(tmp_path, source):
    """Train from `source` in this process: gives a `RunResult`."""

    def start(*overrides, name=source):
        typed = [f"run.root={tmp_path / 'runs'}", "model=pretrained", f"model.name={name}", *overrides]
        result = train(compose(*typed), typed)
        assert result is not None
        return result

    return start


def weights(folder, name="last", prefix="model."):
    state = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# what is taken over


def test_preprocessing_and_architecture_travel_with_the_weights(tune, source):
    folder = tune().folder
    description = read_bundle(folder / "model")
    assert description.preprocessing == ODD
    theirs = read_bundle(source).architecture
    assert description.architecture == {**theirs, "num_classes": 10}
    assert description.class_names == DIGITS
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["mean"] == [0.1, 0.2, 0.3]
    assert (config["data"]["image_size"], config["data"]["crop_mode"]) == (32, "squash")
    assert (config["model"]["width"], config["model"]["depth"], config["model"]["patch_size"]) == (32, 3, 8)
    assert description.training["pretrained"]["name"] == str(source)


def test_what_is_typed_wins_and_weights_are_resampled(tune, capsys):
    folder = tune("data.image_size=16", "data.crop_pct=1", "data.mean=[0.5,0.5,0.5]", "model.drop_path=0.1").folder
    description = read_bundle(folder / "model")
    assert description.preprocessing.image_size == (16, 16)
    assert description.preprocessing.crop_pct == 1.0
    assert description.preprocessing.mean == (0.5, 0.5, 0.5)
    assert description.preprocessing.std == ODD.std
    assert description.architecture["drop_path"] == 0.1
    assert load_file(folder / "model" / "model.safetensors")["pos_embed"].shape == (1, 5, 32)
    said = capsys.readouterr().err
    for text in (said, (folder / "train.log").read_text()):
        assert text.count("pos_embed  1 x 17 x 32 -> 1 x 5 x 32") == 1
        assert text.count("head        replaced: 3 -> 10 outputs") == 1


def test_grey_data_stays_colour_for_the_weights_unless_typed(source):
    assert compose("model=pretrained", f"model.name={source}").data.channels == 3
    grey = compose("model=pretrained", f"model.name={source}", "data.channels=1")
    assert grey.data.mean == pytest.approx((0.2,))
    assert grey.data.std == pytest.approx((0.5,))
    model = build_model(grey, open_data(grey.data))
    expected = load_file(source / "model.safetensors")["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), expected)


def test_the_head_is_kept_where_the_classes_are_the_same_in_any_order(tmp_path):
    turned = DIGITS[::-1]
    known = make(tmp_path / "known", names=turned)
    configs = [compose("model=pretrained", f"model.name={known}", f"model.head={head}") for head in ("auto", "replace")]
    kept, new = (build_model(config, open_data(config.data)) for config in configs)
    theirs = load_file(known / "model.safetensors")["head.weight"]
    assert torch.equal(kept.head.weight, theirs.flip(0))
    assert not new.head.weight.any()


def test_a_head_of_other_classes_is_not_kept(tune):
    with pytest.raises(VitError, match=r"head=keep, but .* use head=replace"):
        tune("model.head=keep")


def test_one_more_fine_tuning_starts_from_a_run(tune, tmp_path):
    first = tune().folder
    second = tune("trainer.max_epochs=1", "optim.lr=1e-9", name=first).folder
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    assert read_bundle(second / "model").preprocessing == ODD


def test_a_distillation_token_may_be_new(tune):
    description = read_bundle(tune("model.distillation_token=true", "trainer.max_epochs=1").folder / "model")
    assert description.architecture["distillation_token"] is True


# going on


def test_a_resumed_run_needs_the_weights_no_more(tune, source, tmp_path, monkeypatch):
    from vit.training.interrupt import Interrupt

    name = tmp_path / "moved"
    shutil.copytree(source, name)
    options = (
        "ema.decay=0.9",
        "model.drop_path=0.2",
        "finetune.unfreeze=0.8",
        "optim.layer_decay=0.7",
        "optim.head_lr=5",
    )
    whole = tune(*options, name=name)
    original = Interrupt.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step == 4:  # of ten; not all layers learn yet
            self._receive(2, None)
        return original(self, trainer, *rest)

    monkeypatch.setattr(Interrupt, "on_train_batch_end", stop)
    part = tune(*options, name=name)
    monkeypatch.undo()
    assert (part.status, part.metrics["steps"]) == (130, 4)
    shutil.rmtree(name)
    config = load_config(yaml.safe_load((part.folder / "config.yaml").read_text()) | {"resume": str(part.folder)})
    rest = train(config, [])
    assert rest is not None
    assert rest.metrics["steps"] == 10
    a, b = weights(whole.folder), weights(rest.folder)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_written_configuration_is_the_same_configuration(source):
    config = compose("model=pretrained", f"model.name={source}")
    assert load_config(config.to_dict()) == config


# what learns


@pytest.mark.parametrize(("freeze", "lowest"), [("1", 2), ("all", 4)])
def test_frozen_layers_end_as_they_began_to_the_bit(tune, source, freeze, lowest):
    result = tune(f"finetune.freeze={freeze}", "ema.decay=0.5")
    theirs = load_file(source / "model.safetensors")
    for prefix in ("model.", "ema."):
        ours = weights(result.folder, prefix=prefix)
        for name, tensor in theirs.items():
            if not name.startswith("head."):
                frozen = layer_index(name, 3) < lowest
                assert torch.equal(ours[name], tensor) is frozen, name
    count = sum(t.numel() for name, t in weights(result.folder).items() if layer_index(name, 3) >= lowest)
    assert result.metrics["trained_parameters"] == count < result.metrics["parameters"]


def test_each_layer_stays_to_the_bit_until_its_time(tune, monkeypatch):
    seen = []
    original = Freezing.update

    def watched(self, progress):
        changed = original(self, progress)
        seen.append(
            (self._lowest, {layer: [p.detach().clone() for at, p in self._layers if at == layer] for layer in range(4)})
        )
        return changed

    monkeypatch.setattr(Freezing, "update", watched)
    tune("finetune.unfreeze=0.8", "optim.weight_decay=0.5", "optim=muon")
    start, steps = seen[0][1], seen[1:]  # the first call comes before training
    assert [lowest for lowest, _ in steps] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    for layer in range(4):
        free = [k for k, (lowest, _) in enumerate(steps) if lowest <= layer]
        for k, (_, found) in enumerate(steps):
            same = all(torch.equal(a, b) for a, b in zip(found[layer], start[layer], strict=True))
            assert same is (k <= free[0]), (layer, k)


def test_two_processes_free_layers_together(source, tmp_path):
    def run(*more):
        root = tmp_path / f"runs{len(more)}"
        command = [sys.executable, str(CONF.parent / "train.py"), *SMALL, "model=pretrained", f"model.name={source}"]
        command += ["finetune.unfreeze=0.8", "optim=sgd", "data.workers=0", f"run.root={root}", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (folder,) = root.glob("*/*")
        return weights(folder), done.stderr

    (alone, _), (together, said) = run(), run("trainer=ddp_cpu", "trainer.max_epochs=2")
    assert all(torch.allclose(alone[key], together[key], atol=2e-5) for key in alone)
    assert said.count("head        replaced: 3 -> 10 outputs") == 1
    assert said.count("learns every layer") == 1


# LoRA


def test_lora_trains_changes_and_head_and_ends_as_plain_weights(tune, source):
    result = tune("lora.rank=2", "lora.targets=[qkv,fc2]", "lora.dropout=0.1", "optim.lr=0.01", "ema.decay=0.5")
    folder, theirs = result.folder, load_file(source / "model.safetensors")
    state = weights(folder, "best")
    assert any(".lora_A." in key for key in state)
    for name, tensor in theirs.items():
        if not name.startswith("head."):
            key = name.replace(".weight", ".base_layer.weight") if name.endswith(("qkv.weight", "fc2.weight")) else name
            key = key.replace(".bias", ".base_layer.bias") if name.endswith(("qkv.bias", "fc2.bias")) else key
            assert torch.equal(state[key], tensor), name
    bundle = load_file(folder / "model" / "model.safetensors")
    assert bundle.keys() == theirs.keys()
    changed = {name for name in theirs if not name.startswith("head.") and not torch.equal(bundle[name], theirs[name])}
    assert changed == {f"blocks.{k}.{place}.weight" for k in range(3) for place in ("attn.qkv", "mlp.fc2")}
    # 3 blocks of rank 2: 2 (32 + 96) and 2 (128 + 32); and the head
    assert result.metrics["trained_parameters"] == 3 * 2 * (128 + 160) + 330
    assert result.metrics["parameters"] == sum(tensor.numel() for tensor in bundle.values())


def test_merged_weights_answer_as_the_changes_beside_them(tune, source):
    folder = tune("lora.rank=3", "lora.alpha=7", "optim.lr=0.01", "trainer.max_epochs=1").folder
    config = load_config(yaml.safe_load((folder / "config.yaml").read_text()) | {"resume": str(folder)})
    apart = build_model(config, open_data(config.data)).eval()
    apart.load_state_dict(weights(folder, "best"))
    images = torch.randn(8, 3, 32, 32)
    expected = apart(images).detach()
    for model in (folder, folder / "checkpoints" / "best.ckpt"):
        torch.testing.assert_close(load_torch(model)[0](images).detach(), expected, atol=1e-5, rtol=1e-5)
    import peft  # and its own merging agrees

    merged = copy.deepcopy(apart)
    for module in merged.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    torch.testing.assert_close(merged(images).detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_run_with_lora_goes_on(tune, monkeypatch):
    options = ("lora.rank=2", "lora.dropout=0.2", "trainer.max_epochs=2")
    whole = tune(*options)
    part = tune(*options[:2], "trainer.max_epochs=1", "trainer.max_steps=10")
    values = yaml.safe_load((part.folder / "config.yaml").read_text())
    values["trainer"] |= {"max_epochs": 2, "max_steps": None}
    rest = train(load_config(values | {"resume": str(part.folder)}), [])
    assert rest is not None
    assert rest.metrics["steps"] == whole.metrics["steps"] == 10


def test_attention_is_logged_and_explained_while_lora_trains(tune, caplog):
    with caplog.at_level(logging.WARNING, logger="vit"):
        folder = tune("lora.rank=2", "logging.tensorboard=true", "logging.every=1").folder
    assert "attention is not logged" not in (folder / "train.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert "attention/rollout" in events.Tags()["images"]
    assert "attention/relevance" in events.Tags()["images"]


def test_without_peft_the_line_says_how_to_get_it(tune, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(VitError, match=r'^lora\.rank needs peft.*: pip install "vit-classifier\[lora\]"$'):
        tune("lora.rank=2")


# a teacher


@pytest.mark.parametrize("extra", [[], ["model.distillation_token=true", "distill.kind=hard"]])
def test_a_teacher_is_learned_from_and_left_behind(tune, tmp_path, extra):
    teacher = make(tmp_path / "teacher", names=["x", *DIGITS[::-1]], width=16, heads=1)
    result = tune(f"distill.teacher={teacher}", "distill.alpha=1", *extra)
    checkpoint = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
    prefixes = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert prefixes == {"model"}
    assert read_bundle(result.folder / "model").training["distill"]["teacher"] == str(teacher)


def test_learning_from_a_teacher_alone_brings_its_answers_nearer(tmp_path):
    """From scratch, with the teacher as the only source: the student ends near what the teacher says."""
    teacher = make(tmp_path / "teacher", names=DIGITS, preprocessing=Preprocessing(image_size=(16, 16)))
    with torch.no_grad():
        model, description = load_torch(teacher)
        model.head.weight.mul_(40)
    shutil.rmtree(teacher)
    write_bundle(teacher, model, description, onnx=False)
    typed = ["model.depth=2", "model.width=32", "model.heads=2", f"run.root={tmp_path / 'runs'}", "optim.lr=0.01"]
    typed += [f"distill.teacher={teacher}", "distill.alpha=1", "distill.temperature=1", "trainer.max_epochs=20"]
    result = train(compose(*typed), typed)
    assert result is not None
    student, own = load_torch(result.folder / "checkpoints" / "last.ckpt")
    data = open_data(compose().data).splits["test"]
    agree = []
    for net, how in ((student, own.preprocessing), (model, description.preprocessing)):
        pixels = torch.from_numpy(how.normalise(data.array(how)))
        agree.append(net(pixels).argmax(1))
    assert float((agree[0] == agree[1]).float().mean()) > 0.6


def test_a_teacher_that_is_not_there_is_said_before_anything_is_written(tune, tmp_path):
    with pytest.raises(VitError, match="nothing-here"):
        tune("distill.teacher=nothing-here")
    assert not (tmp_path / "runs").exists()


# experiment=finetune


def test_the_recipe_settles_what_the_data_decides(tmp_path, source):
    typed = ["experiment=finetune", "data=digits", f"model.name={source}", f"run.root={tmp_path / 'runs'}"]
    typed += [*(text for text in SMALL if not text.startswith(("augment", "trainer.max_epochs", "optim")))]
    typed += ["trainer.max_steps=2", "augment.flip=0"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = load_config(resolve_config(hydra.compose("train", typed)))
    assert (config.augment.name, config.trainer.max_epochs) == ("auto", "auto")
    result = train(config, typed)
    assert result is not None
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    log = (result.folder / "train.log").read_text()
    assert "augment=auto: gentle, the weaker of what suits 16 training images a class (" in log
    assert ") and 0.4 passes (" in log
    assert "trainer.max_epochs=auto: 71, for 160 training images" in log
    assert saved["augment"]["name"] == "gentle"
    assert saved["trainer"]["max_epochs"] == 71
    assert json.loads((result.folder / "metrics.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("model.weights=nothing.pth", r"no weights at nothing\.pth"),
        ("model.weights=vit_tiny_patch16_224.augreg_in21k", r"not in the cache, and HF_HUB_OFFLINE is set"),
        ("distill.teacher=nothing", r"^distill\.teacher=nothing: no model at nothing"),
    ],
)
def test_weights_that_cannot_be_had_are_said_before_the_data_is_looked_through(tune, monkeypatch, typed, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("vit.training.run.open_data", None)
    with pytest.raises(VitError, match=said):
        tune(typed)


def test_a_new_pooling_layer_that_would_not_learn_is_refused(tune):
    pytest.importorskip("peft")
    with pytest.raises(VitError, match=r"model\.pool=attention: new to the weights .* with lora\.rank=2"):
        tune("model.pool=attention", "lora.rank=2")
    assert tune("model.pool=attention", "finetune.freeze=all", "trainer.max_epochs=1").metrics["test"]
