"""What a forward pass costs, counted from a model's arguments: layer by layer, with the tokens that are there.

Multiplications with their additions in matrix products; norms, softmax, activations and sums are left out, which are
under 2% of a ViT-Ti/16.  A layer of N tokens of width D, of which N' go on to an MLP r widths wide, takes
`4 N D^2 + 2 N^2 D + 2 r N' D^2` (Vaswani et al. 2017, table 1; with N' = N and r = 4 the usual `12 N D^2 + 2 N^2 D`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vit.model.arguments import maps_per_head, removed_per_layer
from vit.model.reduction import REDUCTION


def flops(architecture: Mapping[str, Any]) -> float:
    """Count the floating point operations of one image's forward pass through a model of these arguments.

    Two for each multiplication with its addition; token reduction is included.  Raises `VitError` for a reduction that
    is not possible.
    """
    return 2.0 * math.fsum(products(architecture))


def relative(architecture: Mapping[str, Any]) -> float:
    """Return `flops` as a fraction of those without reduction."""
    return flops(architecture) / flops({**architecture, **REDUCTION})


def products(architecture: Mapping[str, Any]) -> list[int]:
    """Count the multiplications of the embedding, of each layer, and of the head."""
    a, D, depth = architecture, architecture["width"], architecture["depth"]
    (height, width), (rows, columns) = a["image_size"], a["patch_size"]
    patches = (height // rows) * (width // columns)
    class_token, distilled = bool(a.get("class_token", True)), bool(a.get("distillation_token", False))
    prefix = class_token + distilled + a.get("registers", 0)
    hidden = int(D * a.get("mlp_ratio", 4.0))
    maps = maps_per_head(a)
    matrices = 2 if a.get("mlp", "plain") == "plain" else 3
    plain = a.get("attention", "multi_head") == "dot_product"
    pool, fewer = a.get("pool", "token"), removed_per_layer(a) or (0,) * depth
    found, P = [patches * D * a["in_channels"] * rows * columns], patches
    for count in fewer:
        N = prefix + P
        attention = (0 if plain else 4 * N * D**2) + (1 + maps) * N**2 * D
        if count and a["reduction"] == "keep":
            looking = 1 + distilled if pool == "token" else N if a.get("pool_prefix") else P
            attention += looking * N * D + P * D
            attention += looking * N if patches > P else 0  # a mean over what the tokens that look stand for
        elif count:
            head = D if plain else D // a["heads"] // maps
            attention += (P - P // 2) * (P // 2) * head + (P // 2) * count * (D + 1)
        P -= count
        found.append(attention + matrices * hidden * (prefix + P) * D)
    heads = D * a["num_classes"] * (1 + distilled)
    read = P + (prefix if a.get("pool_prefix") else 0)
    if pool == "mean" and patches > P:
        heads += read * D
    if pool == "attention":
        heads += 2 * D**2 + 2 * read * D**2 + 2 * read * D + 2 * hidden * D
    return [*found, heads]
