"""Whole runs on the real digits: the run folder, budgets, resuming, EMA, early stopping, bad ends."""

import io
import itertools
import json
import logging
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vit.data.catalogue import DataConfig, open_data
from vit.errors import VitError
from vit.evaluation import collect_logits, evaluate_logits
from vit.inference.loading import load_torch
from vit.training import checkpoints
from vit.training.module import TrainingFailed, TrainingModule


def weights(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def test_the_run_folder_holds_what_the_contract_lists(run):
    result = run("trainer.max_epochs=2", "export.onnx=true", "logging.tensorboard=true")
    folder = result.folder
    assert folder.parent.name == "digits"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "metrics.json", "train.log", "splits.csv"}
    expected |= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    bundle = {f"model/{name}" for name in ("model.safetensors", "config.json", "README.md", "model.onnx")}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert events
    assert names == expected | bundle | events

    metrics = json.loads((folder / "metrics.json").read_text())
    for block in ("test", "val"):
        assert all(0 <= metrics[block][key] <= 1 for key in ("top1", "top5", "ece"))
        assert metrics[block]["loss"] > 0
    assert metrics["train_seconds"] > 0
    assert metrics["images_per_second"] > 0
    assert (metrics["bad_files"], metrics["seed"], metrics["epochs"]) == (0, 0, 2)

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["image_size"] == 16  # resolved: no interpolation is left
    assert "${" not in (folder / "config.yaml").read_text()


def test_the_figures_are_those_of_the_chosen_checkpoint_on_the_test_split(run):
    result = run("trainer.max_epochs=2")
    model, description = load_torch(result.folder / "checkpoints" / "best.ckpt")
    data = open_data(DataConfig(**description.data))
    logits, labels = collect_logits(model, data.splits["test"], description.preprocessing)
    again = evaluate_logits(logits, labels, data.class_names, description.temperature)
    for key in ("top1", "top5", "loss", "ece"):
        assert again[key] == pytest.approx(result.metrics["test"][key], abs=1e-6)
    assert description.metrics["test"]["top1"] == result.metrics["test"]["top1"]
    assert description.temperature != 1.0

    bundle = load_file(result.folder / "model" / "model.safetensors")
    assert bundle.keys() == model.state_dict().keys()
    assert all(torch.equal(bundle[key], value) for key, value in model.state_dict().items())


def test_best_is_chosen_by_validation(run):
    result = run("trainer.max_epochs=4", "monitor=val/loss")
    best = torch.load(result.folder / "checkpoints" / "best.ckpt", weights_only=True)
    state = best["callbacks"]["Checkpoints(val/loss)"]
    assert state["since"] == 0
    assert state["best_model_score"] == pytest.approx(best["vit"]["metrics"]["val"]["loss_uncalibrated"], abs=1e-5)
    last = torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert best["vit"]["metrics"]["val"]["loss_uncalibrated"] <= last["vit"]["metrics"]["val"]["loss"] + 1e-6


def test_the_last_checkpoint_is_the_latest_also_where_validation_gets_worse(run):
    result = run("trainer.max_epochs=3", "optim=sgd", "optim.lr=1e-30", "data.max_images=64")
    steps = {
        name: torch.load(result.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 1, "last": 3}


def test_one_seed_gives_one_model_and_another_seed_another(run):
    first, second, third = (run("trainer.max_epochs=1", f"seed={seed}").folder for seed in (3, 3, 4))
    a, b, c = (weights(folder) for folder in (first, second, third))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.head.weight"], c["model.head.weight"])


def test_accumulated_batches_take_the_step_of_one_large_batch(run):
    large = run("trainer.max_epochs=1", "optim=sgd", "optim.lr=0.1", "data.batch_size=128").folder
    small = run("trainer.max_epochs=1", "optim=sgd", "optim.lr=0.1", "data.batch_size=64", "optim.accumulate=2").folder
    a, b = weights(large), weights(small)
    steps = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["global_step"] for f in (large, small)]
    # 1258 images: 9 batches of 128; 19 of 64, of which the odd last one makes a step of its own
    assert steps == [9, 10]
    assert max(float((a[key] - b[key]).abs().max()) for key in a if "head" in key) < 0.05


@pytest.mark.parametrize("noise", ["model.dropout=0.1", "model.patch_dropout=0.25", "model.drop_path=0.2"])
def test_an_interrupted_run_resumes_in_the_middle_of_an_epoch_as_if_nothing_happened(run, monkeypatch, noise):
    from vit.training.interrupt import Interrupt

    options = ("trainer.max_epochs=3", "ema.decay=0.9", "augment=medium", noise)
    whole = run(*options)

    original = Interrupt.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step == 27:  # in the second of three epochs of 19 steps
            self._receive(2, None)
        return original(self, trainer, *rest)

    monkeypatch.setattr(Interrupt, "on_train_batch_end", stop)
    part = run(*options)
    monkeypatch.undo()
    assert part.status == 130
    assert part.metrics["interrupted"] is True
    assert "test" not in part.metrics  # the test split is for the finished model
    assert part.metrics["steps"] == 27

    rest = run(*options, f"resume={part.folder}")
    assert rest.folder == part.folder
    assert rest.status == 0
    a, b = weights(whole.folder), weights(rest.folder)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["collect_logits", "write_bundle"])
