"""Arithmetic of a plain Vision Transformer, counted from its sizes: what a measured time is a share of.

Multiplications and additions of matrix products only, each one FLOP, as the machine's peak is measured; norms, softmax,
GELU and sums are left out (under 2% of the operations of a ViT-Ti/16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def forward(architecture: Mapping[str, Any]) -> float:
    """FLOPs of one image's forward pass through the model of these arguments (`description.architecture`).

    A layer multiplies N tokens of width D with weights of 4 D D (attention) and 2 r D D (an MLP r times as wide), and
    twice N x N x D for the scores and their means (Vaswani et al. 2017, table 1; Dosovitskiy et al. 2021).
    """
    (height, width), (rows, columns) = architecture["image_size"], architecture["patch_size"]
    patches, D = (height // rows) * (width // columns), architecture["width"]
    N = patches + int(architecture.get("class_token", True)) + architecture.get("registers", 0)
    ratio = architecture.get("mlp_ratio", 4.0)
    layer = (4 + 2 * ratio) * N * D**2 + 2 * N**2 * D
    embedding = patches * D * architecture["in_channels"] * rows * columns
    return 2.0 * math.fsum([architecture["depth"] * layer, embedding, D * architecture["num_classes"]])


def training(architecture: Mapping[str, Any]) -> float:
    """FLOPs of one image's step: forward, and twice as many back, for the gradients of inputs and of weights."""
    return 3 * forward(architecture)


def product(size: int) -> float:
    """FLOPs of the product of two square matrices."""
    return 2.0 * size**3
