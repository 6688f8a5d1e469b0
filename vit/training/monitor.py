"""What TensorBoard shows of a run, written straight into the run folder.

Notable:
- numbers come from readings that are taken anyway (`TrainMetrics`, validation), and the gradient's norm is computed
  only at steps that are logged;
- examples are picked from the predictions that validation makes, so no image goes through the model twice;
- pictures are drawn at most every half minute, and never more often than one per cent of the time allows; what the
  last validation showed is always drawn at the end.

One process writes: curves of training loss, validation examples and data waiting are the first process's.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import numpy as np
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.training import pictures
from vit.training.events import EventFile
from vit.training.examples import Examples
from vit.training.metrics import TrainMetrics

if TYPE_CHECKING:
    from vit.training.config import Config

log = logging.getLogger("vit")

_DRAW_EVERY = 30.0  # seconds
_DRAW_SHARE = 0.01  # of the time, at most, for drawing
_FLUSH_EVERY = 5.0  # seconds that a curve may lag behind
_CLASS_CURVES = 32  # with more classes than this, only the picture of accuracies by class


class Monitor(L.Callback):
    """Write the run's TensorBoard events.

    Args:
        config: the run's; `logging.every` and `logging.images` say how much.
        folder: the run folder.
        class_names: by label.
        train_metrics: has the training figures; it goes before this in the trainer's callbacks.

    Tags: `train/{loss,top1,top5}`, `val/...` and, under a moving average, `val_raw/...`; `lr/<group>`, `grad_norm`,
    `speed/{images_per_second,data_wait_share}`, `progress`; `val_class/<class>`; pictures `train_images`,
    `confusion`, `class_accuracy`, `examples/{right,wrong}`; the text `config`; `final/...`.

    Raises `VitError` when events cannot be written.
    """

    def __init__(self, config: Config, folder: Path, class_names: Sequence[str], train_metrics: TrainMetrics) -> None:
        self.config, self.train_metrics = config, train_metrics
        self.class_names = list(class_names)
        self._tags = pictures.tags(self.class_names)
        self.events = EventFile(folder)
        self._every = max(1, config.logging.every)
        self._examples = Examples(config.logging.images)
        self._grad_norm: Tensor | None = None
        self._logged = -1
        self._pending: tuple[int, np.ndarray] | None = None  # step and confusion of a validation not drawn yet
        self._next_draw = self._next_train_images = -math.inf

    # training

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.global_step:
            self.events.resume(trainer.global_step)
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        self.events.text("config", f"```yaml\n{text}```", trainer.global_step)
        self.events.flush()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        # every process takes part: sharded gradients have their norm only together
        if (trainer.global_step + 1) % self._every == 0:
            self._grad_norm = gradient_norm(trainer, optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        self._write_reading(trainer, pl_module)
        if self.config.logging.images and time.monotonic() >= self._next_train_images:
            began = time.monotonic()
            self._draw_train_images(trainer, pl_module, batch)
            self._next_train_images = _next(began)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._write_reading(trainer, pl_module)
            self._draw(pl_module)
            self.events.flush()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        try:
            self.events.close()
        except VitError as error:
            if str(error) != str(exception):  # the disk was full before, and that is what ends training
                log.warning("%s", error)

    def _write_reading(self, trainer: L.Trainer, module: Any) -> None:
        reading = self.train_metrics.logged
        if reading is None or reading.step == self._logged:
            return
        self._logged = reading.step
        values = {"train/loss": reading.loss, "train/top1": reading.top1, "train/top5": reading.top5}
        for i, group in enumerate(trainer.optimizers[0].param_groups):
            values[f"lr/{group.get('name', i)}"] = group["lr"]
        if self._grad_norm is not None:
            values["grad_norm"] = float(self._grad_norm)
            self._grad_norm = None
        values["speed/images_per_second"] = reading.images_per_second
        values["speed/data_wait_share"] = reading.wait_share
        values["progress"] = module.progress
        self.events.scalars(values, reading.step)
        self.events.flush(every=_FLUSH_EVERY)

    def _draw_train_images(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """The batch's first images as the model saw them: augmentation is a function of the image and the epoch."""
        n = min(len(batch.images), self.config.logging.images + self.config.logging.images % 2)  # pairs mix
        images, targets = module.augment(
            batch.images[:n], batch.labels[:n], batch.index[:n], trainer.current_epoch, module.progress
        )
        pixels = _pixels(images, module.description.preprocessing)
        captions = [pictures.target_caption(target, self.class_names) for target in targets.cpu()]
        self.events.image("train_images", pictures.grid(pixels, captions), trainer.global_step)

    # validation

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._examples.clear()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.is_global_zero and self.config.logging.images and isinstance(outputs, Tensor):
            self._examples.add(outputs, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        step = trainer.global_step
        figures = trainer.callback_metrics.items()
        values = {key: float(value) for key, value in figures if key.startswith(("val/", "val_raw/"))}
        k = len(self.class_names)
        confusion = pl_module.confusion[:k, :k].cpu().numpy()
        if k <= _CLASS_CURVES:
            accuracies = zip(self._tags, pictures.class_accuracy(confusion), strict=True)
            values |= {f"val_class/{tag}": float(value) for tag, value in accuracies if math.isfinite(value)}
        self.events.scalars(values, step)
        self._pending = (step, confusion)
        if time.monotonic() >= self._next_draw:
            self._draw(pl_module)
        self.events.flush()

    def _draw(self, module: Any) -> None:
        """Pictures of the latest validation, unless they are there already."""
        if self._pending is None:
            return
        began = time.monotonic()
        (step, counts), self._pending = self._pending, None
        self.events.image("confusion", pictures.confusion(counts, self.class_names), step)
        self.events.image("class_accuracy", pictures.accuracy_bars(counts, self.class_names), step)
        for name, rows in (("right", self._examples.right()), ("wrong", self._examples.wrong())):
            if rows:
                pixels = [pictures.to_rgb(row.image) for row in rows]
                captions = [pictures.example_caption(row, self.class_names) for row in rows]
                self.events.image(f"examples/{name}", pictures.grid(pixels, captions, good=name == "right"), step)
        self._next_draw = _next(began)

    # the end

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the hyperparameters with the final metrics, and close.

        Numbers in `metrics`, nested or not, become `final/<path>`; anything else in it is passed over.
        """
        write_outcome(self.events, self.config, metrics, max(0, self._logged))
        self.events.close()


def write_outcome(events: EventFile, config: Config, metrics: Mapping[str, Any], step: int) -> None:
    """The run's row of the HParams tab: its configuration, and the numbers in `metrics` as `final/<path>`."""
    parameters = {key: value for key, value in _flat(config.to_dict(), ".").items() if value is not None}
    parameters = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in parameters.items()}
    figures = {
        f"final/{key}": float(value)
        for key, value in _flat(metrics, "/").items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    events.hyperparameters(parameters, figures, step)


def gradient_norm(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """Euclidean norm of the gradient, before clipping, left on its device."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of the gradients
        square = norm.square().to(trainer.strategy.root_device)
        return trainer.strategy.reduce(square, reduce_op="sum").sqrt()
    return norm


def _next(began: float) -> float:
    """When to draw again, given when this drawing began."""
    now = time.monotonic()
    return now + max(_DRAW_EVERY, (now - began) / _DRAW_SHARE)


def _pixels(images: Tensor, preprocessing: Preprocessing) -> list[Any]:
    """Normalised (B, C, H, W) back to what `pictures.grid` takes."""
    mean = torch.tensor(preprocessing.mean, device=images.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=images.device)[:, None, None]
    pixels = ((images.float() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
    return [pictures.to_rgb(image) for image in pixels.cpu()]


def _flat(values: Mapping[str, Any], joint: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, joint, f"{prefix}{key}{joint}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