def test_a_run_interrupted_after_training_says_how_to_go_on_and_is_finished_by_resuming(
    run, monkeypatch, capsys, place, number
):
    whole = run("trainer.max_epochs=1", "ema.decay=0.9")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(f"vit.training.run.{place}", lambda *args, **options: os.kill(os.getpid(), number))
    part = run("trainer.max_epochs=1", "ema.decay=0.9")
    monkeypatch.undo()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert part.status == 130
    assert "test" not in part.metrics
    assert part.metrics["val"]["top1"] == pytest.approx(whole.metrics["val"]["top1"])
    assert f"vit train resume={part.folder}" in capsys.readouterr().out

    rest = run("trainer.max_epochs=1", "ema.decay=0.9", f"resume={part.folder}")
    assert rest.status == 0
    assert rest.metrics["test"] == whole.metrics["test"]
    assert rest.metrics["val"] == whole.metrics["val"]
    assert rest.metrics["steps"] == whole.metrics["steps"]
    assert rest.metrics["images_per_second"] == part.metrics["images_per_second"]
    assert (rest.folder / "model" / "model.safetensors").is_file()


def test_a_second_signal_stops_at_once_and_leaves_the_signals_as_they_were(run, monkeypatch):
    original = TrainingModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run("trainer.max_epochs=1")
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_says_what_to_raise(run):
    done = run("trainer.max_epochs=1")
    before = (done.folder / "checkpoints" / "best.ckpt").read_bytes()
    with pytest.raises(VitError, match=r"trainer\.max_epochs"):
        run("trainer.max_epochs=1", f"resume={done.folder}")
    assert (done.folder / "checkpoints" / "best.ckpt").read_bytes() == before


