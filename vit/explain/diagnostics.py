"""Numbers about attention itself, a head or a layer at a time: how far, how spread, on what, and whether it sinks.

All take what a `Trace` (or a `Record`) holds and give tensors (L, H), means over the batch, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.explain.methods import Trace
from vit.model.reduction import Move

OUTLIER = 3.0
"""A patch token this many times longer than the image's median patch token is counted as an outlier."""


def attention_distance(weights: Sequence[Tensor], prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """Mean distance from a patch to the patches it attends to, in patches (Dosovitskiy et al. 2021, figure 7).

    The Euclidean distance on the grid, weighted by the attention between patches (made to sum to 1 over them).  A
    token that stands for several patches (weights of a record carry that along) is where their mean is.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    places_P2 = torch.stack([rows.flatten(), columns.flatten()], dim=1).to(weights[0])
    places_BN2 = F.pad(places_P2, (0, 0, prefix_tokens, 0))[None]

    def one(weights_BHNN: Tensor, move: Move | None) -> Tensor:
        nonlocal places_BN2
        if move is not None:
            places_BN2 = move.matrix.to(places_BN2) @ places_BN2
        apart_B1PP = torch.cdist(places_BN2, places_BN2)[:, None, prefix_tokens:, prefix_tokens:]
        between = weights_BHNN[:, :, prefix_tokens:, prefix_tokens:]
        mass = between.sum(dim=-1)
        return ((between * apart_B1PP).sum(dim=-1) / mass.clamp(min=1e-12)).mean(dim=(0, 2))

    moves = getattr(weights, "moves", [None] * len(weights))
    return torch.stack([one(each, move) for each, move in zip(weights, moves, strict=False)])


def entropy(weights: Sequence[Tensor]) -> Tensor:
    """Mean entropy of the rows, `-sum_j w_ij log w_ij`, in nats: 0 looks at one token, log N at all alike."""
    return torch.stack([-torch.xlogy(each, each).sum(dim=-1).mean(dim=(0, 2)) for each in weights])


def patch_mass(t: Trace) -> Tensor:
    """Share of the attention of what the head reads that goes to patches, not to class token and registers."""
    layers = [t.looks(layer)[:, :, t.prefix_tokens :] for layer in range(len(t.weights))]
    return torch.stack([each.sum(dim=-1).mean(dim=0) for each in layers])


def head_importance(t: Trace) -> Tensor:
    """How much the score would change without a head, to first order (Michel et al. 2019, equation 2).

    `|<∂s/∂out_h, out_h>|` with the head's output `out_h = A_h V_h`, which is `|sum_ij A_ij ∂s/∂A_ij|`; the mean of
    the images' absolute values.  Raises ValueError for a trace without gradients.
    """
    if t.gradients is None:
        raise ValueError("head importance needs a trace with gradients")
    weights = t.signed_weights or t.weights
    return torch.stack([(a * g).sum(dim=(2, 3)).abs().mean(dim=0) for a, g in zip(weights, t.gradients, strict=True)])


def sinks(t: Trace) -> tuple[Tensor, Tensor]:
    """Signs that attention is parked somewhere instead of looking (Darcet et al. 2024): two tensors (B,).

    Of the last layer's attention to patches, as the head's row sees it, the share of the largest patch; and the share
    of patch tokens that are `OUTLIER` times longer than the image's median one.
    """
    last_BP = t.looks(len(t.weights) - 1).mean(dim=1)[:, t.prefix_tokens :]
    top_mass = last_BP.amax(dim=1) / last_BP.sum(dim=1).clamp(min=1e-12)
    lengths_BP = t.tokens[:, t.prefix_tokens :].float().norm(dim=-1)
    outliers = (lengths_BP > OUTLIER * lengths_BP.median(dim=1, keepdim=True).values).float().mean(dim=1)
    return top_mass, outliers
