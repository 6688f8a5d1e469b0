"""Fine-tuning from a linear probe's head: the start is the probe, and a run never ends below it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hydra
import pytest
import torch
import yaml

from vit.data.catalogue import open_data, preprocessing_for
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.evaluation import collect_logits
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.inference.loading import load_torch
from vit.model import VisionTransformer
from vit.training import logistic
from vit.training.app import CONF, resolve_config
from vit.training.build import build_model
from vit.training.config import load_config
from vit.training.features import Backbone
from vit.training.linear_probe import Probe
from vit.training.run import train
from vit.training.start import Start

HOW = Preprocessing((16, 16), channels=1)
SMALL = ["data=digits", "data.max_images=160", "augment=none", "export.onnx=false", "logging.tensorboard=false"]
SMALL += ["logging.progress=false"]
SPOILING = ["optim.lr=0.3"]
"""Steps so large that whatever was learned is lost."""


def save(folder, names=("a", "b", "c"), **options):
    """A bundle with random weights, to start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        size = {"image_size": 16, "patch_size": 4, "in_channels": 1, "width": 16, "depth": 2, "heads": 2}
        model = VisionTransformer(**size, num_classes=len(names), init="xavier", **options).eval()
    write_bundle(folder, model, Description(model.architecture, list(names), HOW), onnx=False)
    return folder


@pytest.fixture(autouse=True)
def few_penalties(monkeypatch):
    monkeypatch.setattr(logistic, "PENALTIES", (0.1, 0.03, 0.01))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "bundle")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A folder of features that all tests share."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def compose(source, features):
    def checked(*overrides, name=source, experiment="finetune"):
        typed = [f"experiment={experiment}", f"model.name={name}", f"probe.cache={features}", *SMALL, *overrides]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return load_config(resolve_config(hydra.compose("train", typed)))

    return checked


@pytest.fixture
def run(compose, tmp_path):
    def start(*overrides, **options):
        typed = [f"run.root={tmp_path / 'runs'}", *overrides]
        result = train(compose(*typed, **options), typed)
        assert result is not None
        return result

    return start


def checkpoint(result, name):
    return torch.load(result.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


# the head


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"pool": "mean", "registers": 2}, ["lora.rank=2"]),
        ({"pool": "attention"}, []),
        ({"distillation_token": True}, []),
        ({"norm": "post"}, []),
    ],
)
def test_the_model_at_step_0_answers_as_the_probe_does(compose, tmp_path, options, lora):
    config = compose("model.drop_path=0.5", "model.dropout=0.5", *lora, name=save(tmp_path / "x", **options))
    data = open_data(config.data)
    how = preprocessing_for(config.data, data)
    model, start = build_model(config, data), Start()
    start.fit_head(config, model, data, how)
    assert model.training  # Lightning trains a model in the mode that it comes in
    probe = Probe(config, build_model(config, data), data, how)
    assert probe.fit_head(None) == start.penalty
    found, _ = collect_logits(model, data.splits["val"], how, config.data)
    torch.testing.assert_close(found, probe.logits("val")[0], atol=1e-5, rtol=0)
    wide = probe.features["val"].double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(found.double(), wide.detach(), atol=1e-5 * float(wide.detach().abs().max()), rtol=0)
    assert found.std() > 0.5


def test_a_head_that_knows_the_classes_stays(run, tmp_path, caplog):
    known = save(tmp_path / "known", names=[str(k) for k in range(10)])
    result = run("trainer.max_steps=1", "optim.lr=1e-9", name=known)
    assert "knows these classes, and stays" in (result.folder / "train.log").read_text()
    assert "penalty" not in result.metrics
    torch.testing.assert_close(load_torch(result.folder)[0].head.weight, load_torch(known)[0].head.weight)


def test_head_zero_starts_at_zero(run):
    result = run("finetune.head=zero", "trainer.max_steps=1", "optim.lr=1e-9")
    assert "penalty" not in result.metrics
    assert load_torch(result.folder)[0].head.weight.abs().max() < 1e-6


def test_a_probe_and_a_run_that_starts_from_one_share_their_features(run):
    probe = run(experiment="linear_probe")
    result = run("trainer.max_steps=1", "model.drop_path=0.1", "lora.rank=2")
    log = (result.folder / "train.log").read_text()
    assert log.count("images: found in") == 2
    assert "features of 160 test" not in log  # nobody needs them
    assert result.metrics["penalty"] == probe.metrics["penalty"]


# never below it


@pytest.mark.parametrize(
    ("monitor", "more"),
    [
        ("val/top1", ["optim=sgd", "optim.lr=10"]),
        ("val/loss", ["finetune.freeze=all"]),
        ("val/top1", ["finetune.unfreeze=0.5"]),
        ("val/loss", ["lora.rank=2"]),
    ],
)
def test_what_training_spoils_is_left_as_the_probe_had_it(run, monitor, more):
    probe = run(f"monitor={monitor}", experiment="linear_probe")
    result = run(f"monitor={monitor}", "trainer.max_epochs=2", *SPOILING, *more)
    assert checkpoint(result, "best")["global_step"] == 0
    assert checkpoint(result, "last")["global_step"] == result.metrics["steps"] == 20
    for split in ("val", "test"):
        assert result.metrics[split] == pytest.approx(probe.metrics[split], abs=1e-4)
    assert result.metrics["penalty"] == probe.metrics["penalty"]
    assert result.metrics["start"]["kept"]
    assert result.metrics["start"]["val"]["top1"] == pytest.approx(probe.metrics["val"]["top1"], abs=1e-6)
    assert "best.ckpt is the start" in (result.folder / "train.log").read_text()


