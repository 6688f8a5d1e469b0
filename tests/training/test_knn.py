"""Nearest neighbours' votes against the rule written out image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.training import knn


def by_hand(train, labels, queries, classes, k, temperature):
    """Every pair's cosine in float64, sorted by Python."""
    rows = []
    for query in queries:
        cosines = [float(query @ row / math.sqrt((query @ query) * (row @ row))) for row in train]
        closest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        cast = [0.0] * classes
        for i in closest:
            cast[labels[i]] += math.exp((cosines[i] - cosines[closest[0]]) / temperature)
        rows.append(cast)
    return np.array(rows)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 6),
    classes=st.integers(1, 4),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_votes_are_those_of_the_rule(n, m, classes, temperature, seed):
    rng = np.random.default_rng(seed)
    train, queries = rng.normal(size=(n, 7)), rng.normal(size=(m, 7)) * 5
    labels = rng.integers(0, classes, n)
    ks = [1, 3, n, n + 5]
    found = knn.knn_votes(torch.tensor(train), torch.tensor(labels), torch.tensor(queries), classes, ks, temperature)
    for k in ks:
        expected = by_hand(train, labels, queries, classes, k, temperature)
        np.testing.assert_allclose(found[k].numpy(), expected, atol=2e-4, rtol=1e-3)


def test_large_sets_are_taken_part_by_part(monkeypatch):
    torch.manual_seed(0)
    train, queries, labels = torch.randn(50, 8), torch.randn(23, 8), torch.arange(50) % 5
    whole = knn.knn_votes(train, labels, queries, 5, [7])[7]
    monkeypatch.setattr(knn, "_MAX_SIMILARITIES", 100)
    torch.testing.assert_close(knn.knn_votes(train, labels, queries, 5, [7])[7], whole)


def test_no_queries_get_no_votes():
    train, labels = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    assert knn.knn_votes(train, labels, torch.zeros(0, 2), 2, [1])[1].shape == (0, 2)


def test_ties_go_to_the_lower_class():
    votes, labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2, 2])
    assert knn.vote_accuracies(votes, labels) == pytest.approx({"top1": 1 / 3, "top5": 1.0})