def test_what_a_run_cannot_go_on_with_is_said_and_leaves_it_as_it_was(run, tmp_path):
    done = run("trainer.max_epochs=2")
    before = {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    for typed, said in (
        (["model.registers=2"], r"other weights \('model\.pos_embed', 'model\.reg_token'\)"),
        (["ema.decay=0.9"], r"other weights \('ema\.cls_token'"),
        (["optim=adamw"], r"steps its weights otherwise"),
        (["optim.layer_decay=0.7"], r"steps its weights otherwise"),
        (["trainer.max_epochs=1"], r"is in epoch 2: raise trainer\.max_epochs=1"),
    ):
        with pytest.raises(VitError, match=said) as caught:
            run("trainer.max_epochs=3", *typed, f"resume={done.folder}")
        assert "\n" not in str(caught.value)
    for name in ("x", "y"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (16, 16), number * 20).save(tmp_path / "other" / name / f"{number}.png")
    other = ["data=folder", f"data.root={tmp_path / 'other'}", "data.channels=1", "data.image_size=16"]
    with pytest.raises(VitError, match=r"classes of data=folder do not match .* does not know 'x', 'y'"):
        run("trainer.max_epochs=3", *other, "data.patch_size=4", f"resume={done.folder}")
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": weights(done.folder)}, bare)
    with pytest.raises(VitError, match=r"no training to go on with.* model=pretrained model\.name="):
        run("trainer.max_epochs=3", f"resume={bare}")
    assert {path: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_what_is_typed_beside_a_resumed_run_is_what_it_is_stepped_by(run, name):
    done = run("trainer.max_epochs=1", f"optim={name}")
    typed = ["optim.lr=1e-12", "optim.matrix_lr=1e-12", "optim.weight_decay=0.125"]
    rest = run("trainer.max_epochs=2", f"optim={name}", *typed, f"resume={done.folder}")
    a, b = weights(done.folder), weights(rest.folder)
    assert all(torch.allclose(a[key], b[key], rtol=0, atol=1e-7) for key in a)
    saved = torch.load(rest.folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["initial_lr"] for group in saved["param_groups"]} == {1e-12}
    assert {group["weight_decay"] for group in saved["param_groups"]} == {0.0, 0.125}


def test_resuming_from_nothing_names_what_is_expected(run, tmp_path):
    with pytest.raises(VitError, match=r"last\.ckpt"):
        run(f"resume={tmp_path}")


def test_an_average_is_validated_beside_the_raw_weights_and_kept(run):
    result = run("trainer.max_epochs=2", "ema.decay=0.99")
    checkpoint = torch.load(result.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["vit"]["weights_prefix"] == "ema."
    assert result.metrics["val"]["raw"].keys() == {"top1", "top5", "loss"}
    model, _ = load_torch(result.folder)
    state = checkpoint["state_dict"]
    assert all(torch.equal(value, state[f"ema.{key}"]) for key, value in model.state_dict().items())
    assert not torch.equal(state["ema.head.weight"], state["model.head.weight"])


def test_a_run_leaves_the_logger_as_it_found_it(run):
    logger = logging.getLogger("vit")
    before = (list(logger.handlers), logger.level, logger.propagate)
    folder = run("trainer.max_epochs=1").folder
    assert (logger.handlers, logger.level, logger.propagate) == before
    with pytest.raises(VitError):
        run("trainer.max_epochs=1", f"resume={folder}")
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_unreadable_images_are_listed_in_the_log_of_the_run_and_counted(run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (16, 16), (number * 20, 0, 99)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"not an image")
    options = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.max_bad_fraction=0.1", "data.image_size=16")
    result = run(*options, "data.workers=0", "model.patch_size=8", "trainer.max_epochs=1")
    lines = (result.folder / "train.log").read_text().splitlines()
    assert "command: " in lines[0]
    assert any("WARNING" in line and "1 of 21 images cannot be read" in line for line in lines)
    assert any("broken.png: " in line for line in lines)
    assert result.metrics["bad_files"] == 1


def test_messages_of_a_second_run_go_to_the_standard_error_of_that_time(run, monkeypatch):
    for _ in range(2):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        folder = run("trainer.max_epochs=1").folder
        monkeypatch.undo()
        assert f"run folder: {folder}" in stream.getvalue()
        stream.close()


def test_early_stopping_ends_a_run_that_no_longer_improves(run):
    result = run("trainer.max_epochs=30", "trainer.patience=2", "optim.lr=1e-30", "optim.matrix_lr=1e-30")
    assert result.metrics["epochs"] == 3
    assert result.status == 0


def test_a_step_budget_ends_with_a_validation_and_a_checkpoint(run):
    result = run("trainer.max_epochs=null", "trainer.max_steps=7")
    assert result.metrics["steps"] == 7
    assert result.metrics["val"]["images"] == 180


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(("trainer.max_epochs=null", "trainer.max_steps=7"), 7), (("trainer.max_epochs=2",), 38)],
)
def test_a_budget_that_ends_between_validations_still_validates_and_keeps_the_model(run, budget, steps):
    result = run(*budget, "trainer.validate_every=5")
    assert torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    assert result.metrics["val"]["images"] == 180


def test_a_time_budget_ends_training_and_its_schedule(run, monkeypatch):
    rates = []
    original = TrainingModule.on_train_batch_start

    def watch(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", watch)
    result = run("trainer.max_epochs=null", "trainer.max_time=00:00:04", "schedule=linear", "schedule.warmup=0")
    assert result.metrics["epochs"] >= 1
    assert all(math.isfinite(rate) for rate in rates)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] < 0.2 * rates[0]


def test_a_share_of_batches_is_at_least_one_batch(run):
    result = run("trainer.max_epochs=2", "trainer.limit_train_batches=0.01", "trainer.limit_val_batches=0.1")
    assert result.metrics["steps"] == 2
    assert result.status == 0


def test_a_data_set_smaller_than_a_batch_trains_on_all_of_it(run):
    result = run("data.max_images=40", "data.batch_size=512", "trainer.max_epochs=2")
    assert result.metrics["steps"] == 2


def test_without_validation_data_the_last_checkpoint_is_kept_uncalibrated(run):
    result = run("data.val_fraction=0", "trainer.max_epochs=1")
    _, description = load_torch(result.folder)
    assert description.temperature == 1.0
    assert "val" not in result.metrics
    assert result.metrics["test"]["images"] > 0


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(
    run, tmp_path, monkeypatch
):
    original = TrainingModule.on_train_batch_start

    def spoil(self, batch, batch_idx):
        if self.trainer.global_step == 30:  # in the second of six epochs of 19 steps
            self.model.head.weight.data.fill_(float("nan"))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", spoil)
    with pytest.raises(TrainingFailed, match="NaN or infinite at step 30") as caught:
        run("trainer.max_epochs=6")
    assert caught.value.status == 1
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    for name in ("best", "last"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 19
        assert all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())
    assert not (folder / "metrics.json").exists()


def test_a_learning_rate_that_blows_up_is_reported_with_what_to_try(run):
    with pytest.raises(TrainingFailed, match=r"optim\.lr"):
        run("trainer.max_epochs=6", "optim=sgd", "optim.lr=1e30", "schedule=constant")


def test_tune_finds_a_batch_size_and_learning_rates_and_trains_with_them(run):
    result = run("tune=true", "trainer.max_epochs=1")
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert config["optim"]["lr"] / 2e-3 == pytest.approx(config["optim"]["matrix_lr"] / 0.02)
    assert config["optim"]["lr"] != 2e-3
    assert 16 <= config["data"]["batch_size"] <= 128
    _, description = load_torch(result.folder)
    assert description.training["optim"]["lr"] == config["optim"]["lr"]  # the recipe is what was trained with
    assert description.training["batch_size"] == config["data"]["batch_size"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoints.save_checkpoint(path, {"state_dict": {"a": torch.ones(3)}})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(VitError, match=r"cannot write .*last\.ckpt"):
        checkpoints.save_checkpoint(path, {"state_dict": {"a": torch.zeros(3)}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_every_mean_in_metrics_is_a_plain_number(run):
    metrics = run("trainer.max_epochs=1").metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert isinstance(metrics["test"]["top1"], float)
    assert not isinstance(metrics["test"]["top1"], np.floating)
