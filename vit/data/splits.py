"""Stratified splits, which depend on labels and a seed, and on nothing else.

Notable:
- Every class keeps at least one image in train: a class that is only in the test split cannot be learned.
- Held-out parts have exactly the size asked for, as far as classes of one image allow; what rounding leaves over goes
  to the classes that were rounded down most.
- The order of images inside a split is the order they came in.
"""

from __future__ import annotations

import numpy as np

from vit.data.counter_rng import shuffled

_PARTS, _CAP, _MEMBERS = 1, 100, 1000  # streams of random numbers; one of the last for each class


def _class_counts(counts: np.ndarray, fraction: float, room: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Count how many of each class to take: its fraction, rounded so that the sum is right (largest remainder).

    At most `room` of each.  `order` is random and settles equal remainders, so that it is not always the first classes
    that give more.
    """
    exact = counts * fraction
    taken = np.minimum(np.floor(exact + 1e-9).astype(np.int64), room)
    order = order[np.argsort(-(exact - taken)[order], kind="stable")]
    open_ = [c for c in order if taken[c] < min(room[c], exact[c])]
    missing = round(float(counts.sum()) * fraction) - int(taken.sum())
    taken[open_[: max(missing, 0)]] += 1
    return taken


def stratified(labels: np.ndarray, fractions: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Cut `len(fractions)` held-out parts, and what remains, out of a labelled set.

    Args:
        labels: int64 (N,).
        fractions: of the whole, for each held-out part; the same in every class.
        seed: the only randomness.

    Returns:
        The remainder (train) and then one part per fraction: sorted int64 indices, together a partition of range(N).
        Every class present keeps at least one image in the remainder.
    """
    labels = np.asarray(labels, dtype=np.int64)
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    room = counts - 1
    taken_by_part = []
    for part, fraction in enumerate(fractions):
        taken = _class_counts(counts, fraction, room, shuffled(len(classes), seed, _PARTS + part))
        room = room - taken
        taken_by_part.append(taken)
    by_class = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1]) if len(classes) else []
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for c, members in enumerate(by_class):
        # the class's own number picks its shuffle: other classes growing does not move its images
        members = members[shuffled(len(members), seed, _MEMBERS + int(classes[c]))]
        ends = np.cumsum([taken[c] for taken in taken_by_part])
        *held, rest = np.split(members, ends)
        for part, indices in enumerate([rest, *held]):
            parts[part].append(indices)
    return [np.sort(np.concatenate(part)) if part else np.empty(0, dtype=np.int64) for part in parts]


def stratified_sample(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Choose `limit` indices, stratified: a class keeps its fraction, and one image at least where `limit` allows."""
    if len(labels) <= limit:
        return np.arange(len(labels))
    _, inverse, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    draw = shuffled(len(counts), seed, _CAP)
    if limit >= len(counts):
        # one of each class first, then a fraction of the rest
        extra = _class_counts(counts - 1, (limit - len(counts)) / max(len(labels) - len(counts), 1), counts - 1, draw)
        taken = 1 + extra
    else:
        taken = np.zeros_like(counts)
        taken[draw[:limit]] = 1
    order = shuffled(len(labels), seed, _CAP + 1)
    order = order[np.argsort(inverse[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    picked = [order[start : start + n] for start, n in zip(starts, taken, strict=True)]
    return np.sort(np.concatenate(picked))
