"""From tokens to one vector an image: the class token, the mean of the patches, or a learned query that asks them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.model.attention import CrossAttention
from vit.model.blocks import Mlp
from vit.model.norms import LAYER_NORM, MakeNorm
from vit.model.reduction import to_fractions


class MeanPool(nn.Module):
    """The mean of the tokens from number `first` on: (B, N, D) -> (B, D).

    `sizes_BN`: how many patches each token stands for, and so weighs; None: one.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x_BND: Tensor, sizes_BN: Tensor | None = None) -> Tensor:
        read_BND = x_BND[:, self.first :]
        if sizes_BN is None:
            return read_BND.mean(dim=1)
        return (to_fractions(sizes_BN[:, self.first :]).to(x_BND.dtype)[:, None] @ read_BND)[:, 0]

    def weights(self, x_BND: Tensor, sizes_BN: Tensor | None = None) -> Tensor:
        """Compute the weight of each token in the mean: (B, 1, N), rows sum to 1."""
        B, R, _ = x_BND[:, self.first :].shape
        weights_BR = x_BND.new_full((B, R), 1 / R) if sizes_BN is None else to_fractions(sizes_BN[:, self.first :])
        return F.pad(weights_BR.to(x_BND.dtype)[:, None], (self.first, 0))

    def average(self, weights_B1N: Tensor, x_BND: Tensor) -> Tensor:
        """Compute the mean from the weights: (B, D)."""
        return (weights_B1N @ x_BND)[:, 0]


class AttentionPool(CrossAttention):
    """One learned query cross-attends to the patches, then an MLP with a residual: (B, P, D) -> (B, D).

    The head of SigLIP and of Zhai et al. 2022, "Scaling Vision Transformers" (multihead attention pooling, after Lee
    et al. 2019, "Set Transformer").  Parameter names are timm's: `latent, q, kv, proj, norm, mlp`.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: str = "gelu", norm: MakeNorm = LAYER_NORM
    ) -> None:
        super().__init__(width, heads)
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = norm(width)
        self.mlp = Mlp(width, hidden, activation=activation)

    def forward(self, patches_BPD: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x_B1D = super().forward(self.latent.expand(patches_BPD.shape[0], -1, -1), patches_BPD, bias)
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]
