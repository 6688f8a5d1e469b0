"""Attention: weights that are not parameters but are computed from the elements themselves.

Read from top to bottom, this file follows the lecture:

1. `dot_product_attention`: plain self-attention, no parameters.
2. `scaled_dot_product_attention`: queries, keys and values, written out.
3. `Attend`: the same for several heads, by torch's fused kernel.  Every layer below attends through one, so a forward
   hook on it sees all attention of a model (`vit.explain.record`).
4. `MultiHeadAttention`: several heads side by side, with learned queries, keys and values.
5. `DifferentialAttention`: the difference of two maps of weights in each head.
6. `CrossAttention`: queries from one sequence, keys and values from another.

Letters in names are axes: B batch, N tokens, M tokens attended to, R rows, D width, H heads, d width of one head
(D = H d).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.model.norms import LAYER_NORM, MakeNorm, RmsNorm
from vit.model.positions import Rotary, rotate

WithRows = tuple[Tensor, Tensor, Tensor]
"""Outputs (B, N, D), the weights of some rows (B, H, R, N) in float32 or better, and the keys (B, H, N, d)."""


def dot_product_attention(x_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute plain self-attention: every output is a mean of all inputs, weighted by similarity; nothing is learned.

        w'_ij = <x_i, x_j>,   w_ij = exp(w'_ij) / sum_j exp(w'_ij),   y_i = sum_j w_ij x_j

    Takes (B, N, D); returns the outputs (B, N, D) and the weights (B, N, N), whose rows sum to 1.
    """
    weights_BNN = attention_weights(x_BND, x_BND, scale=1.0)
    return weights_BNN @ x_BND, weights_BNN


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention of queries to keys, written out: `softmax(q kᵀ / sqrt(d)) v` (Vaswani et al. 2017, eq. 1).

    Dividing by sqrt(d) keeps the scores of unit-variance q and k at unit variance, whatever d is, so that softmax
    does not saturate.  Takes q (..., N, d), k (..., M, d), v (..., M, d); returns outputs (..., N, d) and the
    weights (..., N, M), whose rows sum to 1.
    """
    weights = attention_weights(q, k)
    return weights @ v, weights


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute how much each query attends to each key, `softmax(q kᵀ / sqrt(d) + bias)`: (..., N, d), (..., M, d) ->
    (..., N, M).

    `scale` takes the place of 1 / sqrt(d).
    """
    scores = q @ k.transpose(-2, -1)
    if scale != 1:
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32: what is compared or measured needs more than what is trained."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attend(nn.Module):
    """Average values by attention, `softmax(q kᵀ / sqrt(d) + bias) v`, without parameters.

    Runs torch's fused kernel, which never holds the weights; `weights` computes them from the same arguments without
    the values, and `average` the outputs from them.  Layers call it as `attend(q, k, v, bias=bias)`.

    Args:
        dropout: fraction of the weights that are dropped in training.
    """

    signed = False
    """Whether weights may be negative."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend: q (B, H, N, d), k (B, H, M, d), v (B, H, M, d), bias (B, 1, 1, M) -> (B, H, N, d)."""
        bias = None if bias is None else bias.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the weights, before dropout: (B, H, N, M), rows sum to 1."""
        return attention_weights(q, k, bias)

    def average(self, weights_BHNM: Tensor, v: Tensor) -> Tensor:
        """Compute the outputs from the weights, of which some are dropped in training."""
        return F.dropout(weights_BHNM, self.dropout, self.training) @ v

    def exact_weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """Compute `weights` in float32 or better, also under autocast."""
        with torch.autocast(q.device.type, enabled=False):
            return self.weights(at_least_float32(q), at_least_float32(k), bias, **options)


class UnscaledAttend(Attend):
    """Average values by `softmax(q kᵀ + bias)`, written out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.average(self.weights(q, k, bias), v)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        return attention_weights(q, k, bias, scale=1.0)


class DifferentialAttend(Attend):
    """Average values by the difference of two maps of weights, `softmax(q1 k1ᵀ) - λ softmax(q2 k2ᵀ)`, each scaled.

    What both maps find everywhere is noise and cancels out (Ye et al. 2024, "Differential Transformer", equation 1).
    The weights may be negative, and their rows sum to 1 - λ.  q (B, 2H, N, d) and k (B, 2H, M, d) have both maps of a
    head side by side, v (B, H, M, 2d) is shared; `difference` is λ, one number.
    """

    signed = True

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, difference: Tensor
    ) -> Tensor:
        first, second = (Attend.forward(self, q[:, i::2], k[:, i::2], v, bias) for i in (0, 1))
        return first - difference.to(first.dtype) * second

    def weights(  # type: ignore[override]
        self, q: Tensor, k: Tensor, bias: Tensor | None = None, *, difference: Tensor
    ) -> Tensor:
        weights = attention_weights(q, k, bias)
        return weights[:, 0::2] - difference.to(weights.dtype) * weights[:, 1::2]


