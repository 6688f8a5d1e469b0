"""Choose the augmentation and the number of epochs from the number of images and the time budget.

For fine-tuning (`augment=auto`, `trainer.max_epochs=auto`).  The rules and their results are logged.  Settings of the
user take precedence.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import yaml

from vit.data.augment_config import AugmentConfig
from vit.data.dataset import ImageData
from vit.processors import count_cpus
from vit.training.config import CONF, Config, check_config

log = logging.getLogger("vit")

AUGMENT_BY_IMAGES = ((50, "gentle"), (500, "medium"), (math.inf, "deit"))
"""Upper limits (exclusive) of training images per class, each with the file of conf/augment to use."""

AUGMENT_BY_PASSES = ((30, "mild"), (100, "medium"), (math.inf, "deit"))
"""The same for passes over the images: in few passes, strong augmentation makes the result worse."""

CPU_CORE_FLOPS, GPU_FLOPS = 50e9, 50e12
"""Approximate training FLOPs per second of a CPU core and of a GPU."""

_WEAKEST_FIRST = ("gentle", "mild", "medium", "deit")
_EPOCH_SCALE, _MIN_EPOCHS, _MAX_EPOCHS = 900, 5, 100


def auto_augment(images: int, classes: int, passes: float = math.inf) -> str:
    """Choose a file of conf/augment by images per class and by passes over the images; the weaker one is used."""
    per_class = images / max(1, classes)
    names = (next(name for limit, name in rule if n < limit or limit == math.inf)
             for rule, n in ((AUGMENT_BY_IMAGES, per_class), (AUGMENT_BY_PASSES, passes)))  # fmt: skip
    return min(names, key=_WEAKEST_FIRST.index)


def auto_epochs(images: int) -> int:
    """Return the epochs to fine-tune for: 900 / sqrt(images), from 5 to 100; steps grow with the root of the images."""
    return min(_MAX_EPOCHS, max(_MIN_EPOCHS, round(_EPOCH_SCALE / math.sqrt(max(1, images)))))


def estimate_passes(config: Config, images: int, classes: int) -> float:
    """Estimate the passes over the images that the budgets allow; `max_epochs` must be a number by now.

    A time limit is converted with the model's FLOPs and `CPU_CORE_FLOPS` or `GPU_FLOPS`, not measured, so that every
    process, also on a busy machine, gets the same result.
    """
    t, passes = config.trainer, [float(config.trainer.epochs or math.inf)]
    if t.max_steps is not None:
        passes.append(t.max_steps * config.data.batch_size * config.optim.accumulate / max(1, images))
    if t.max_seconds is not None:
        import torch

        from vit.model import VisionTransformer
        from vit.model.cost import flops

        with torch.device("meta"):
            flops_per_image = 3 * flops(VisionTransformer(**config.model.arguments(max(2, classes))).architecture)
        gpus = torch.cuda.device_count() if t.accelerator != "cpu" else 0
        flops_per_second = (
            GPU_FLOPS * (min(gpus, t.devices) if isinstance(t.devices, int) else gpus)
            if gpus
            else CPU_CORE_FLOPS * count_cpus()
        )
        passes.append(t.max_seconds * flops_per_second * t.num_nodes / flops_per_image / max(1, images))
    return min(passes)


def resolve_auto(config: Config, data: ImageData, overrides: Sequence[str]) -> Config:
    """Replace "auto" in the configuration by the values for `data`; keys of `augment` that the user set stay.

    Raises:
        VitError: the chosen values contradict other settings.
    """
    images, classes = len(data.splits["train"]), len(data.class_names)
    changed = config
    if config.trainer.max_epochs == "auto":
        epochs = auto_epochs(images)
        changed = dataclasses.replace(changed, trainer=dataclasses.replace(changed.trainer, max_epochs=epochs))
        log.info("trainer.max_epochs=auto: %d, for %d training images (900 / sqrt(images), 5 to 100)", epochs, images)
    if config.augment.name == "auto":
        passes = estimate_passes(changed, images, classes)
        name = auto_augment(images, classes, passes)
        chosen, user = _read_augment(name), _user_settings(config.augment, overrides)
        chosen = {key: value for key, value in chosen.items() if key != "defaults"} | user
        changed = dataclasses.replace(changed, augment=AugmentConfig(**chosen))
        log.info(
            "augment=auto: %s, the weaker of what suits %d training images a class (%s) and %.3g passes (%s)%s",
            name,
            round(images / max(1, classes)),
            _format_rule(AUGMENT_BY_IMAGES),
            passes,
            _format_rule(AUGMENT_BY_PASSES),
            f"; as typed: {', '.join(sorted(user))}" if user else "",
        )
    if changed is not config:
        check_config(changed)
    return changed


def _read_augment(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text(encoding="utf-8"))


def _user_settings(augment: AugmentConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the keys that the user set: as overrides, or in an experiment to other values than `augment=none`."""
    typed_keys = {text.lstrip("+").partition("=")[0] for text in overrides}
    default = AugmentConfig(**_read_augment("none"))
    return {
        key: value
        for key, value in vars(augment).items()
        if key != "name" and (f"augment.{key}" in typed_keys or value != getattr(default, key))
    }


def _format_rule(rule: Sequence[tuple[float, str]]) -> str:
    parts = [f"{name} under {limit:g}" for limit, name in rule if limit < math.inf]
    return f"{', '.join(parts)}, else {rule[-1][1]}"
