"""Counter-based random numbers: against SplitMix64 in Python's whole numbers, and against what random means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vit.data.random import Stream, draw, offsets, permutation, uniform

WORD = (1 << 64) - 1


class SplitMix64:
    """The published generator, written from its description, with the state it usually has."""

    def __init__(self, seed: int) -> None:
        self.state = seed & WORD

    def __call__(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & WORD
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    def output(self, number: int) -> int:
        """The output after `number` others."""
        self.state = (self.state + number * 0x9E3779B97F4A7C15) & WORD
        return self()


def reference(seed: int, epoch: int, index: int, stream: int, k: int) -> int:
    state = 0
    for place in (seed, epoch, index, stream * 2**20 + k):
        state = SplitMix64(state).output(place)
    return state


def test_the_reference_is_splitmix64() -> None:
    generator = SplitMix64(1234567)
    assert [generator() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 10_000),
    index=st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    stream=st.integers(0, 2**20 - 1),
    n=st.integers(1, 9),
)
def test_values_are_those_of_the_reference(seed: int, epoch: int, index: list[int], stream: int, n: int) -> None:
    got = uniform(seed, epoch, torch.tensor(index), stream, n)
    expected = [[(reference(seed, epoch, i, stream, k) >> 40) / 2**24 for k in range(n)] for i in index]
    assert got.dtype == torch.float32
    assert got.double().tolist() == expected


@given(seed=st.integers(0, 2**64), epoch=st.integers(0, 99), n=st.integers(0, 50))
def test_permutation_sorts_the_keys_of_the_reference(seed: int, epoch: int, n: int) -> None:
    def key(i: int) -> int:
        word = reference(seed, epoch, i, Stream.ORDER, 0)
        return word - (1 << 64) if word >> 63 else word

    assert permutation(seed, epoch, n).tolist() == sorted(range(n), key=key)


def test_a_sample_draws_the_same_in_any_company() -> None:
    index = torch.tensor([5, 900_000, 17, 3])
    together = uniform(7, 2, index, 4, 6)
    alone = torch.cat([uniform(7, 2, index[i : i + 1], 4, 6) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(uniform(7, 2, index, 4, 3), together[:, :3])


def test_several_streams_come_in_one_draw() -> None:
    index = torch.arange(20)
    both = draw(1, 2, index, torch.cat((offsets(3, 4), offsets(9, 2))))
    assert torch.equal(both, torch.cat((uniform(1, 2, index, 3, 4), uniform(1, 2, index, 9, 2)), dim=1))


def test_no_global_generator_is_read_or_moved() -> None:
    before = torch.get_rng_state()
    first = uniform(0, 0, torch.arange(10), 1, 3), permutation(0, 0, 100)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = uniform(0, 0, torch.arange(10), 1, 3), permutation(0, 0, 100)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_arguments_are_left_alone() -> None:
    index, names = torch.arange(6), offsets(1, 3)
    draw(1, 1, index, names)
    assert torch.equal(index, torch.arange(6))
    assert torch.equal(names, offsets(1, 3))


# One grid of numbers for each way in which neighbours might depend on each other. The seeds are fixed: these tests
# cannot fail by chance, only when the generator changes.
def grid(kind: str) -> np.ndarray:
    many = torch.arange(4096)
    return {
        "index": lambda: uniform(0, 0, many, 1, 16),
        "epoch": lambda: torch.cat([uniform(0, e, many, 1, 1) for e in range(16)], 1),
        "seed": lambda: torch.cat([uniform(s, 0, many, 1, 1) for s in range(16)], 1),
        "stream": lambda: torch.cat([uniform(0, 0, many, s, 1) for s in range(16)], 1),
        "sparse index": lambda: uniform(0, 0, many * 1024, 1, 16),
    }[kind]().numpy()


KINDS = ["index", "epoch", "seed", "stream", "sparse index"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_uniform(kind: str) -> None:
    values = grid(kind)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    counts = np.bincount((values.ravel() * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_independent(kind: str) -> None:
    values = grid(kind)
    for left, right in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):
        cells = (left.ravel() * 16).astype(int) * 16 + (right.ravel() * 16).astype(int)
        assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-3
    # all 120 pairs of columns: correlations of independent columns are normal with deviation 1 / sqrt(rows)
    correlations = np.corrcoef(values.T)[np.triu_indices(16, 1)] * np.sqrt(len(values))
    assert np.abs(correlations).max() < 4.5
    assert stats.kstest(correlations, "norm").pvalue > 1e-3


@pytest.mark.parametrize("bit", [0, 1, 5, 13, 20, 31, 40])
@pytest.mark.parametrize("what", ["index", "epoch", "seed", "stream"])
def test_one_bit_in_changes_half_of_the_bits_out(bit: int, what: str) -> None:
    index = torch.arange(2000) * 977
    if what == "stream" and bit >= 20:
        pytest.skip("streams have 20 bits")
    changed = {"seed": 3, "epoch": 2, "stream": 1}
    before = uniform(3, 2, index, 1, 1)
    if what == "index":
        after = uniform(3, 2, index ^ (1 << bit), 1, 1)
    else:
        changed[what] ^= 1 << bit
        after = uniform(changed["seed"], changed["epoch"], index, changed["stream"], 1)
    bits = (before * 2**24).long() ^ (after * 2**24).long()
    flipped = torch.stack([(bits >> k) & 1 for k in range(24)]).double().mean(dim=(1, 2))
    # 2000 coins: deviation 0.011
    assert (flipped - 0.5).abs().max() < 0.05


def test_permutations_are_even_and_change_with_epoch_and_seed() -> None:
    orders = np.stack([permutation(s, e, 12).numpy() for s in range(40) for e in range(100)])
    assert (np.sort(orders, axis=1) == np.arange(12)).all()
    for place in range(12):  # each image is as likely at each place
        assert stats.chisquare(np.bincount(orders[:, place], minlength=12)).pvalue > 1e-4
    assert len({tuple(order) for order in orders}) > 3990
