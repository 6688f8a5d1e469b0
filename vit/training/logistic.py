"""Fit multinomial logistic regression on features: the linear probe's head.

The problem is convex.  L-BFGS solves it on standardised features; the result is converted to a head for the original
features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(-2, 13))
"""The penalties to try, from strong to weak: 10 to 1e-6, two per decade."""

_MAX_ITERATIONS = 500
_MAX_FLOAT64_NUMBERS = 1 << 27  # larger features are computed in float32


class StandardisedFeatures:
    """Standardise features (N, D) to mean 0 and deviation 1 in every dimension that varies."""

    def __init__(self, features_ND: Tensor) -> None:
        precise = features_ND.double() if features_ND.numel() <= _MAX_FLOAT64_NUMBERS else features_ND.float()
        self.mean, deviation = precise.mean(dim=0), precise.std(dim=0, correction=0)
        self.deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation))
        self.features = (precise - self.mean) / self.deviation

    def head(self, weight_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """Convert a linear map of standardised features to one of the original features."""
        weight = weight_KD / self.deviation
        return weight, bias_K - weight @ self.mean


def fit_logistic(
    features_ND: Tensor, labels_N: Tensor, classes: int, penalties: Sequence[float] = PENALTIES
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield for each penalty its value, weight (K, D) and bias (K,), float32.

    They minimise the mean cross-entropy plus penalty / 2 times the squared weights on standardised features.  Each fit
    starts from the previous one, so penalties should go from strong to weak.
    """
    standardised = StandardisedFeatures(features_ND)
    x, count = standardised.features, classes
    weight = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(count, dtype=x.dtype, device=x.device, requires_grad=True)
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=_MAX_ITERATIONS,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, labels_N) + penalty / 2 * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        head = standardised.head(weight.detach(), bias.detach())
        yield penalty, head[0].float(), head[1].float()
