"""The random numbers of splits and shapes: fixed for ever, uniform, independent."""

import numpy as np

from vit.data.counter_rng import keys, mix_bits, shuffled, uniform


def reference_mix(value):
    """SplitMix64's finaliser in Python's integers."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_mixing_against_plain_integers():
    values = [0, 1, 2, 12345678901234567890, 2**64 - 1]
    assert mix_bits(np.array(values, dtype=np.uint64)).tolist() == [reference_mix(value) for value in values]


def test_published_values_of_splitmix64():
    # its first outputs for seed 1234567: state += golden ratio, then the finaliser
    state = (1234567 + 0x9E3779B97F4A7C15 * np.arange(1, 4, dtype=object)) % 2**64
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix_bits(state.astype(np.uint64)).tolist() == expected


def test_an_index_never_depends_on_the_others():
    many = keys(3, 1, np.arange(1000))
    assert keys(3, 1, np.array([417]))[0] == many[417]
    assert np.array_equal(uniform(many, 2, 5)[417], uniform(many[417:418], 2, 9)[0, :5])
    assert len(set(many.tolist()) | set(keys(4, 1, np.arange(1000)).tolist())) == 2000
    assert len(set(many.tolist()) | set(keys(3, 2, np.arange(1000)).tolist())) == 2000


def test_uniform_and_uncorrelated():
    draws = uniform(keys(0, 0, np.arange(20_000)), 0, 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(draws.var(axis=0) - 1 / 12).max() < 0.002
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=0)], axis=1).T)
    assert np.abs(correlation - np.eye(16)).max() < 0.03


def test_permutations():
    first = shuffled(500, 0, 1)
    assert np.array_equal(np.sort(first), np.arange(500))
    assert not np.array_equal(first, shuffled(500, 1, 1))
    assert not np.array_equal(first, shuffled(500, 0, 2))
    assert shuffled(0, 0, 0).tolist() == []
    places = np.array([shuffled(5, seed, 0) for seed in range(4000)])
    assert np.abs(np.stack([np.bincount(places[:, k]) for k in range(5)]) / 4000 - 0.2).max() < 0.03
