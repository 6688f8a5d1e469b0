"""Attention: weights that are not parameters but are computed from the elements themselves.

Read from top to bottom, this file follows the lecture:

1. `dot_product_attention`: plain self-attention, no parameters.
2. `scaled_dot_product_attention`: queries, keys and values, written out.
3. `MultiHeadAttention`: several of them side by side, learned, through torch's fused kernel.
4. `CrossAttention`: queries from one sequence, keys and values from another.

Letters in names are axes: B batch, N tokens, M tokens attended to, D width, H heads, d width of one head (D = H d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from vit.model.norms import LAYER_NORM, MakeNorm
from vit.model.positions import Rotary, rotate

if TYPE_CHECKING:
    from vit.model.reduction import Reducer


def dot_product_attention(x_BND: Tensor, dropout: float = 0.0, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain self-attention: every output is a mean of all inputs, weighted by similarity; nothing is learned.

        w'_ij = <x_i, x_j>,   w_ij = exp(w'_ij) / sum_j exp(w'_ij),   y_i = sum_j w_ij x_j

    Takes (B, N, D); returns the outputs (B, N, D) and the weights (B, N, N), whose rows sum to 1.
    `dropout` is the share of weights dropped from the mean; `bias` is added to the scores.
    """
    weights_BNN = attention_weights(x_BND, x_BND, bias, scale=1.0)
    return F.dropout(weights_BNN, dropout, training=dropout > 0) @ x_BND, weights_BNN


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys, written out: `softmax(q kᵀ / sqrt(d)) v` (Vaswani et al. 2017, equation 1).

    Dividing by sqrt(d) keeps the scores of unit-variance q and k at unit variance, whatever d is, so that softmax
    does not saturate.  Takes q (..., N, d), k (..., M, d), v (..., M, d); returns outputs (..., N, d) and the
    weights (..., N, M), whose rows sum to 1.  `dropout` is the share of weights dropped from the mean; `bias` is added
    to the scores.
    """
    weights = attention_weights(q, k, bias)
    return F.dropout(weights, dropout, training=dropout > 0) @ v, weights


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """How much each query attends to each key, `softmax(q kᵀ / sqrt(d))`: (..., N, d), (..., M, d) -> (..., N, M).

    `bias` is added to the scores; `scale` stands in the place of 1 / sqrt(d).
    """
    scores = q @ k.transpose(-2, -1)
    if scale != 1:
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)


class DotProductAttention(nn.Module):
    """`dot_product_attention` as a layer of a model: no parameters, one head.  (B, N, D) -> (B, N, D)."""

    heads = 1

    def __init__(self, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_dropout = attention_dropout
        self.drop = nn.Dropout(dropout)

    def attend(
        self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the weights (B, 1, N, N) beside the output."""
        x_B1ND, bias = x_BND.unsqueeze(1), None
        if reducer is not None:
            reducer.look(x_B1ND, x_B1ND, scale=1.0)
            bias = reducer.bias()
        y_B1ND, weights_B1NN = dot_product_attention(x_B1ND, self.attention_dropout * self.training, bias)
        return self.drop(y_B1ND.squeeze(1)), weights_B1NN

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None) -> Tensor:
        return self.attend(x_BND, rotary, reducer)[0]


class MultiHeadAttention(nn.Module):
    """Self-attention with learned queries, keys and values in `heads` subspaces (Vaswani et al. 2017, section 3.2.2).

    With one head this is plain scaled dot-product self-attention.  `forward` runs torch's fused kernel, which never
    holds the (N, N) weights; `attend` computes the same output step by step and returns the weights as well.
    Parameter names and layout are timm's: `qkv` is one matrix, read as (3, heads, d).

    `qk_norm` normalises each head's queries and keys (Dehghani et al. 2023, "Scaling Vision Transformers to 22
    Billion Parameters"), which bounds the scores and so steadies training at high learning rates.  `attention_norm`
    normalises the heads' outputs side by side, before they are mixed (Wang et al. 2022, "Foundation Transformers").
    """

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
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = norm(width // heads) if qk_norm else nn.Identity()
        self.norm = norm(width) if attention_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=proj_bias)
        self.drop = nn.Dropout(dropout)

    def project(
        self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, each (B, H, N, d), normalised and rotated where asked for.

        A reducer has the angles of the tokens that are left, and sees queries and keys.
        """
        B, N, D = x_BND.shape
        rotary = rotary if reducer is None else reducer.rotary
        q, k, v = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if reducer is not None:
            reducer.look(q, k)
        return q, k, v

    def merge(self, y_BHNd: Tensor) -> Tensor:
        """Put the heads side by side again and mix them: (B, H, N, d) -> (B, N, D)."""
        return self.drop(self.proj(self.norm(y_BHNd.transpose(1, 2).flatten(2))))

    def attend(
        self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the weights (B, H, N, N) beside the output (B, N, D)."""
        q, k, v = self.project(x_BND, rotary, reducer)
        bias = None if reducer is None else reducer.bias()
        y_BHNd, weights_BHNN = scaled_dot_product_attention(q, k, v, self.attention_dropout * self.training, bias)
        return self.merge(y_BHNd), weights_BHNN

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """The means of the values, by torch's fused kernel, which never holds the weights: -> (B, N, D)."""
        dropout = self.attention_dropout if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout))

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None) -> Tensor:
        q, k, v = self.project(x_BND, rotary, reducer)
        return self.mix(q, k, v, None if reducer is None else reducer.bias())


class CrossAttention(nn.Module):
    """Attention of one sequence to another: queries from `x` (B, N, D), keys and values from `context` (B, M, D).

    The same formula as self-attention; only the origin of the keys and values differs.  Parameter names are those of
    timm's attention pooling: `q`, `kv` (read as (2, heads, d)) and `proj`.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def project(self, x_BND: Tensor, context_BMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, d) of `x`; keys and values (B, H, M, d) of `context`."""
        (B, N, D), M, H = x_BND.shape, context_BMD.shape[1], self.heads
        q = self.q(x_BND).view(B, N, H, D // H).transpose(1, 2)
        k, v = self.kv(context_BMD).view(B, M, 2, H, D // H).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x_BND: Tensor, context_BMD: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `CrossAttention.forward`, with the weights (B, H, N, M) beside the output (B, N, D)."""
        y_BHNd, weights_BHNM = scaled_dot_product_attention(*self.project(x_BND, context_BMD), bias=bias)
        return self.merge(y_BHNd), weights_BHNM

    def merge(self, y_BHNd: Tensor) -> Tensor:
        """Put the heads side by side again and mix them: (B, H, N, d) -> (B, N, D)."""
        return self.proj(y_BHNd.transpose(1, 2).flatten(2))

    def forward(self, x_BND: Tensor, context_BMD: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.project(x_BND, context_BMD), attn_mask=bias))
