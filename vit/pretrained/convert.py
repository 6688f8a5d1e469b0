"""Weights under timm's names and under this project's.

They are the same but for one family: DINOv3, which timm has in its class `Eva`.  There,

- LayerScale is called `gamma_1` and `gamma_2`, and biases stand apart, `q_bias` and `v_bias`, none for the keys;
- rotary positions turn channel i of a head together with channel i + d/2, rows first.  Here they turn neighbours,
  columns first (`vit.model.positions`).  Scores do not change when the channels of queries and keys are put in
  another order, the same for both, so the rows of `qkv` are reordered once and no second formula is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit.errors import VitError


def is_dinov3(architecture: Mapping[str, Any]) -> bool:
    """Whether timm has this architecture, if at all, as its class `Eva`."""
    return architecture.get("position") == "rotary_box"


def from_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of timm's model -> one of `VisionTransformer(**architecture)`.  Tensors are shared where they can.

    A weight that the architecture does not know keeps its name, so that whoever loads the result can tell.
    """
    if not is_dinov3(architecture):
        return dict(state)
    order = _order(architecture)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.v_bias"):
            continue
        if key.endswith(".attn.q_bias"):
            own = key.removesuffix("q_bias")
            if f"{own}v_bias" in state:
                biases = torch.cat([value, torch.zeros_like(value), state[f"{own}v_bias"]])
                found[f"{own}qkv.bias"] = _reorder(biases, order)
            continue
        if key.endswith(".attn.qkv.weight"):
            value = _reorder(value, order)
        found[key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return found


def to_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of `VisionTransformer(**architecture)` -> one of timm's model, the way back of `from_timm`.

    Raises `VitError` when a DINOv3's keys have learned a bias, for which timm's has no place.
    """
    if not is_dinov3(architecture):
        return dict(state)
    order = _order(architecture).argsort()
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith((".attn.qkv.weight", ".attn.qkv.bias")):
            value = _reorder(value, order)
        if key.endswith(".attn.qkv.bias"):
            own = key.removesuffix("qkv.bias")
            found[f"{own}q_bias"], keys, found[f"{own}v_bias"] = value.chunk(3)
            if not keys.is_meta and keys.any():
                raise VitError(f"{key}: timm's DINOv3 has no bias of keys, and this one is not 0")
        else:
            found[key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = value
    return found


def _order(architecture: Mapping[str, Any]) -> Tensor:
    """Which of timm's rows of `qkv` each row here is, (3 D,): queries and keys reordered within heads, values as is."""
    width, heads = architecture["width"], architecture["heads"]
    d = width // heads
    angles = torch.arange(d // 2).roll(-(d // 4))  # columns first, then rows
    head = torch.stack([angles, angles + d // 2], dim=1).flatten()
    one = (torch.arange(heads)[:, None] * d + head).flatten()
    return torch.cat([one, width + one, 2 * width + torch.arange(width)])


def _reorder(rows: Tensor, order: Tensor) -> Tensor:
    if len(rows) != len(order):
        raise VitError(f"expected queries, keys and values of width {len(order) // 3}, not {len(rows)} rows")
    return rows[order.to(rows.device)]
