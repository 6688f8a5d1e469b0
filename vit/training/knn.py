"""Classification by the nearest neighbours' labels: how good features are as they stand, with nothing trained.

Cosine similarity, each of the k nearest voting for its class with exp(similarity / T), T = 0.07: Wu et al. 2018,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4; as DINO reports it (Caron et
al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
"""The values of k that are tried."""

_BLOCK = 1 << 24  # similarities at a time; 64 MiB


def votes(
    train_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, classes: int, ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:  # fmt: skip
    """For each k, the votes of every query's k nearest training images: (M, classes), float32.

    A k beyond the number of training images takes them all.
    """
    train, queries = F.normalize(train_ND.float(), dim=1), F.normalize(queries_MD.float(), dim=1)
    most = min(max(ks), len(train))
    rows = max(1, _BLOCK // max(1, len(train)))
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(rows):
        similar, places = (part @ train.T).topk(most, dim=1)
        # relative to the nearest, so that the largest weight is 1, whatever the temperature
        weights, voters = ((similar - similar[:, :1]) / temperature).exp(), labels_N[places]
        for k in found:
            cast = torch.zeros(len(part), classes, device=part.device)
            found[k].append(cast.scatter_add_(1, voters[:, :k], weights[:, :k]))
    return {k: torch.cat(parts) if parts else torch.zeros(0, classes) for k, parts in found.items()}


def accuracies(votes_MK: Tensor, labels_M: Tensor) -> dict[str, float]:
    """Shares of images whose class has the most votes, or is among the first five; ties go to the lower index."""
    order = votes_MK.sort(dim=1, descending=True, stable=True).indices
    right = order == labels_M[:, None]
    return {"top1": float(right[:, :1].any(1).float().mean()), "top5": float(right[:, :5].any(1).float().mean())}
