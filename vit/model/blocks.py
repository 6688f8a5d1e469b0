"""The Transformer block: attention moves information between tokens, the MLP works on each token alone.

`Block` normalises first (Dosovitskiy et al. 2021, equations 2 and 3), `PostNormBlock` last, as the original
Transformer did (Vaswani et al. 2017, section 3.1).  The MLP has one hidden layer, plain or gated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit.model.norms import LAYER_NORM, MakeNorm
from vit.model.positions import Rotary
from vit.model.reduction import Reducer


class QuickGELU(nn.Module):
    """`x sigmoid(1.702 x)`, an approximation of GELU (Hendrycks & Gimpel 2016) that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on each token alone: (B, N, D) -> (B, N, D).

    `hidden_norm` normalises the hidden layer (Wang et al. 2022, "Foundation Transformers").
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        activation: str = "gelu",
        hidden_norm: MakeNorm | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.act = ACTIVATIONS[activation]()
        self.norm = hidden_norm(hidden) if hidden_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.drop(self.fc2(self.norm(self.drop(self.act(self.fc1(x_BND))))))


class SwiGlu(nn.Module):
    """An MLP whose hidden layer is gated: `silu(x W_g) * (x W_x)`, then a linear layer; (B, N, D) -> (B, N, D).

    Shazeer 2020, "GLU Variants Improve Transformer".  Parameter names are timm's: `fc1_g, fc1_x, norm, fc2`; `packed`
    has both halves in one matrix, `fc1`, the gate first.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        packed: bool = False,
        hidden_norm: MakeNorm | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.fc1 = nn.Linear(width, 2 * hidden, bias=bias)
        else:
            self.fc1_g = nn.Linear(width, hidden, bias=bias)
            self.fc1_x = nn.Linear(width, hidden, bias=bias)
        self.norm = hidden_norm(hidden) if hidden_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        gate, x = self.fc1(x_BND).chunk(2, dim=-1) if self.packed else (self.fc1_g(x_BND), self.fc1_x(x_BND))
        return self.drop(self.fc2(self.norm(self.drop(nn.functional.silu(gate) * x))))


def make_mlp(kind: str, width: int, hidden: int, dropout: float, *, activation: str, **options: Any) -> nn.Module:
    """The MLP of a block: `kind` is "plain", "swiglu" or "swiglu_packed"; `options` are those that all have."""
    if kind == "plain":
        return Mlp(width, hidden, dropout, activation=activation, **options)
    return SwiGlu(width, hidden, dropout, packed=kind == "swiglu_packed", **options)


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch, small at first (Touvron et al. 2021, "CaiT")."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, leave a residual branch out for a fraction of the images.

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

    Each branch may be scaled by LayerScale and dropped by stochastic depth.  With a reducer, fewer tokens may come out.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        norm: MakeNorm = LAYER_NORM,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(width)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None) -> Tensor:
        y_BND, attended = self.attention_branch(self.norm1(x_BND), rotary, reducer)
        x_BND = x_BND + y_BND
        x_BND = x_BND if reducer is None else reducer.reduce(x_BND, *attended)
        return x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND))))

    def attention_branch(
        self, x_BND: Tensor, rotary: Rotary | None, reducer: Reducer | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run the branch of attention: its output (B, N, D), and rows of weights and keys if the reducer asks for them.

        A reducer has the rotary angles of the tokens that are left, so `rotary` is not read beside one.
        """
        attended: Sequence[Tensor] = ()
        if reducer is None:
            y_BND = self.attn(x_BND, rotary)
        elif reducer.rows is None:
            y_BND = self.attn(x_BND, reducer.rotary, reducer.bias())
        else:
            y_BND, *attended = self.attn(x_BND, reducer.rotary, reducer.bias(), reducer.rows)
        return self.drop_path1(self.ls1(y_BND)), attended


class PostNormBlock(Block):
    """The block of the original Transformer: `norm1(x + attn(x))`, then `norm2(x + mlp(x))`."""

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None) -> Tensor:
        y_BND, attended = self.attention_branch(x_BND, rotary, reducer)
        x_BND = self.norm1(x_BND + y_BND)
        x_BND = x_BND if reducer is None else reducer.reduce(x_BND, *attended)
        return self.norm2(x_BND + self.drop_path2(self.ls2(self.mlp(x_BND))))