class DotProductAttention(nn.Module):
    """`dot_product_attention` as a layer of a model: no parameters, one head.  (B, N, D) -> (B, N, D).

    Arguments of `forward`: see `MultiHeadAttention`; `rotary` is not used.
    """

    heads = 1

    def __init__(self, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = UnscaledAttend(attention_dropout)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x_BND: Tensor, rotary: Rotary | None = None, bias: Tensor | None = None, rows: slice | None = None
    ) -> Tensor | WithRows:
        x_B1ND = x_BND.unsqueeze(1)
        seen = () if rows is None else (self.attend.exact_weights(x_B1ND[:, :, rows], x_B1ND, bias), x_B1ND)
        y_BND = self.drop(self.attend(x_B1ND, x_B1ND, x_B1ND, bias=bias).squeeze(1))
        return (y_BND, *seen) if seen else y_BND


class MultiHeadAttention(nn.Module):
    """Self-attention with learned queries, keys and values in `heads` subspaces (Vaswani et al. 2017, section 3.2.2).

    With one head this is plain scaled dot-product self-attention.  Parameter names and layout are timm's: `qkv` is one
    matrix, read as (3, heads, d).

    `qk_norm` normalises each head's queries and keys (Dehghani et al. 2023, "Scaling Vision Transformers to 22
    Billion Parameters"), which bounds the scores and so steadies training at high learning rates.  `attention_norm`
    normalises the heads' outputs side by side, before they are mixed (Wang et al. 2022, "Foundation Transformers").

    `forward` takes the tokens (B, N, D) and returns as many.  Its other arguments:
        rotary: cosines and sines by which queries and keys are turned.
        bias: added to the scores of each token, (B, 1, 1, N).
        rows: which queries' weights are returned as well, see `WithRows`.
    """

    maps = 1
    """How many maps of weights a head has, each with queries and keys of its own."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        attention_norm: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        norm: MakeNorm = LAYER_NORM,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = norm(width // heads // self.maps) if qk_norm else nn.Identity()
        self.k_norm = norm(width // heads // self.maps) if qk_norm else nn.Identity()
        self.attend = Attend(attention_dropout)
        self.norm = norm(width) if attention_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=proj_bias)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x_BND: Tensor, rotary: Rotary | None = None, bias: Tensor | None = None, rows: slice | None = None
    ) -> Tensor | WithRows:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        seen = () if rows is None else (self.attend.exact_weights(q[:, :, rows], k, bias), k)
        y_BHNd = self.attend(q, k, v, bias=bias)
        y_BND = self.drop(self.proj(self.norm(y_BHNd.transpose(1, 2).flatten(2))))
        return (y_BND, *seen) if seen else y_BND


class DifferentialAttention(MultiHeadAttention):
    """Multi-head attention of which each head has two maps of weights and takes their difference.

    Ye et al. 2024, "Differential Transformer", equations 1 to 3, for the layer of number `layer` (from 0).  Queries
    and keys of a map have half the width of a head; each head's outputs are normalised alone.  Parameter names are
    those of timm's DiffAttention; arguments as those of `MultiHeadAttention`.
    """

    maps = 2

    def __init__(self, width: int, heads: int, *, layer: int, attention_dropout: float = 0.0, **options: Any) -> None:
        super().__init__(width, heads, attention_dropout=attention_dropout, **options)
        d = width // heads // 2
        self.attend: Attend = DifferentialAttend(attention_dropout)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1, self.lambda_k1 = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.lambda_q2, self.lambda_k2 = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.sub_norm = RmsNorm(2 * d, eps=1e-5)

    def forward(
        self, x_BND: Tensor, rotary: Rotary | None = None, bias: Tensor | None = None, rows: slice | None = None
    ) -> Tensor | WithRows:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(x_BND).chunk(3, dim=2)
        q, k = (each.view(B, N, 2 * self.heads, -1).transpose(1, 2) for each in (q, k))
        v = v.view(B, N, self.heads, D // self.heads).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        added, taken = (self.lambda_q1 * self.lambda_k1).sum().exp(), (self.lambda_q2 * self.lambda_k2).sum().exp()
        options = {"bias": bias, "difference": added - taken + self.lambda_init}
        seen = () if rows is None else (self.attend.exact_weights(q[:, :, rows], k, **options), k)
        y_BHNd = self.attend(q, k, v, **options)
        y_BHNd = self.sub_norm(y_BHNd) * (1 - self.lambda_init)
        y_BND = self.drop(self.proj(self.norm(y_BHNd.transpose(1, 2).flatten(2))))
        return (y_BND, *seen) if seen else y_BND


class CrossAttention(nn.Module):
    """Attention of one sequence to another: queries from `x` (B, N, D), keys and values from `context` (B, M, D).

    The same formula as self-attention; only the origin of the keys and values differs.  Parameter names are those of
    timm's attention pooling: `q`, `kv` (read as (2, heads, d)) and `proj`.  `bias` (B, 1, 1, M) is added to the scores.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.attend = Attend()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, context_BMD: Tensor, bias: Tensor | None = None) -> Tensor:
        (B, N, D), M, H = x_BND.shape, context_BMD.shape[1], self.heads
        q = self.q(x_BND).view(B, N, H, D // H).transpose(1, 2)
        k, v = self.kv(context_BMD).view(B, M, 2, H, D // H).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v, bias=bias).transpose(1, 2).flatten(2))
