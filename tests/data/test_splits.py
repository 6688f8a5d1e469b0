"""Stratified splits: a partition, in proportion, every class learnable, and always the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.data.splits import stratified, stratified_sample

labelled = st.lists(st.integers(0, 12), min_size=1, max_size=300).map(lambda values: np.array(values))
fractions = st.tuples(st.floats(0, 0.5), st.floats(0, 0.45))


@given(labelled, fractions, st.integers(0, 2**32))
def test_a_partition_with_every_class_in_train(labels, shares, seed):
    parts = stratified(labels, shares, seed)
    assert len(parts) == 3
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    assert set(labels[parts[0]]) == set(labels)


@given(labelled, fractions, st.integers(0, 2**32))
def test_in_proportion(labels, shares, seed):
    parts = stratified(labels, shares, seed)
    for share, part in zip(shares, parts[1:], strict=True):
        for label in np.unique(labels):
            count = (labels == label).sum()
            taken = (labels[part] == label).sum()
            assert taken < count * share + 1
            if count > 10:  # a class keeps one image in train, so a small one may give less
                assert taken > count * share - 1 - 1e-6
        assert len(part) <= round(len(labels) * share) + 1e-9


@given(st.integers(2, 8), st.integers(20, 80), fractions, st.integers(0, 1000))
def test_exact_sizes_where_classes_are_large_enough(classes, count, shares, seed):
    labels = np.tile(np.arange(classes), count)
    train, *held = stratified(labels, shares, seed)
    for share, part in zip(shares, held, strict=True):
        assert len(part) == round(len(labels) * share)
        assert np.ptp(np.bincount(labels[part], minlength=classes)) <= 1
    assert len(train) == len(labels) - sum(map(len, held))


@given(labelled, fractions, st.integers(0, 1000))
def test_the_same_every_time(labels, shares, seed):
    first, second = stratified(labels, shares, seed), stratified(labels.copy(), shares, seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_seed_gives_another_split():
    labels = np.repeat(np.arange(10), 50)
    assert not np.array_equal(stratified(labels, (0.2,), 0)[1], stratified(labels, (0.2,), 1)[1])


def test_a_known_split():
    # written down: a released split that moves would quietly mix test images into training
    labels = np.arange(40) % 4
    _, val, test = stratified(labels, (0.1, 0.2), 0)
    assert (val.tolist(), test.tolist()) == ([1, 26, 31, 32], [9, 11, 14, 20, 21, 27, 30, 36])


def test_small_classes():
    train, val, test = stratified(np.array([0, 1, 2, 2]), (0.4, 0.4), 0)
    assert {0, 1} <= set(train.tolist())
    assert len(val) + len(test) == 1
    empty = stratified(np.empty(0, dtype=np.int64), (0.1, 0.1), 0)
    assert [len(part) for part in empty] == [0, 0, 0]


@given(labelled, st.integers(1, 350), st.integers(0, 1000))
@settings(max_examples=200)
def test_cap_keeps_shares_and_classes(labels, most, seed):
    kept = stratified_sample(labels, most, seed)
    assert len(kept) == min(most, len(labels))
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(kept, stratified_sample(labels, most, seed))
    if most >= len(np.unique(labels)):
        assert set(labels[kept]) == set(labels)
        for label in np.unique(labels):
            exact = (labels == label).mean() * len(kept)
            assert abs((labels[kept] == label).sum() - exact) <= 1 + len(np.unique(labels)) / 2


def test_cap_below_the_number_of_classes():
    labels = np.arange(10)
    assert len(set(labels[stratified_sample(labels, 3, 0)])) == 3
