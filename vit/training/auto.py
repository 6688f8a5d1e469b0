"""What depends on the images and on the time there is, decided once both are known: augmentation and epochs.

For fine-tuning (`augment=auto`, `trainer.max_epochs=auto`).  The rules are stated here, said in the log with what they
came to, and overridden by any choice that is typed.
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
from vit.processors import available
from vit.training.config import CONF, Config, check

log = logging.getLogger("vit")

IMAGES = ((50, "gentle"), (500, "medium"), (math.inf, "deit"))
"""Training images a class, up to which number (that one not included), and the file of conf/augment that suits them."""

PASSES = ((30, "mild"), (100, "medium"), (math.inf, "deit"))
"""The same for passes over the images: in few of them, images made harder are learned less well, not better."""

CORE, GPU = 50e9, 50e12
"""Operations of training a second, roughly, of a CPU's core and of a GPU."""

_ORDER = ("gentle", "mild", "medium", "deit")
_ROOT_EPOCHS, _LEAST, _MOST = 900, 5, 100


def suited_augment(images: int, classes: int, passes: float = math.inf) -> str:
    """The file of conf/augment for so many training images of so many classes and passes over them: the weaker one."""
    each = images / max(1, classes)
    found = (next(name for limit, name in rule if n < limit or limit == math.inf)
             for rule, n in ((IMAGES, each), (PASSES, passes)))  # fmt: skip
    return min(found, key=_ORDER.index)


def auto_epochs(images: int) -> int:
    """Epochs to fine-tune for: 900 / sqrt(images), from 5 to 100, so that steps grow with the root of the images."""
    return min(_MOST, max(_LEAST, round(_ROOT_EPOCHS / math.sqrt(max(1, images)))))


def passes_over(config: Config, images: int, classes: int) -> float:
    """How often training can go over so many images within its budgets, of which `max_epochs` is a number by now.

    Of a time by the model's operations and `CORE` or `GPU`, not by a clock: the same recipe on a busy machine, and in
    every process.
    """
    t, found = config.trainer, [float(config.trainer.epochs or math.inf)]
    if t.max_steps is not None:
        found.append(t.max_steps * config.data.batch_size * config.optim.accumulate / max(1, images))
    if t.max_seconds is not None:
        import torch

        from vit.model import VisionTransformer
        from vit.model.cost import flops

        with torch.device("meta"):
            each = 3 * flops(VisionTransformer(**config.model.arguments(max(2, classes))).architecture)
        gpus = torch.cuda.device_count() if t.accelerator != "cpu" else 0
        pace = GPU * (min(gpus, t.devices) if isinstance(t.devices, int) else gpus) if gpus else CORE * available()
        found.append(t.max_seconds * pace * t.num_nodes / each / max(1, images))
    return min(found)


def resolve_auto(config: Config, data: ImageData, overrides: Sequence[str]) -> Config:
    """The configuration with what is "auto" in it decided for `data`; keys of `augment` that were typed stay.

    Raises `VitError` when what was chosen contradicts the rest.
    """
    images, classes = len(data.splits["train"]), len(data.class_names)
    changed = config
    if config.trainer.max_epochs == "auto":
        epochs = auto_epochs(images)
        changed = dataclasses.replace(changed, trainer=dataclasses.replace(changed.trainer, max_epochs=epochs))
        log.info("trainer.max_epochs=auto: %d, for %d training images (900 / sqrt(images), 5 to 100)", epochs, images)
    if config.augment.name == "auto":
        passes = passes_over(changed, images, classes)
        name = suited_augment(images, classes, passes)
        chosen, kept = _file(name), _kept(config.augment, overrides)
        chosen = {key: value for key, value in chosen.items() if key != "defaults"} | kept
        changed = dataclasses.replace(changed, augment=AugmentConfig(**chosen))
        log.info(
            "augment=auto: %s, the weaker of what suits %d training images a class (%s) and %.3g passes (%s)%s",
            name,
            round(images / max(1, classes)),
            _rule(IMAGES),
            passes,
            _rule(PASSES),
            f"; as typed: {', '.join(sorted(kept))}" if kept else "",
        )
    if changed is not config:
        check(changed)
    return changed


def _file(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text(encoding="utf-8"))


def _kept(augment: AugmentConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Keys that a person has set: typed, or in an experiment other than `augment=none` has them."""
    typed = {text.lstrip("+").partition("=")[0] for text in overrides}
    plain = AugmentConfig(**_file("none"))
    return {
        key: value
        for key, value in vars(augment).items()
        if key != "name" and (f"augment.{key}" in typed or value != getattr(plain, key))
    }


def _rule(rule: Sequence[tuple[float, str]]) -> str:
    parts = [f"{name} under {limit:g}" for limit, name in rule if limit < math.inf]
    return f"{', '.join(parts)}, else {rule[-1][1]}"