def test_what_training_improves_is_better_than_the_probe(run):
    more = ("monitor=val/loss", "data.max_images=600")
    probe = run(*more, experiment="linear_probe")
    result = run(*more, "augment=gentle", "trainer.max_epochs=4", "optim.lr=2e-3", "optim.layer_decay=1")
    assert checkpoint(result, "best")["global_step"] > 0
    assert not result.metrics["start"]["kept"]
    assert result.metrics["val"]["loss_uncalibrated"] < probe.metrics["val"]["loss_uncalibrated"]


def test_without_validation_data_the_penalty_is_the_usual_one_and_the_log_says_so(run):
    result = run("data.val_fraction=0", "trainer.max_epochs=1")
    assert result.metrics["penalty"] == 1e-2
    assert "penalty 0.01 (no validation data to choose it on)" in (result.folder / "train.log").read_text()
    assert checkpoint(result, "best")["global_step"] == result.metrics["steps"]


# going on, and again


def test_the_same_seed_gives_the_same_run(run):
    a, b = (checkpoint(run("trainer.max_steps=7"), "last")["state_dict"] for _ in range(2))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize(("after", "name"), [(0, "best"), (4, "last")])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(run, monkeypatch, after, name):
    """From the middle of an epoch, and from the start itself, which was written before the first step."""
    options = ("trainer.max_epochs=2", "ema.decay=0.9", "model.drop_path=0.2")
    whole = run(*options)

    def cut_off(self, trainer, *rest):
        if trainer.global_step == after:
            if not after:
                raise RuntimeError("no power")
            trainer.should_stop = True

    where = f"vit.training.interrupt.Interrupt.on_train_batch_{'end' if after else 'start'}"
    with monkeypatch.context() as patch:
        patch.setattr(where, cut_off, raising=False)
        if after:
            run(*options)
        else:
            with pytest.raises(RuntimeError, match="no power"):
                run(*options)
    monkeypatch.setattr("vit.training.start.Probe", None)  # the head is not fitted once more
    (folder,) = set(whole.folder.parent.iterdir()) - {whole.folder}
    values = yaml.safe_load((folder / "config.yaml").read_text())
    rest = train(load_config(values | {"resume": str(folder / "checkpoints" / f"{name}.ckpt")}), [])
    assert rest is not None
    assert rest.metrics["penalty"] == whole.metrics["penalty"]
    assert rest.metrics["start"] == whole.metrics["start"]
    a, b = (checkpoint(result, "last") for result in (whole, rest))
    assert a["global_step"] == b["global_step"] == whole.metrics["steps"]
    assert [key for key in a["state_dict"] if not torch.equal(a["state_dict"][key], b["state_dict"][key])] == []


def test_two_processes_start_from_the_head_that_the_first_has_fitted(run, source, features, tmp_path, monkeypatch):
    monkeypatch.undo()
    alone = run("trainer.max_steps=3", "optim=sgd", "optim.lr=0.01")
    typed = ["experiment=finetune", f"model.name={source}", *SMALL, "trainer=ddp_cpu", "trainer.max_steps=3"]
    typed += ["trainer.max_epochs=auto", "optim=sgd", "optim.lr=0.01", "data.workers=0", "ema.decay=0.5"]
    root = tmp_path / "together"
    command = [sys.executable, str(CONF.parent / "train.py"), *typed, f"run.root={root}", "trainer.patience=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the head starts from a linear probe") == 1
    (folder,) = root.glob("finetune/*")
    assert json.loads((folder / "metrics.json").read_text())["penalty"] == alone.metrics["penalty"]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in checkpoint(alone, "last")["state_dict"].items():
        torch.testing.assert_close(state[name], tensor, atol=2e-5, rtol=1e-4)


# time


def test_the_time_for_the_features_is_part_of_the_time(run, monkeypatch):
    now = [1000.0]
    for module in ("start", "schedule", "metrics", "linear_probe"):
        monkeypatch.setattr(f"vit.training.{module}.time.monotonic", lambda: now[0])
    original = Probe.fit_head

    def slow(self, events):
        now[0] += 60.0
        return original(self, events)

    monkeypatch.setattr(Probe, "fit_head", slow)
    result = run("trainer.max_time=50", "trainer.max_epochs=null")
    assert result.metrics["steps"] == 1  # at a learning rate of zero: there was no time
    assert result.metrics["train_seconds"] == 60
    assert checkpoint(result, "best")["global_step"] == 0


# what cannot be


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=nano", "model.name=null"], r"^finetune\.head=probe: only weights that have learned something"),
        (["tune=true"], r"^tune=true measures with a head at zero: use finetune\.head=zero"),
        (["method=linear_probe"], r"^finetune\.head=probe: with method=linear_probe nothing but a linear head"),
        (["finetune.head=prob"], r"^finetune\.head: expected one of zero, probe, got 'prob'"),
    ],
)
def test_what_does_not_go_with_it_is_said_in_a_line(compose, overrides, said):
    with pytest.raises(VitError, match=said) as caught:
        compose(*overrides)
    assert "\n" not in str(caught.value)


def test_features_are_those_of_the_backbone(source):
    """What is fitted to is what the head reads, whatever mode the model is in."""
    model = load_torch(source)[0].train()
    assert Backbone(model).fingerprint() == Backbone(model.eval()).fingerprint()
