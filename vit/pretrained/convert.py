"""Convert weights between timm's names and this project's.

The names differ only for DINOv3, timm's class `Eva`:

- LayerScale is called `gamma_1` and `gamma_2`; the biases are separate, `q_bias` and `v_bias`, and keys have none;
- rotary positions rotate channel i of a head together with channel i + d/2, rows first.  Here they rotate neighbouring
  channels, columns first (`vit.model.positions`).  The same permutation of the channels of queries and keys leaves the
  scores unchanged, so the rows of `qkv` (and the weights of their norms) are reordered once and no second formula is
  needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit.errors import VitError

_ORDERED = re.compile(r"\.attn\.(qkv|q_norm|k_norm)\.(weight|bias)$")


def is_dinov3(architecture: Mapping[str, Any]) -> bool:
    """Check whether the architecture is timm's class `Eva` rather than its `VisionTransformer`."""
    return architecture.get("position") == "rotary_box"


def from_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert timm's state dict to one of `VisionTransformer(**architecture)`; tensors are shared where possible.

    A weight that the architecture does not have keeps its name, so that loading reports it.  A state dict with this
    project's names is returned unchanged.
    """
    if not is_dinov3(architecture) or any(key.endswith(".ls1.gamma") for key in state):
        return dict(state)
    orders = _channel_orders(architecture)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix = key[: -len("q_bias")]
        if f"{prefix}q_bias" in state and f"{prefix}v_bias" in state:
            if key == f"{prefix}q_bias":
                biases = torch.cat([value, torch.zeros_like(value), state[f"{prefix}v_bias"]])
                converted[f"{prefix}qkv.bias"] = _reorder_rows(f"{prefix}qkv.bias", biases, orders)
            continue
        value = _reorder_rows(key, value, orders)
        converted[key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return converted


def from_bundle(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert weights of this project's bundle or checkpoint to a state dict of `VisionTransformer(**architecture)`.

    A bundle that timm can load has timm's names (`vit.inference.timm_config`), which are recognised.
    """
    return from_timm(state, architecture) if any(key.endswith(".gamma_1") for key in state) else dict(state)


def to_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a state dict of `VisionTransformer(**architecture)` to timm's names, the inverse of `from_timm`.

    Raises `VitError` when a DINOv3 model has learned a bias of the keys, which timm's model does not have.
    """
    if not is_dinov3(architecture):
        return dict(state)
    orders = [order.argsort() for order in _channel_orders(architecture)]
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        value = _reorder_rows(key, value, orders)
        if key.endswith(".attn.qkv.bias"):
            prefix = key.removesuffix("qkv.bias")
            converted[f"{prefix}q_bias"], keys, converted[f"{prefix}v_bias"] = value.chunk(3)
            if not keys.is_meta and keys.any():
                raise VitError(f"{key}: timm's DINOv3 has no bias of keys, and this one is not 0")
        else:
            converted[key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = value
    return converted


def _channel_orders(architecture: Mapping[str, Any]) -> list[Tensor]:
    """Compute timm's index of each channel here: of `qkv` (3 D,), values in the same order, and of one head (d,)."""
    width, heads = architecture["width"], architecture["heads"]
    d = width // heads
    angles = torch.arange(d // 2).roll(-(d // 4))  # columns first, then rows
    head = torch.stack([angles, angles + d // 2], dim=1).flatten()
    one = (torch.arange(heads)[:, None] * d + head).flatten()
    return [torch.cat([one, width + one, 2 * width + torch.arange(width)]), head]


def _reorder_rows(key: str, value: Tensor, orders: list[Tensor]) -> Tensor:
    """Reorder the rows of a weight of queries and keys; return other weights unchanged."""
    if not (match := _ORDERED.search(key)):
        return value
    order = orders[0] if match.group(1) == "qkv" else orders[1]
    if len(value) != len(order):
        raise VitError(f"{key}: expected {len(order)} rows for a model of this width, not {len(value)}")
    return value[order.to(value.device)]
