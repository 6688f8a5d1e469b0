"""This project's `train.py`, as it is typed: a contestant of `benchmarks/race.py`.

The file itself runs, with everything that it does by default.  What is added is a callback that draws the curve, and
that stops the clock of `trainer.max_time` while there is validation, as it stands for all contestants.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from course import Data, contend, size

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def train(given: dict[str, Any]) -> dict[str, Any]:
    import lightning.pytorch as L

    import vit.training.run as training
    from vit.training.metrics import Throughput
    from vit.training.schedule import Schedule

    data = Data(given["data"])

    class Watch(L.Callback):
        def __init__(self, schedule: Schedule, throughput: Throughput) -> None:
            self.schedule, self.throughput = schedule, throughput
            self.curve: list[tuple[float, float]] = []
            self.measured: dict[str, float] = {}
            self._points, self._spent = 0, 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            spent = self._spent = self.schedule.spent()
            if spent >= given["seconds"] * (self._points + 1) / given["points"] and not trainer.should_stop:
                stopped = time.monotonic()
                self._points += 1
                self.curve.append((spent, data.accuracy(pl_module.eval_model, "val")))
                self._stood(time.monotonic() - stopped)
                assert self.throughput._running_since is not None
                self.throughput._running_since += time.monotonic() - stopped

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            # the schedule's own callback has run before
            seconds, self.schedule.validation_seconds = self.schedule.validation_seconds, 0.0
            self._stood(seconds)
            self.curve.append((self.schedule.spent(), float(trainer.callback_metrics["val/top1"])))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.measured = {
                "seconds": self._spent,
                "images": self.throughput.images,
                "waiting": Throughput.wait_seconds(pl_module),
            }
            self.measured |= size(pl_module.model, data)

        def _stood(self, seconds: float) -> None:
            self.schedule._start += seconds

    real, watching = training.build_trainer, []

    def build_trainer(config: Any, folder: Path, callbacks: list[Any]) -> Any:
        schedule = next(each for each in callbacks if isinstance(each, Schedule))
        throughput = next(each for each in callbacks if isinstance(each, Throughput))
        watching.append(Watch(schedule, throughput))
        return real(config, folder, [*callbacks, watching[0]])

    training.build_trainer = build_trainer
    sys.argv = [str(TRAIN), *given["typed"]]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    (file,) = Path(given["root"]).glob("*/*/metrics.json")
    metrics = json.loads(file.read_text("utf-8"))
    return {
        "curve": watching[0].curve,
        "val": metrics["val"]["top1"],
        "test": metrics["test"]["top1"],
        **watching[0].measured,
    }


if __name__ == "__main__":
    contend(train)
