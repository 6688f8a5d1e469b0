"""TensorBoard: a real training, and what its event file says afterwards."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vit.errors import VitError
from vit.training import monitor as monitors
from vit.training.schedule import lr_factor

TRAIN = {"train/loss", "train/top1", "train/top5", "grad_norm", "progress"}
SPEED = {"speed/images_per_second", "speed/data_wait_share"}
VAL = {"val/loss", "val/top1", "val/top5"}
RATES = {"lr/decay", "lr/no_decay"}


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps(found: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in found.Scalars(tag)]


def picture(found: EventAccumulator, tag: str, which: int = 0) -> np.ndarray:
    event = found.Images(tag)[which]
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert image.format == "PNG"
    assert (image.width, image.height) == (event.width, event.height)
    return np.asarray(image)


def test_all_that_is_promised_is_there(small: ModuleType, tmp_path: Path) -> None:
    names = ["dark", "grey/ish", "br\night"]
    assert names == small.NAMES
    run = small.fit(tmp_path, "ema.decay=0.9", "schedule.warmup=0.2", epochs=3)
    found = read(tmp_path)
    classes = {"val_class/dark", "val_class/grey_ish", "val_class/br?ight"}
    raw = {tag.replace("val/", "val_raw/") for tag in VAL}
    assert set(found.Tags()["scalars"]) == TRAIN | SPEED | VAL | raw | classes | RATES
    pictures = {"train_images", "confusion", "class_accuracy", "examples/right", "examples/wrong"}
    assert set(found.Tags()["images"]) == pictures
    for tag in found.Tags()["scalars"]:
        assert all(math.isfinite(event.value) for event in found.Scalars(tag)), tag
        expected = [8, 16, 24] if tag.startswith("val") else [4, 8, 12, 16, 20, 24]
        assert steps(found, tag) == expected, tag
    for tag in pictures:
        sizes = picture(found, tag).shape
        assert 60 < sizes[0] < 800, tag
        assert 60 < sizes[1] < 800, tag
    for tag in VAL | raw:
        assert found.Scalars(tag)[-1].value == pytest.approx(float(run.trainer.callback_metrics[tag]))
    # the rate of each step is the schedule's at the progress with which the step began
    for event, progress in zip(found.Scalars("lr/decay"), found.Scalars("progress"), strict=True):
        assert progress.value == pytest.approx((event.step - 1) / 24)
        share = lr_factor((event.step - 1) / 24, name="cosine", warmup=0.2)
        assert event.value == pytest.approx(run.config.optim.lr * share, rel=1e-5)


def test_accuracies_by_class_average_to_the_whole(small: ModuleType, tmp_path: Path) -> None:
    small.fit(tmp_path, val=33)  # eleven of each class
    found = read(tmp_path)
    tags = [tag for tag in found.Tags()["scalars"] if tag.startswith("val_class/")]
    for i, event in enumerate(found.Scalars("val/top1")):
        assert np.mean([found.Scalars(tag)[i].value for tag in tags]) == pytest.approx(event.value)


def test_the_configuration_is_there_as_text(small: ModuleType, tmp_path: Path) -> None:
    run = small.fit(tmp_path)
    text = read(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("```yaml\n")
    assert text.endswith("\n```")
    assert yaml.safe_load(text.removeprefix("```yaml").removesuffix("```")) == run.config.to_dict()


class Gradients(L.Callback):
    """The norm of each step's gradient, written out."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        squares = (float(p.grad.double().square().sum()) for p in pl_module.model.parameters() if p.grad is not None)
        self.norms.append(math.sqrt(sum(squares)))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_norm_is_that_before_clipping(small: ModuleType, tmp_path: Path, accumulate: int) -> None:
    record = Gradients()
    overrides = ["optim.clip=1e-3", f"optim.accumulate={accumulate}", "logging.every=2"]
    small.fit(tmp_path, *overrides, extra=[record])
    found = read(tmp_path)
    norms = {event.step: event.value for event in found.Scalars("grad_norm")}
    assert norms == {step: pytest.approx(record.norms[step - 1], rel=1e-5) for step in norms}
    assert list(norms) == list(range(2, len(record.norms) + 1, 2))
    assert min(norms.values()) > 1e-3


