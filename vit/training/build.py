"""Build the model, the augmentation and the training module from the configuration; apply `tune=true`."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch

from vit.data.augment import BatchAugment
from vit.data.dataset import ImageData
from vit.data.loaders import TrainLoader, crops_in_loader, eval_loader, train_loader
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.training.config import Config, device_kind
from vit.training.distill import Distillation, Teacher
from vit.training.freezing import Freezing, count_trainable
from vit.training.halves import Halves
from vit.training.lora import add_lora
from vit.training.module import TrainingModule
from vit.training.optim import build_optimizer
from vit.training.pretrained import pretrained_model
from vit.training.tune import tune

log = logging.getLogger("vit")


def build_model(config: Config, data: ImageData) -> VisionTransformer:
    """Build the model of `config` for the classes of `data`, with new or pretrained weights.

    A resumed run gets its weights from its checkpoint later.
    """
    if config.model.name is not None and not config.resume:
        model = pretrained_model(config, data)
    else:
        model = VisionTransformer(**config.model.arguments(len(data.class_names)))
    if config.lora.rank is not None:
        add_lora(model, config.lora)
    if config.model.compile:
        model.compile()
    return model


def build_augment(config: Config, data: ImageData, preprocessing: Preprocessing) -> BatchAugment:
    """Build the augmentation of `config` for the classes of `data`."""
    return BatchAugment(
        config.augment,
        num_classes=len(data.class_names),
        mean=preprocessing.mean,
        std=preprocessing.std,
        seed=config.seed,
        cropped=crops_in_loader(data.splits["train"], preprocessing, config.data, config.augment),
    )


def optimizer_options(config: Config) -> dict[str, Any]:
    """Return the keyword arguments of `build_optimizer`."""
    keys = ("name", "lr", "matrix_lr", "weight_decay", "momentum", "betas", "layer_decay", "head_lr")
    return {key: getattr(config.optim, key) for key in keys}


def build_module(config: Config, data: ImageData, model: VisionTransformer, description: Description) -> TrainingModule:
    """Build the Lightning module with everything that a training step needs."""
    preprocessing, splits = description.preprocessing, data.splits
    validates = len(splits["val"]) > 0
    freezing = Freezing(model, freeze=config.finetune.freeze, unfreeze=config.finetune.unfreeze)
    if (count := count_trainable(model)) < (total := sum(p.numel() for p in model.parameters())):
        log.info("%s of %s parameters learn", f"{count:,}", f"{total:,}")
    d, distillation = config.distill, None
    if d.teacher is not None:
        teacher = Teacher(d.teacher, data.class_names, preprocessing)
        distillation = Distillation(teacher, kind=d.kind, alpha=d.alpha, temperature=d.temperature)
    halves = Halves.create_for_run(config, model)
    if halves is not None and halves.threads > 1:
        log.info("each half of a batch is computed by a thread of its own")
    return TrainingModule(
        model=model,
        augment=build_augment(config, data, preprocessing),
        description=description,
        optimizer=functools.partial(build_optimizer, **optimizer_options(config)),
        train_loader=functools.partial(
            train_loader, splits["train"], preprocessing, config.data, config.augment, seed=config.seed
        ),
        eval_loader=functools.partial(eval_loader, splits["val"], preprocessing, config.data, reused=True)
        if validates
        else None,
        ema_decay=config.ema.decay,
        patch_dropout_off=config.trainer.patch_dropout_off,
        seed=config.seed,
        freezing=freezing,
        distillation=distillation,
        lora_scale=config.lora.scale if config.lora.rank is not None else None,
        halves=halves,
    )


def tune_config(config: Config, data: ImageData, model: VisionTransformer, preprocessing: Preprocessing) -> Config:
    """Replace the batch size and the learning rates in the configuration by those that `tune` finds."""
    split, optim = data.splits["train"], config.optim
    processes = config.trainer.num_nodes * (config.trainer.devices if isinstance(config.trainer.devices, int) else 1)
    if processes > 1 or config.trainer.strategy != "auto":
        raise VitError("tune=true measures one process: run it with trainer=auto first, then set what it found")
    device = torch.device(device_kind(config.trainer.accelerator))
    augment = build_augment(config, data, preprocessing)

    def make_loader(batch_size: int) -> TrainLoader:
        sized = dataclasses.replace(config.data, batch_size=batch_size)
        return train_loader(split, preprocessing, sized, config.augment, seed=config.seed, device=device)

    batch_size, factor = tune(
        model=model,
        optimizer=functools.partial(build_optimizer, **optimizer_options(config)),
        make_loader=make_loader,
        prepare=lambda batch: augment(batch.images, batch.labels, batch.index, 0),
        device=device,
        batch_size=config.data.batch_size,
        images=max(config.data.batch_size, len(split) // 16),  # at least 16 steps an epoch
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        optim=dataclasses.replace(optim, lr=optim.lr * factor, matrix_lr=optim.matrix_lr * factor),
    )
