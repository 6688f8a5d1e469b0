"""Normalisation of a token's channels, in the two forms that Vision Transformers have.

- layer: to mean 0 and variance 1, then a gain and an offset a channel (Ba et al. 2016, "Layer Normalization");
- rms: to a mean square of 1, then a gain a channel (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization").

`eps` is added to the variance or mean square; published checkpoints were trained with 1e-6 or 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """`x / sqrt(mean of x² + eps) * weight` over the last axis, by torch's kernel.

    Written out while torch's tracer looks on: ONNX has had the whole as one operation since opset 23 only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return x * (x.square().mean(dim=-1, keepdim=True) + (self.eps or 0.0)).rsqrt() * self.weight
        return super().forward(x)


NORMS = {"layer": nn.LayerNorm, "rms": RmsNorm}

MakeNorm = Callable[[int], nn.Module]
"""Given a width, the norm of (..., width)."""

LAYER_NORM: MakeNorm = partial(nn.LayerNorm, eps=1e-6)


def make_norm(kind: str, eps: float) -> MakeNorm:
    """What builds the norms of a model: `kind` is one of `NORMS`."""
    return partial(NORMS[kind], eps=eps)
