"""Multinomial logistic regression on features: the linear probe's head.

Convex, so there is one solution; found by L-BFGS on standardised features, which every learning rate suits, and given
as a head for the features as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(-2, 13))
"""Those that are tried, from strong to weak: 10 to 1e-6, two a decade."""

_STEPS = 500
_DOUBLE = 1 << 27  # numbers; above, single precision has to do


class Standard:
    """Features (N, D) shifted and scaled to mean 0 and deviation 1 in every dimension that varies."""

    def __init__(self, features_ND: Tensor) -> None:
        wide = features_ND.double() if features_ND.numel() <= _DOUBLE else features_ND.float()
        self.mean, deviation = wide.mean(dim=0), wide.std(dim=0, correction=0)
        self.deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation))
        self.features = (wide - self.mean) / self.deviation

    def head(self, weight_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
        """The same map for features that are not standardised."""
        weight = weight_KD / self.deviation
        return weight, bias_K - weight @ self.mean


def solutions(
    features_ND: Tensor, labels_N: Tensor, classes: int, penalties: Sequence[float] = PENALTIES
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """For each penalty its value, weight (K, D) and bias (K,), float32: what minimises the mean cross-entropy plus
    penalty / 2 times the squared weights on standardised features.

    Each starts from the one before, so penalties go from strong to weak.
    """
    standard = Standard(features_ND)
    x, count = standard.features, classes
    weight = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(count, dtype=x.dtype, device=x.device, requires_grad=True)
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=_STEPS,
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
        found = standard.head(weight.detach(), bias.detach())
        yield penalty, found[0].float(), found[1].float()
