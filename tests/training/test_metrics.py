"""The training metrics: its means are those of the losses themselves, read when they should be."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from vit.errors import VitError
from vit.training import metrics as meters
from vit.training.module import TrainingFailed


class Record(L.Callback):
    """Each step's loss, and what the training metrics show after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.readings: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.readings.append(next(c for c in trainer.callbacks if isinstance(c, meters.TrainMetrics)).logged)


def test_means_over_the_steps_since_the_last_reading(small: ModuleType, tmp_path: Path) -> None:
    record = Record()
    run = small.fit(tmp_path, "logging.every=3", board=False, epochs=2, extra=[record])
    steps = [reading.step if reading else None for reading in record.readings]
    assert steps == [None, None, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12, 15, 15]
    for end in (3, 6, 9, 12, 15):
        reading = record.readings[end - 1]
        assert reading.loss == pytest.approx(sum(record.losses[end - 3 : end]) / 3, rel=1e-5)
        assert 0 <= reading.top1 <= reading.top5 == 1  # three classes
        assert reading.images_per_second > 0
        assert 0 <= reading.wait_fraction <= 1
    last = run.train_metrics.logged
    assert last.step == 16, "the steps after the last multiple are read at the end"
    assert last.loss == pytest.approx(record.losses[-1], rel=1e-5)


def test_accumulated_batches_are_one_step(small: ModuleType, tmp_path: Path) -> None:
    record = Record()
    run = small.fit(tmp_path, "logging.every=2", "optim.accumulate=4", board=False, epochs=2, extra=[record])
    assert [reading.step if reading else None for reading in record.readings] == [None] * 7 + [2] * 8 + [4]
    assert run.train_metrics.logged.loss == pytest.approx(sum(record.losses[8:]) / 8, rel=1e-5)


def test_slow_steps_are_read_in_between(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_READ_EVERY", 0.0)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(
                (
                    run.train_metrics.latest.step,
                    run.train_metrics.logged and run.train_metrics.logged.step,
                    run.train_metrics.latest.loss,
                )
            )

    record = Record()
    run = small.prepare(tmp_path, "logging.every=3", board=False, epochs=1, extra=[record, Watch()])
    run.run()
    assert [row[:2] for row in seen] == [(1, None), (2, None), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6), (8, 6)]
    assert seen[4][2] == pytest.approx(sum(record.losses[3:5]) / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_training_and_names_the_step(small: ModuleType, tmp_path: Path) -> None:
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                with torch.no_grad():
                    next(pl_module.model.parameters()).fill_(float("nan"))

    run = small.prepare(tmp_path, "logging.every=4", epochs=2, extra=[Spoil()])
    with pytest.raises(TrainingFailed, match="at step 5;") as caught:
        run.run()
    assert isinstance(caught.value, VitError)
    assert run.trainer.global_step == 8
