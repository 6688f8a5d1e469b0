"""Classify features by their k nearest neighbours, without training.

Similarity is the cosine; each of the k nearest votes for its class with exp(similarity / T), T = 0.07 (Wu et al. 2018,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4), as in DINO (Caron et al.
2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
NEIGHBOUR_COUNTS = (1, 5, 10, 20, 50, 100, 200)
"""The values of k that are tried."""

_MAX_SIMILARITIES = 1 << 24  # at a time; 64 MiB


def knn_votes(
    train_ND: Tensor, labels_N: Tensor, queries_MD: Tensor, classes: int, ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:  # fmt: skip
    """Compute for each k the votes of the k nearest training images for every query: (M, classes), float32.

    A k above the number of training images uses all of them.
    """
    train, queries = F.normalize(train_ND.float(), dim=1), F.normalize(queries_MD.float(), dim=1)
    max_k = min(max(ks), len(train))
    rows = max(1, _MAX_SIMILARITIES // max(1, len(train)))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(rows):
        similar, indices = (part @ train.T).topk(max_k, dim=1)
        # relative to the nearest, so that the largest weight is 1, whatever the temperature
        weights, voters = ((similar - similar[:, :1]) / temperature).exp(), labels_N[indices]
        for k in votes:
            part_votes = torch.zeros(len(part), classes, device=part.device)
            votes[k].append(part_votes.scatter_add_(1, voters[:, :k], weights[:, :k]))
    return {k: torch.cat(parts) if parts else torch.zeros(0, classes) for k, parts in votes.items()}


def vote_accuracies(votes_MK: Tensor, labels_M: Tensor) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy from votes; ties go to the lower class index."""
    order = votes_MK.sort(dim=1, descending=True, stable=True).indices
    right = order == labels_M[:, None]
    return {"top1": float(right[:, :1].any(1).float().mean()), "top5": float(right[:, :5].any(1).float().mean())}
