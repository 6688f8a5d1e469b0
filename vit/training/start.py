"""Start fine-tuning from the head of a linear probe (`finetune.head=probe`).

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution": fit the head to
the features first (LP), then train all layers (FT), because the gradients of a random head distort the features.

Notable:
- the first process fits the head and broadcasts it;
- the start is validated like every epoch, so `best.ckpt` is the start if training never improves on it;
- the time counts in `trainer.max_time`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as L

from vit.data.dataset import ImageData
from vit.data.preprocess import Preprocessing
from vit.model import VisionTransformer
from vit.training.checkpoints import Checkpoints
from vit.training.config import Config
from vit.training.linear_probe import Probe
from vit.training.schedule import Schedule

log = logging.getLogger("vit")


class Start(L.Callback):
    """Fit the head of a pretrained model to its features, and validate the result before the first step.

    Attributes:
        seconds: time of fitting, including the features.
        penalty: penalty of the logistic regression; None if the pretrained head was kept.
        val: validation metrics of the start, top1 and loss.
        is_best: whether no later validation was better, so that `best.ckpt` is the start.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.penalty: float | None = None
        self.val: dict[str, float] = {}
        self.is_best = False

    def fit_head(self, config: Config, model: VisionTransformer, data: ImageData, preprocessing: Preprocessing) -> None:
        """Set the head of `model` to a linear probe on training images; a head that is not zero stays.

        Raises:
            VitError: an image cannot be read.
        """
        if model.head.weight.any():  # type: ignore[operator]  # a new head is zero
            log.info("finetune.head=probe: the head that came with the weights knows these classes, and stays")
            return
        began = time.monotonic()
        self.penalty = Probe(config, model, data, preprocessing, ("train", "val")).fit_head(None)
        self.seconds = time.monotonic() - began
        chosen = "chosen on validation images" if len(data.splits["val"]) else "no validation data to choose it on"
        log.info("the head starts from a linear probe: penalty %g (%s), %.0f s", self.penalty, chosen, self.seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "penalty": self.penalty, "val": dict(self.val)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.penalty, self.val = (state_dict[key] for key in ("seconds", "penalty", "val"))

    def metrics(self) -> dict[str, Any]:
        """Return the entries of `metrics.json` about the start."""
        penalty = {} if self.penalty is None else {"penalty": self.penalty}
        return {**penalty, "start": {"val": self.val, "kept": self.is_best}} if self.val else penalty

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1:
            for model in filter(None, (pl_module.model, pl_module.ema)):
                for head in filter(None, (model.head, model.head_dist)):
                    head.load_state_dict(trainer.strategy.broadcast(head.state_dict(), 0))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step or not trainer.val_dataloaders:
            return
        trainer.validating = True  # as in Lightning's loop between epochs
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        self.val = {key: float(trainer.callback_metrics[f"val/{key}"]) for key in ("top1", "loss")}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Schedule):
                callback.before_steps = callback.spent()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = next(callback.best for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
        self.is_best = bool(self.val) and best == {f"val/{key}": value for key, value in self.val.items()}
        if self.is_best:
            log.warning("training did not get better than its start on validation images: best.ckpt is the start")
