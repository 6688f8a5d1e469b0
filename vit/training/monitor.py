"""Write the TensorBoard events of a run into the run folder.

Notable:
- the numbers come from `TrainMetrics` and validation; the gradient's norm is computed only at logged steps;
- examples are chosen from the predictions of validation, so no image goes through the model twice;
- pictures are drawn at most every 30 seconds and in at most one per cent of the time; those of the last validation are
  always drawn at the end.

Only the first process writes, so training loss, examples and waiting time are its own.
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
_DRAW_FRACTION = 0.01  # of the training time, at most
_FLUSH_EVERY = 5.0  # seconds
_CLASS_CURVES = 32  # with more classes, there is no curve for each


class Monitor(L.Callback):
    """Write the run's TensorBoard events.

    Args:
        config: configuration of the run; `logging.every` and `logging.images` set how much is written.
        folder: the run folder.
        class_names: class names by label.
        train_metrics: the training metrics; it stands before this in the trainer's callbacks.

    Tags: `train/{loss,top1,top5}`, `val/...` and, under a moving average, `val_raw/...`; `lr/<group>`, `grad_norm`,
    `speed/{images_per_second,data_wait_share}`, `progress`; `val_class/<class>`; pictures `train_images`,
    `confusion`, `class_accuracy`, `examples/{right,wrong}`; the text `config`; `final/...`.

    Raises `VitError` when events cannot be written.
    """

    def __init__(self, config: Config, folder: Path, class_names: Sequence[str], train_metrics: TrainMetrics) -> None:
        self.config, self.train_metrics = config, train_metrics
        self.class_names = list(class_names)
        self._tags = pictures.make_tags(self.class_names)
        self.events = EventFile(folder)
        self._every = max(1, config.logging.every)
        self._examples = Examples(config.logging.images)
        self._grad_norm: Tensor | None = None
        self._logged_step = -1
        self._pending: tuple[int, np.ndarray] | None = None  # step and confusion matrix not drawn yet
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
        # on every process, because the norm of sharded gradients needs all of them
        if (trainer.global_step + 1) % self._every == 0:
            self._grad_norm = gradient_norm(trainer, optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        self._write_metrics(trainer, pl_module)
        if self.config.logging.images and time.monotonic() >= self._next_train_images:
            start = time.monotonic()
            self._draw_train_images(trainer, pl_module, batch)
            self._next_train_images = _next_drawing_time(start)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._write_metrics(trainer, pl_module)
            self._draw(pl_module)
            self.events.flush()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        try:
            self.events.close()
        except VitError as error:
            if str(error) != str(exception):  # not again the full disk that ended training
                log.warning("%s", error)

    def _write_metrics(self, trainer: L.Trainer, module: Any) -> None:
        metrics = self.train_metrics.logged
        if metrics is None or metrics.step == self._logged_step:
            return
        self._logged_step = metrics.step
        values = {"train/loss": metrics.loss, "train/top1": metrics.top1, "train/top5": metrics.top5}
        for i, group in enumerate(trainer.optimizers[0].param_groups):
            values[f"lr/{group.get('name', i)}"] = group["lr"]
        if self._grad_norm is not None:
            values["grad_norm"] = float(self._grad_norm)
            self._grad_norm = None
        values["speed/images_per_second"] = metrics.images_per_second
        values["speed/data_wait_share"] = metrics.wait_fraction
        values["progress"] = module.progress
        self.events.scalars(values, metrics.step)
        self.events.flush(every=_FLUSH_EVERY)

    def _draw_train_images(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Draw the first augmented images of the batch; augmentation depends only on the image and the epoch."""
        n = min(len(batch.images), self.config.logging.images + self.config.logging.images % 2)  # pairs mix
        images, targets = module.augment(
            batch.images[:n], batch.labels[:n], batch.index[:n], trainer.current_epoch, module.progress
        )
        pixels = _to_images(images, module.description.preprocessing)
        captions = [pictures.target_caption(target, self.class_names) for target in targets.cpu()]
        self.events.image("train_images", pictures.draw_grid(pixels, captions), trainer.global_step)

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
        metrics = trainer.callback_metrics.items()
        values = {key: float(value) for key, value in metrics if key.startswith(("val/", "val_raw/"))}
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
        """Draw the pictures of the latest validation, once."""
        if self._pending is None:
            return
        start = time.monotonic()
        (step, counts), self._pending = self._pending, None
        self.events.image("confusion", pictures.draw_confusion(counts, self.class_names), step)
        self.events.image("class_accuracy", pictures.draw_accuracy_bars(counts, self.class_names), step)
        for name, rows in (("right", self._examples.right()), ("wrong", self._examples.wrong())):
            if rows:
                pixels = [pictures.to_rgb(row.image) for row in rows]
                captions = [pictures.example_caption(row, self.class_names) for row in rows]
                self.events.image(f"examples/{name}", pictures.draw_grid(pixels, captions, good=name == "right"), step)
        self._next_draw = _next_drawing_time(start)

    # the end

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the hyperparameters with the final metrics, and close.

        Numbers in `metrics`, nested or not, become `final/<path>`; other values are ignored.
        """
        write_hyperparameters(self.events, self.config, metrics, max(0, self._logged_step))
        self.events.close()


def write_hyperparameters(events: EventFile, config: Config, metrics: Mapping[str, Any], step: int) -> None:
    """Write the run's row of the HParams tab: the configuration, and the numbers in `metrics` as `final/<path>`."""
    parameters = {key: value for key, value in _flatten(config.to_dict(), ".").items() if value is not None}
    parameters = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in parameters.items()}
    final_metrics = {
        f"final/{key}": float(value)
        for key, value in _flatten(metrics, "/").items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    events.hyperparameters(parameters, final_metrics, step)


def gradient_norm(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute the Euclidean norm of the gradient before clipping; the result stays on the device."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of the gradients
        square = norm.square().to(trainer.strategy.root_device)
        return trainer.strategy.reduce(square, reduce_op="sum").sqrt()
    return norm


def _next_drawing_time(start: float) -> float:
    """Return the earliest time for the next drawing, from the start of this one."""
    now = time.monotonic()
    return now + max(_DRAW_EVERY, (now - start) / _DRAW_FRACTION)


def _to_images(images: Tensor, preprocessing: Preprocessing) -> list[Any]:
    """Convert normalised images (B, C, H, W) to the images of `pictures.draw_grid`."""
    mean = torch.tensor(preprocessing.mean, device=images.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=images.device)[:, None, None]
    pixels = ((images.float() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
    return [pictures.to_rgb(image) for image in pixels.cpu()]


def _flatten(values: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
