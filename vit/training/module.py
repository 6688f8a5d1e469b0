"""What one step of training and of validation is.

Notable: the training step never waits for the device.  Loss and hits are summed where they are computed and read only
when something is shown; a loss that is not finite is noticed on the device and reported, with its step, at the next
such moment and always before a checkpoint is written.
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
    """Training went wrong by itself: the call was right, so the exit status is 1."""

    status = 1


class TrainingModule(L.LightningModule):
    """A `VisionTransformer` being trained.

    Arguments
        model: what is trained.
        augment: from uint8 images and labels to normalised images and targets.
        description: what a checkpoint says of itself.
        optimizer: makes the optimiser from the model.
        train_loader, eval_loader: make the loaders, given `rank`, `world_size` and `device`.
        ema_decay: keep an exponential moving average of the weights, None for none.
        patch_dropout_off: last share of training that sees all patches.
        seed: with the step it decides the noise of dropout, so a resumed run draws what an unbroken one would.
        freezing: which of the model's layers learn, and from when; None: all that can.
        distillation: the loss with a teacher; None: there is none, and labels are all.
        lora_scale: of the model's changes by LoRA, where it has such; None: the weights are plain.
        halves: computes each half of a batch by itself; None: the batch is computed whole.

    Attributes
        trained: how many of the model's numbers learn, sooner or later.
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
        self.trained = count_trainable(model)
        self._make_optimizer = optimizer
        self._make_train_loader, self._make_eval_loader = train_loader, eval_loader
        self._patch_dropout = model.patch_dropout
        self.progress = 0.0
        self._first_batch: int | None = None  # of this epoch that this process trains on; later than 0 after a resume
        classes = model.num_classes
        self.register_buffer("sums", torch.zeros(4), persistent=False)  # loss, top-1 hits, top-5 hits, images
        self.register_buffer("one", torch.ones(()), persistent=False)
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)
        names = ["val"] if self.ema is None else ["val", "val_raw"]
        self.val_metrics = nn.ModuleDict({name: _validation_metrics(classes) for name in names})

    @property
    def eval_model(self) -> VisionTransformer:
        """The model that validation chooses by and that is kept: the average where there is one."""
        return self.model if self.ema is None else self.ema

    # data

    def train_dataloader(self) -> TrainLoader:
        strategy = self.trainer.strategy
        self.loader = self._make_train_loader(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size, device=strategy.root_device
        )
        self.trainer.limit_train_batches = _limit(self.trainer.limit_train_batches, len(self.loader))
        return self.loader

    def val_dataloader(self) -> EvalLoader | list[Any]:
        if self._make_eval_loader is None:
            return []
        loader = self._make_eval_loader(
            rank=self.trainer.global_rank, world_size=self.trainer.world_size, device=self.trainer.strategy.root_device
        )
        self.trainer.limit_val_batches = _limit(self.trainer.limit_val_batches, len(loader))
        return loader

    # training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._first_batch = batch_idx if self._first_batch is None else self._first_batch
        torch.manual_seed((self.seed * 1_000_003 + self.trainer.global_step) * 4099 + self.global_rank)
        late = self.progress >= 1 - self.patch_dropout_off
        self.model.patch_dropout = 0.0 if late else self._patch_dropout
        if self.freezing is not None and (lowest := self.freezing.update(self.progress)) is not None:
            log.info("from step %d on learns %s", self.trainer.global_step, self.freezing.layer_name(lowest))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.augment(batch.images, batch.labels, batch.index, self.current_epoch, self.progress)
        if self.halves is not None:
            logits, loss = self.halves.forward(self._loss, images, targets)
        else:
            logits, loss = self._loss(images, targets)
        self._count(logits.detach(), targets, loss.detach())
        accumulate = self.trainer.accumulate_grad_batches
        return loss if accumulate == 1 else loss * (accumulate / self._window(batch_idx, accumulate))

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the mean loss of a batch."""
        if self.distillation is not None:
            return self.distillation(self.model, images, targets)
        logits = self.model(images)
        return logits, F.cross_entropy(logits, targets)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.halves is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.halves.backward(loss, self.model)

    def _window(self, batch_idx: int, accumulate: int) -> int:
        """How many batches the step of this batch is the mean of; Lightning divides by `accumulate` in any case."""
        start = batch_idx - batch_idx % accumulate
        end = min(start + accumulate, int(self.trainer.num_training_batches))
        return end - max(start, self._first_batch or 0)

    def on_train_epoch_end(self) -> None:
        self._first_batch = 0

    def _count(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        n = len(logits)
        self.sums += torch.stack([loss.float() * n, top[:, 0].sum(), top.sum(), self.one * n])
        unseen = torch.where(torch.isfinite(loss), self.first_bad_step, self.trainer.global_step)
        self.first_bad_step = torch.where(self.first_bad_step < 0, unseen, self.first_bad_step)

    def take_sums(self) -> dict[str, float]:
        """Mean loss, top-1 and top-5 of the augmented training images since the last call, and how many they were.

        Waits for the device.  Raises `TrainingFailed` when a loss was not finite.
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
            # short averages at first, so that the start does not linger (as TensorFlow's moving averages do it)
            step = self.trainer.global_step
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    # validation

    def evaluated(self) -> Iterator[tuple[str, VisionTransformer]]:
        """What validation measures: the model that is kept is "val", the raw weights beside an average "val_raw"."""
        yield "val", self.eval_model
        if self.ema is not None:
            yield "val_raw", self.model

    def on_validation_epoch_start(self) -> None:
        self.check_finite()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Measure a batch; returns the kept model's logits of the valid images (V, K), for whoever shows examples."""
        preprocessing = self.description.preprocessing
        images = normalise(batch.images, preprocessing.mean, preprocessing.std)
        labels = batch.labels[batch.valid]
        for name, model in self.evaluated():
            logits = model(images)[batch.valid].float()
            metrics = self.val_metrics[name]
            metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))  # type: ignore[index]
            for key in ("top1", "top5", "confusion"):
                metrics[key].update(logits, labels)  # type: ignore[index]
            if model is self.eval_model:
                kept = logits
        return kept

    def on_validation_epoch_end(self) -> None:
        for name, metrics in self.val_metrics.items():
            for key in ("loss", "top1", "top5"):
                # computed over all processes already
                self.log(f"{name}/{key}", metrics[key].compute(), sync_dist=False)  # type: ignore[index]
        self.confusion = self.val_metrics["val"]["confusion"].compute()  # type: ignore[index]
        for metrics in self.val_metrics.values():
            for metric in metrics.children():
                metric.reset()  # type: ignore[operator]

    # checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a resumed run step its weights as it is configured now, from where they and their moments are."""
        saved, now = checkpoint["optimizer_states"][0]["param_groups"], self.configure_optimizers().param_groups
        for group, typed in zip(saved, now, strict=True):
            group.update({key: typed[key] for key in ("weight_decay", "betas", "momentum") if key in typed})
            group["initial_lr"] = typed["lr"]  # its peak, which the schedule scales

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


def _limit(limit: int | float, batches: int) -> int | float:
    """At least one batch, however small the share; Lightning refuses such a share."""
    return 1 if isinstance(limit, float) and limit * batches < 1 else limit


def _validation_metrics(classes: int) -> nn.ModuleDict:
    # torchmetrics' multi-class metrics start at two classes; one output is always right, but still has a loss
    k = max(2, classes)
    accuracy = {
        f"top{n}": MulticlassAccuracy(k, top_k=min(n, classes), average="micro", validate_args=False) for n in (1, 5)
    }
    confusion = MulticlassConfusionMatrix(k, validate_args=False)
    return nn.ModuleDict({"loss": MeanMetric(), "confusion": confusion, **accuracy})