class FirstBatch(L.Callback):
    """The first batch of training."""

    images: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.images is None:
            self.images = batch.images


def tile(sheet: np.ndarray, i: int, columns: int, side: int, strip: int) -> np.ndarray:
    """Pixels of the i-th image of a grid of enlarged square images."""
    width = max(side, 100)
    x, y = 8 + i % columns * (width + 8) + (width - side) // 2, 8 + i // columns * (side + strip + 8)
    return sheet[y : y + side, x : x + side]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_training_images_are_shown_as_the_model_sees_them(small: ModuleType, tmp_path: Path, channels: int) -> None:
    first = FirstBatch()
    overrides = ["augment.flip=1.0", "logging.images=4", "data.mean=[0.3]", "data.std=[0.2]"]
    small.fit(tmp_path, *overrides, channels=channels, extra=[first])
    found = read(tmp_path)
    assert [event.step for event in found.Images("train_images")] == [1]
    sheet = picture(found, "train_images")
    assert first.images is not None
    for i in range(4):
        image = first.images[i].flip(-1).numpy()
        expected = image[:3] if channels >= 3 else image[:1].repeat(3, 0)
        expected = expected.transpose(1, 2, 0).repeat(12, 0).repeat(12, 1)
        np.testing.assert_array_equal(tile(sheet, i, 2, 96, 19), expected)


def test_mixed_training_images(small: ModuleType, tmp_path: Path) -> None:
    small.fit(tmp_path, "augment.cutmix=1.0", "augment.label_smoothing=0.1", "logging.images=3")
    assert picture(read(tmp_path), "train_images").ndim == 3  # pairs are mixed, so there are four


def test_examples_are_those_that_validation_saw(small: ModuleType, tmp_path: Path) -> None:
    run = small.fit(tmp_path, "logging.images=4", "data.eval_batch_size=10", val=35)
    found = read(tmp_path)
    module, split = run.module, run.data.splits["val"]
    pixels = split.array(module.description.preprocessing)
    inputs = torch.from_numpy(module.description.preprocessing.normalise(pixels))
    with torch.no_grad():
        probabilities = module.eval_model.eval()(inputs).softmax(1)
    top, predicted = probabilities.max(1)
    wrong = sorted((i for i in range(35) if predicted[i] != split.labels[i]), key=lambda i: -float(top[i]))[:4]
    assert wrong, "the test needs mistakes"
    sheet = picture(found, "examples/wrong", -1)
    columns = math.ceil(math.sqrt(len(wrong)))
    for i, k in enumerate(wrong):
        expected = pixels[k].repeat(12, 0).repeat(12, 1)
        np.testing.assert_array_equal(tile(sheet, i, columns, 96, 34), expected)
    assert found.Images("examples/wrong")[-1].step == 16


def test_pictures_are_drawn_at_first_and_at_last_when_validations_are_quick(small: ModuleType, tmp_path: Path) -> None:
    small.fit(tmp_path, epochs=6, train=16)
    found = read(tmp_path)
    assert steps(found, "val/top1") == [2, 4, 6, 8, 10, 12]
    for tag in ("confusion", "class_accuracy"):
        assert [event.step for event in found.Images(tag)] == [2, 12]


def test_pictures_come_again_after_a_while(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "_DRAW_EVERY", 0.0)
    monkeypatch.setattr(monitors, "_DRAW_FRACTION", 1e9)
    small.fit(tmp_path, epochs=3, train=16)
    found = read(tmp_path)
    assert [event.step for event in found.Images("confusion")] == [2, 4, 6]
    assert [event.step for event in found.Images("train_images")] == [1, 2, 3, 4, 5, 6]


def test_drawing_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    assert monitors._next_drawing_time(start=99.9) == pytest.approx(130.0)
    assert monitors._next_drawing_time(start=95.0) == pytest.approx(600.0)


def test_without_images_there_are_figures_only(small: ModuleType, tmp_path: Path) -> None:
    small.fit(tmp_path, "logging.images=0")
    assert set(read(tmp_path).Tags()["images"]) == {"confusion", "class_accuracy"}


