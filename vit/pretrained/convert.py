"""Weights under timm's names and under this project's.

They are the same but for one family: DINOv3, which timm has in its class `Eva`.  There,

- LayerScale is called `gamma_1` and `gamma_2`, and biases stand apart, `q_bias` and `v_bias`, none for the keys;
- rotary positions turn channel i of a head together with channel i + d/2, rows first.  Here they turn neighbours,
  columns first (`vit.model.positions`).  Scores do not change when the channels of queries and keys are put in
  another order, the same for both, so the rows of `qkv` (and the gains of their norms) are reordered once and no
  second formula is needed.
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
    """Whether timm has this architecture, if at all, as its class `Eva`."""
    return architecture.get("position") == "rotary_box"


def from_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of timm's model -> one of `VisionTransformer(**architecture)`.  Tensors are shared where they can.

    A weight that the architecture does not know keeps its name, so that whoever loads the result can tell; a state
    dict that has this project's names already stays as it is.
    """
    if not is_dinov3(architecture) or any(key.endswith(".ls1.gamma") for key in state):
        return dict(state)
    orders = _orders(architecture)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        own = key[: -len("q_bias")]
        if f"{own}q_bias" in state and f"{own}v_bias" in state:
            if key == f"{own}q_bias":
                biases = torch.cat([value, torch.zeros_like(value), state[f"{own}v_bias"]])
                found[f"{own}qkv.bias"] = _reorder(f"{own}qkv.bias", biases, orders)
            continue
        value = _reorder(key, value, orders)
        found[key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return found


def from_bundle(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a bundle or checkpoint of this project's -> a state dict of `VisionTransformer(**architecture)`.

    A bundle that timm can load has timm's names (`vit.inference.timm_config`), which tell themselves.
    """
    return from_timm(state, architecture) if any(key.endswith(".gamma_1") for key in state) else dict(state)


def to_timm(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of `VisionTransformer(**architecture)` -> one of timm's model, the way back of `from_timm`.

    Raises `VitError` when a DINOv3's keys have learned a bias, for which timm's has no place.
    """
    if not is_dinov3(architecture):
        return dict(state)
    orders = [order.argsort() for order in _orders(architecture)]
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        value = _reorder(key, value, orders)
        if key.endswith(".attn.qkv.bias"):
            own = key.removesuffix("qkv.bias")
            found[f"{own}q_bias"], keys, found[f"{own}v_bias"] = value.chunk(3)
            if not keys.is_meta and keys.any():
                raise VitError(f"{key}: timm's DINOv3 has no bias of keys, and this one is not 0")
        else:
            found[key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = value
    return found


def _orders(architecture: Mapping[str, Any]) -> list[Tensor]:
    """Which of timm's channels each channel here is: of `qkv` (3 D,), values as they are, and of one head (d,)."""
    width, heads = architecture["width"], architecture["heads"]
    d = width // heads
    angles = torch.arange(d // 2).roll(-(d // 4))  # columns first, then rows
    head = torch.stack([angles, angles + d // 2], dim=1).flatten()
    one = (torch.arange(heads)[:, None] * d + head).flatten()
    return [torch.cat([one, width + one, 2 * width + torch.arange(width)]), head]


def _reorder(key: str, value: Tensor, orders: list[Tensor]) -> Tensor:
    """A weight with its rows in the other order, where it is one whose rows have one."""
    if not (match := _ORDERED.search(key)):
        return value
    order = orders[0] if match.group(1) == "qkv" else orders[1]
    if len(value) != len(order):
        raise VitError(f"{key}: expected {len(order)} rows for a model of this width, not {len(value)}")
    return value[order.to(value.device)]
