"""The Transformer block: attention moves information between tokens, the MLP works on each token alone.

`Block` normalises first (Dosovitskiy et al. 2021, equations 2 and 3), `PostNormBlock` last, as the original
Transformer did (Vaswani et al. 2017, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit.model.positions import Rotary


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on each token alone: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x_BND)))))


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, small at first (Touvron et al. 2021, "CaiT")."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, leave a residual branch out for a share of the images.

    Branches that stay are scaled by 1 / (1 - rate), so that the expected output does not change.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training:
            return x_BND
        keep = 1 - self.rate
        mask_B11 = torch.empty(len(x_BND), 1, 1, dtype=x_BND.dtype, device=x_BND.device).bernoulli_(keep)
        return x_BND * mask_B11 / keep


class Block(nn.Module):
    """Pre-norm block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.  (B, N, D) -> (B, N, D).

    Each branch may be scaled by LayerScale and dropped by stochastic depth.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        hidden: int,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden, dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None) -> Tensor:
        x_BND = x_BND + self.drop_path1(self.ls1(self.attn(self.norm1(x_BND), rotary)))
        return x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND))))


class PostNormBlock(Block):
    """The block of the original Transformer: `norm1(x + attn(x))`, then `norm2(x + mlp(x))`."""

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None) -> Tensor:
        x_BND = self.norm1(x_BND + self.drop_path1(self.ls1(self.attn(x_BND, rotary))))
        return self.norm2(x_BND + self.drop_path2(self.ls2(self.mlp(x_BND))))
