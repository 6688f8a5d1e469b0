"""What depends on how many images there are, settled once they have been counted: augmentation and epochs.

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
from vit.training.app import CONF
from vit.training.config import Config, check

log = logging.getLogger("vit")

AUGMENT = ((50, "gentle"), (500, "medium"), (math.inf, "deit"))
"""Training images a class, up to which number (that one not included), and the file of conf/augment that suits them."""

_ROOT_EPOCHS, _LEAST, _MOST = 900, 5, 100


def suited_augment(images: int, classes: int) -> str:
    """The file of conf/augment for so many training images of so many classes."""
    each = images / max(1, classes)
    return next(name for limit, name in AUGMENT if each < limit)


def suited_epochs(images: int) -> int:
    """Epochs to fine-tune for: 900 / sqrt(images), from 5 to 100, so that steps grow with the root of the images."""
    return min(_MOST, max(_LEAST, round(_ROOT_EPOCHS / math.sqrt(max(1, images)))))


def settled(config: Config, data: ImageData, overrides: Sequence[str]) -> Config:
    """The configuration with what is "auto" in it decided for `data`; keys of `augment` that were typed stay.

    Raises `VitError` when what was chosen contradicts the rest.
    """
    images, classes = len(data.splits["train"]), len(data.class_names)
    changed = config
    if config.augment.name == "auto":
        name = suited_augment(images, classes)
        chosen, kept = _file(name), _kept(config.augment, overrides)
        chosen = {key: value for key, value in chosen.items() if key != "defaults"} | kept
        changed = dataclasses.replace(changed, augment=AugmentConfig(**chosen))
        log.info(
            "augment=auto: %s, for %d training images a class (%s)%s",
            name,
            round(images / max(1, classes)),
            _rule(),
            f"; as typed: {', '.join(sorted(kept))}" if kept else "",
        )
    if config.trainer.max_epochs == "auto":
        epochs = suited_epochs(images)
        changed = dataclasses.replace(changed, trainer=dataclasses.replace(changed.trainer, max_epochs=epochs))
        log.info("trainer.max_epochs=auto: %d, for %d training images (900 / sqrt(images), 5 to 100)", epochs, images)
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


def _rule() -> str:
    parts = [f"{name} under {limit:g}" for limit, name in AUGMENT if limit < math.inf]
    return f"{', '.join(parts)}, else {AUGMENT[-1][1]}"
