"""Define one step of training and of validation.

Notable: the training step never waits for the device.  Loss and correct predictions are summed on the device and read
only when metrics are shown.  A loss that is not finite is detected on the device, and reported with its step at the
next reading, always before a checkpoint is written.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vit.data.augment import BatchAugment, normalise
from vit.data.loaders import Batch, EvalLoader, TrainLoader
from vit.errors import VitError
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.training.distill import Distillation
from vit.training.freezing import Freezing, count_trainable
from vit.training.halves import Halves

log = logging.getLogger("vit")


class TrainingFailed(VitError):
    """Training failed although the call was correct, so the exit status is 1."""

    status = 1


class TrainingModule(L.LightningModule):
    """Train a `VisionTransformer` with Lightning.

    Args:
        model: the model to train.
        augment: turns uint8 images and labels into normalised images and targets.
        description: written into checkpoints.
        optimizer: makes the optimiser from the model.
        train_loader, eval_loader: make the loaders from `rank`, `world_size` and `device`.
        ema_decay: decay of an exponential moving average of the weights; None: no average.
        patch_dropout_off: the last fraction of training without patch dropout.
        seed: seeds dropout together with the step, so a resumed run draws the same noise as an unbroken one.
        freezing: freezes and unfreezes layers; None: nothing is frozen.
        distillation: the loss with a teacher; None: the loss uses only the labels.
        lora_scale: scale of the LoRA updates; None: no LoRA.
        halves: computes the batch in two halves; None: the batch is computed as a whole.

    Attributes:
        num_trainable: the count of trainable numbers.
    """

    sums: Tensor
    one: Tensor
    first_bad_step: Tensor
    loader: TrainLoader

    def __init__(
        self,
        *,
        model: VisionTransformer,
        augment: BatchAugment,
        description: Description,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        train_loader: Callable[..., TrainLoader],
        eval_loader: Callable[..., EvalLoader] | None,
        ema_decay: float | None,
        patch_dropout_off: float,
        seed: int,
        freezing: Freezing | None = None,
        distillation: Distillation | None = None,
        lora_scale: float | None = None,
        halves: Halves | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False).eval() if ema_decay else None
        self.augment, self.description = augment, description
        self.seed, self.ema_decay, self.patch_dropout_off = seed, ema_decay, patch_dropout_off
        self.freezing, self.distillation, self.lora_scale = freezing, distillation, lora_scale
        self.halves = halves
        self.num_trainable = count_trainable(model)
        self._make_optimizer = optimizer
        self._make_train_loader, self._make_eval_loader = train_loader, eval_loader
        self._patch_dropout = model.patch_dropout
        self.progress = 0.0
        self._first_batch: int | None = None  # of this epoch in this process; above 0 after a resume
        classes = model.num_classes
        self.register_buffer("sums", torch.zeros(4), persistent=False)  # loss, top-1 hits, top-5 hits, images
        self.register_buffer("one", torch.ones(()), persistent=False)
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)
        names = ["val"] if self.ema is None else ["val", "val_raw"]
        self.val_metrics = nn.ModuleDict({name: _make_validation_metrics(classes) for name in names})

    @property
    def eval_model(self) -> VisionTransformer:
        """The model to validate and export: the moving average if there is one."""
        return self.model if self.ema is None else self.ema

    # data

    def train_dataloader(self) -> TrainLoader:
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1:
            self.halves = None  # DDP averages the gradients of one backward pass
        self.loader = self._make_train_loader(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size, device=strategy.root_device
        )
        self.trainer.limit_train_batches = _limit_batches(self.trainer.limit_train_batches, len(self.loader))
        return self.loader

    def val_dataloader(self) -> EvalLoader | list[Any]:
        if self._make_eval_loader is None:
            return []
        loader = self._make_eval_loader(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size, device=self.trainer.strategy.root_device
        )
        self.trainer.limit_val_batches = _limit_batches(self.trainer.limit_val_batches, len(loader))
        return loader

    # training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._first_batch = batch_idx if self._first_batch is None else self._first_batch
        torch.manual_seed((self.seed * 1_000_003 + self.trainer.global_step) * 4099 + self.global_rank)
        off = self.progress >= 1 - self.patch_dropout_off
        self.model.patch_dropout = 0.0 if off else self._patch_dropout
        if self.freezing is not None and (lowest := self.freezing.update(self.progress)) is not None:
            log.info("from step %d on learns %s", self.trainer.global_step, self.freezing.layer_name(lowest))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.augment(batch.images, batch.labels, batch.index, self.current_epoch, self.progress)
        if self.halves is not None:
            logits, loss = self.halves.forward(self._loss, images, targets)
        else:
            logits, loss = self._loss(images, targets)
        self._add_sums(logits.detach(), targets, loss.detach())
        accumulate = self.trainer.accumulate_grad_batches
        return loss if accumulate == 1 else loss * (accumulate / self._accumulation_size(batch_idx, accumulate))

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits (B, K) and the mean loss of a batch."""
        if self.distillation is not None:
            return self.distillation(self.model, images, targets)
        logits = self.model(images)
        return logits, F.cross_entropy(logits, targets)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.halves is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.halves.backward(loss, self.model)

    def _accumulation_size(self, batch_idx: int, accumulate: int) -> int:
        """Return the number of batches in this optimiser step; Lightning always divides by `accumulate`."""
        start = batch_idx - batch_idx % accumulate
        end = min(start + accumulate, int(self.trainer.num_training_batches))
        return end - max(start, self._first_batch or 0)

    def on_train_epoch_end(self) -> None:
        self._first_batch = 0

    def _add_sums(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        n = len(logits)
        self.sums += torch.stack([loss.float() * n, top[:, 0].sum(), top.sum(), self.one * n])
        bad_step = torch.where(torch.isfinite(loss), self.first_bad_step, self.trainer.global_step)
        self.first_bad_step = torch.where(self.first_bad_step < 0, bad_step, self.first_bad_step)

    def read_sums(self) -> dict[str, float]:
        """Read and reset the mean loss, top-1 and top-5 of the training images since the last call, and their count.

        Waits for the device.  Raises `TrainingFailed` if a loss was not finite.
        """
        self.check_finite()
        loss, top1, top5, count = self.sums.tolist()
        self.sums.zero_()
        n = max(count, 1.0)
        return {"loss": loss / n, "top1": top1 / n, "top5": top5 / n, "images": count}

    def check_finite(self) -> None:
        """Raise `TrainingFailed`, naming the step, if a training loss was NaN or infinite."""
        step = int(self.first_bad_step)
        if step >= 0:
            raise TrainingFailed(
                f"the loss became NaN or infinite at step {step}; the last good checkpoint is kept. "
                "Try a lower optim.lr and optim.matrix_lr, a longer schedule.warmup, optim.clip=1 or model.qk_norm=true"
            )

    @torch.no_grad()
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.enable_grad():
            super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self.ema_decay is not None:
            # a lower decay at first, so that the initial weights fade out (as in TensorFlow's moving averages)
            step = self.trainer.global_step
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    # validation

    def eval_models(self) -> Iterator[tuple[str, VisionTransformer]]:
        """Yield the models to validate by name: "val", and with a moving average also the raw weights, "val_raw"."""
        yield "val", self.eval_model
        if self.ema is not None:
            yield "val_raw", self.model

    def on_validation_epoch_start(self) -> None:
        self.check_finite()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Validate a batch; return the logits (V, K) of `eval_model` for the valid images, for callbacks."""
        preprocessing = self.description.preprocessing
        images = normalise(batch.images, preprocessing.mean, preprocessing.std)
        labels = batch.labels[batch.valid]
        for name, model in self.eval_models():
            logits = model(images)[batch.valid].float()
            metrics = self.val_metrics[name]
            metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))  # type: ignore[index]
            for key in ("top1", "top5", "confusion"):
                metrics[key].update(logits, labels)  # type: ignore[index]
            if model is self.eval_model:
                eval_logits = logits
        return eval_logits

    def on_validation_epoch_end(self) -> None:
        for name, metrics in self.val_metrics.items():
            for key in ("loss", "top1", "top5"):
                # already computed over all processes
                self.log(f"{name}/{key}", metrics[key].compute(), sync_dist=False)  # type: ignore[index]
        self.confusion = self.val_metrics["val"]["confusion"].compute()  # type: ignore[index]
        for metrics in self.val_metrics.values():
            for metric in metrics.children():
                metric.reset()  # type: ignore[operator]

    # checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the optimiser settings in the checkpoint by those of the current configuration."""
        saved, current = checkpoint["optimizer_states"][0]["param_groups"], self.configure_optimizers().param_groups
        for group, configured in zip(saved, current, strict=True):
            group.update({key: configured[key] for key in ("weight_decay", "betas", "momentum") if key in configured})
            group["initial_lr"] = configured["lr"]  # the peak, which the schedule scales

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        blocks: dict[str, dict[str, float]] = {name: {} for name in self.val_metrics}
        for key, value in self.trainer.callback_metrics.items():
            block, _, name = key.partition("/")
            if block in blocks:
                blocks[block][name] = float(value)
        self.description.metrics = blocks
        prefix = "model." if self.ema is None else "ema."
        checkpoint["vit"] = self.description.to_dict() | {"weights_prefix": prefix}
        if self.lora_scale is not None:
            checkpoint["vit"]["lora"] = self.lora_scale


def _limit_batches(limit: int | float, batches: int) -> int | float:
    """Raise a fraction that gives less than one batch to one batch; Lightning refuses such a fraction."""
    return 1 if isinstance(limit, float) and limit * batches < 1 else limit


def _make_validation_metrics(classes: int) -> nn.ModuleDict:
    # torchmetrics needs at least two classes; a single output is always right, but has a loss
    k = max(2, classes)
    accuracy = {
        f"top{n}": MulticlassAccuracy(k, top_k=min(n, classes), average="micro", validate_args=False) for n in (1, 5)
    }
    confusion = MulticlassConfusionMatrix(k, validate_args=False)
    return nn.ModuleDict({"loss": MeanMetric(), "confusion": confusion, **accuracy})
