"""Merge the LoRA matrices of a checkpoint into its weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit.errors import VitError

if TYPE_CHECKING:
    from torch import Tensor

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # as peft names them


def merge_lora(weights: Mapping[str, Tensor], scale: Any, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Merge LoRA matrices into plain weights: W + `scale` B A (Hu et al. 2022, "LoRA", section 4.1).

    Raises `VitError`, naming `source`, when a matrix A or B is missing or has another shape than its weight.
    """
    source = os.fspath(source)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise VitError(f"{source}: the scale of its changes by LoRA should be a number, not {scale!r}")
    plain = {key.replace(_BASE, "."): value for key, value in weights.items() if _A not in key and _B not in key}
    for key, a in weights.items():
        if _A not in key:
            continue
        b, weight = weights.get(key.replace(_A, _B)), plain.get(key.replace(_A, "."))
        if b is None or weight is None:
            raise VitError(f"{source}: its changes by LoRA are incomplete ({key})")
        try:
            update = b.float() @ a.float()
        except (AttributeError, RuntimeError):
            update = None
        if update is None or update.shape != weight.shape:
            raise VitError(f"{source}: a change by LoRA does not fit its matrix ({key})")
        plain[key.replace(_A, ".")] = weight + scale * update
    return plain