@pytest.mark.parametrize("classes", [2, 40])
def test_few_and_many_classes(small: ModuleType, tmp_path: Path, classes: int) -> None:
    small.fit(tmp_path, classes=classes, val=40)
    found = read(tmp_path)
    curves = [tag for tag in found.Tags()["scalars"] if tag.startswith("val_class/")]
    assert len(curves) == (2 if classes == 2 else 0)
    assert {"confusion", "class_accuracy"} <= set(found.Tags()["images"])


def test_without_validation_data(small: ModuleType, tmp_path: Path) -> None:
    small.fit(tmp_path, val=0)
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == TRAIN | SPEED | RATES
    assert set(found.Tags()["images"]) == {"train_images"}


def test_the_end_adds_hyperparameters_to_the_same_file(small: ModuleType, tmp_path: Path) -> None:
    run = small.fit(tmp_path)
    run.monitor.finish(
        {
            "test": {"top1": 0.75, "per_class": [{"f1": 1}], "name": "x"},
            "seed": 3,
            "interrupted": True,
            "nothing": None,
            "odd": float("nan"),
        }
    )
    assert len(list(tmp_path.iterdir())) == 1
    found = read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("final/test/top1")] == [(16, 0.75)]
    assert {tag for tag in found.Tags()["scalars"] if tag.startswith("final/")} == {"final/test/top1", "final/seed"}
    content = {tag: HParamsPluginData.FromString(raw) for tag, raw in found.PluginTagToContent("hparams").items()}
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optim.lr"].number_value == pytest.approx(run.config.optim.lr)
    assert start["optim.name"].string_value == "adamw"
    assert start["model.qkv_bias"].string_value == "true"
    assert start["optim.betas"].string_value == json.dumps(list(run.config.optim.betas))
    assert "trainer.max_time" not in start  # null
    assert {m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos} == {
        "final/test/top1",
        "final/seed",
    }


class SaveAt(L.Callback):
    """Save a checkpoint after a given epoch's validation."""

    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_continues_its_curves(small: ModuleType, tmp_path: Path) -> None:
    folder, path = tmp_path / "run", tmp_path / "one.ckpt"
    small.fit(folder, epochs=3, extra=[SaveAt(0, path)])  # went on for two epochs after the checkpoint
    time_of_first = next(folder.iterdir())
    os.rename(time_of_first, time_of_first.with_name("events.out.tfevents.0000000001.earlier"))
    small.fit(folder, epochs=4, checkpoint=path)
    assert len(list(folder.iterdir())) == 2
    found = read(folder)
    assert steps(found, "val/top1") == [8, 16, 24, 32]
    assert steps(found, "train/loss") == [4, 8, 12, 16, 20, 24, 28, 32]


def test_an_exception_leaves_a_readable_file_that_can_be_continued(small: ModuleType, tmp_path: Path) -> None:
    class Fault(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                raise RuntimeError("something else")

    run = small.prepare(tmp_path, extra=[Fault()])
    with pytest.raises(RuntimeError, match="something else"):
        run.run()
    assert steps(read(tmp_path), "train/loss") == [4, 8, 12]
    run.monitor.finish({"test": {"top1": 0.5}})
    assert len(list(tmp_path.iterdir())) == 1
    assert steps(read(tmp_path), "final/test/top1") == [12]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_ends_training_with_one_line(
    small: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = small.prepare(tmp_path)
    os.symlink("/dev/full", run.monitor.events.path)
    with pytest.raises(VitError, match=r"cannot write TensorBoard events to .*No space left") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if "TensorBoard" in record.message], "said once"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_does_not_hide_another_fault(
    small: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fault(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                run.monitor.events.close()
                run.monitor.events.path = tmp_path / "full"
                os.symlink("/dev/full", run.monitor.events.path)
                run.monitor.events.scalars({"x": 1.0}, 5)
                raise RuntimeError("something else")

    run = small.prepare(tmp_path, extra=[Fault()])
    with pytest.raises(RuntimeError, match="something else"):
        run.run()
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1


@pytest.mark.slow
def test_of_two_processes_one_writes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("small_fit.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(tmp_path / "run"), "devices=2", "bar=True"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" in all") == 1
    assert len(list((tmp_path / "run").iterdir())) == 1
    found = read(tmp_path / "run")
    assert steps(found, "train/loss") == [4, 8, 12, 16]
    assert steps(found, "val/top1") == [8, 16]
    assert set(found.Tags()["images"]) >= {"confusion", "train_images"}
