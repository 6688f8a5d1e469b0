"""Numbers about attention itself, a head or a layer at a time: how far, how spread, on what, and whether it sinks.

All take what a `Trace` (or a `Record`) holds and give tensors (L, H), means over the batch, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.explain.methods import Trace
from vit.model.reduction import TokenMap

OUTLIER = 3.0
"""A patch token this many times longer than the image's median patch token is counted as an outlier."""


def attention_distance(weights: Sequence[Tensor], prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """Compute the mean distance of attention between patches, in patches (Dosovitskiy et al. 2021, figure 7).

    The Euclidean distance on the grid, weighted by the attention between patches (made to sum to 1 over them).  A
    token that stands for several patches (weights of a record carry that along) is where their mean is.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    positions_P2 = torch.stack([rows.flatten(), columns.flatten()], dim=1).to(weights[0])
    positions_BN2 = F.pad(positions_P2, (0, 0, prefix_tokens, 0))[None]

    def one(weights_BHNN: Tensor, token_map: TokenMap | None) -> Tensor:
        nonlocal positions_BN2
        if token_map is not None:
            positions_BN2 = token_map.matrix.to(positions_BN2) @ positions_BN2
        apart_B1PP = torch.cdist(positions_BN2, positions_BN2)[:, None, prefix_tokens:, prefix_tokens:]
        between = weights_BHNN[:, :, prefix_tokens:, prefix_tokens:]
        mass = between.sum(dim=-1)
        return ((between * apart_B1PP).sum(dim=-1) / mass.clamp(min=1e-12)).mean(dim=(0, 2))

    token_maps = getattr(weights, "token_maps", [None] * len(weights))
    return torch.stack([one(each, token_map) for each, token_map in zip(weights, token_maps, strict=False)])


def entropy(weights: Sequence[Tensor]) -> Tensor:
    """Compute the mean entropy of the rows, `-sum_j w_ij log w_ij`, in nats.

    0: all weight on one token; log N: the same on every token.
    """
    return torch.stack([-torch.xlogy(each, each).sum(dim=-1).mean(dim=(0, 2)) for each in weights])


def patch_mass(t: Trace) -> Tensor:
    """Compute the fraction of the attention of what the head reads that goes to patches."""
    layers = [t.readout_attention(layer)[:, :, t.prefix_tokens :] for layer in range(len(t.weights))]
    return torch.stack([each.sum(dim=-1).mean(dim=0) for each in layers])


def head_importance(t: Trace) -> Tensor:
    """Estimate how much the score would change without a head, to first order (Michel et al. 2019, equation 2).

    `|<∂s/∂out_h, out_h>|` with the head's output `out_h = A_h V_h`, which is `|sum_ij A_ij ∂s/∂A_ij|`; the mean of
    the images' absolute values.  Raises ValueError for a trace without gradients.
    """
    if t.gradients is None:
        raise ValueError("head importance needs a trace with gradients")
    weights = t.signed_weights or t.weights
    return torch.stack([(a * g).sum(dim=(2, 3)).abs().mean(dim=0) for a, g in zip(weights, t.gradients, strict=True)])


def sinks(t: Trace) -> tuple[Tensor, Tensor]:
    """Measure two signs of attention sinks (Darcet et al. 2024): two tensors (B,).

    Of the last layer's attention to patches, as the head's row sees it, the fraction of the largest patch; and the
    fraction of patch tokens that are `OUTLIER` times longer than the image's median one.
    """
    last_BP = t.readout_attention(len(t.weights) - 1).mean(dim=1)[:, t.prefix_tokens :]
    top_mass = last_BP.amax(dim=1) / last_BP.sum(dim=1).clamp(min=1e-12)
    lengths_BP = t.tokens[:, t.prefix_tokens :].float().norm(dim=-1)
    outliers = (lengths_BP > OUTLIER * lengths_BP.median(dim=1, keepdim=True).values).float().mean(dim=1)
    return top_mass, outliers
