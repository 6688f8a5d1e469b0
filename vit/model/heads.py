"""From tokens to one vector an image: the class token, the mean of the patches, or a learned query that asks them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit.model.attention import CrossAttention
from vit.model.blocks import Mlp
from vit.model.norms import LAYER_NORM, MakeNorm


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

    def attend_patches(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the query's weights over the patches (B, H, P) beside the output (B, D)."""
        x_B1D, weights_BH1P = self.attend(self.latent.expand(patches_BPD.shape[0], -1, -1), patches_BPD)
        return self.refine(x_B1D), weights_BH1P[:, :, 0]

    def refine(self, x_B1D: Tensor) -> Tensor:
        """The MLP with its residual, and the token axis gone: (B, 1, D) -> (B, D)."""
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]

    def forward(self, patches_BPD: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.refine(super().forward(self.latent.expand(patches_BPD.shape[0], -1, -1), patches_BPD, bias))
