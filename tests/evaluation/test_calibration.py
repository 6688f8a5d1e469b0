"""Temperature scaling: it finds what it should, and nothing can make it do harm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vit.errors import VitError
from vit.evaluation.calibration import TEMPERATURES, fit_temperature


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood, written out image by image."""
    total = 0.0
    for row, label in zip(np.asarray(logits, float) / temperature, labels, strict=True):
        total += math.log(sum(math.exp(z - row.max()) for z in row)) + row.max() - row[label]
    return total / len(labels)


def sampled(temperature: float, count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits for which exactly this temperature is right: labels are drawn from softmax(logits / temperature)."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count, classes)) * 2 * temperature
    noise = draw.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0, 1.7, 4.0, 12.0])
def test_a_known_temperature_is_recovered(temperature):
    logits, labels = sampled(temperature, 20_000, 10, seed=3)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_it_is_the_minimum_of_the_formula():
    logits, labels = sampled(1.8, 60, 4, seed=0)

    def objective(a: float) -> float:
        return len(labels) * loss(logits, labels, 1 / a) + 4 * (a - 1 - math.log(a))

    best = 1 / fit_temperature(logits, labels)
    grid = np.geomspace(1 / 20, 20, 4001)
    assert abs(math.log(best / grid[np.argmin([objective(a) for a in grid])])) < 2e-3
    assert objective(best) <= min(objective(best * (1 + 1e-4)), objective(best * (1 - 1e-4)))


def test_nothing_to_learn_from_is_one():
    assert fit_temperature(np.zeros((0, 10), np.float32), np.zeros(0, np.int64)) == 1.0
    assert fit_temperature(np.full((50, 3), 2.5), np.arange(50) % 3) == 1.0
    assert fit_temperature(np.array([[4.0], [-2.0]]), np.array([0, 0])) == 1.0


def test_perfect_data_is_sharpened_within_reason():
    # plain likelihood would run to the end of the range; a later mistake would cost twenty times its margin
    logits = np.eye(5)[np.arange(100) % 5] * 6
    temperature = fit_temperature(logits, np.arange(100) % 5)
    assert 0.4 < temperature < 1.0


def test_always_wrong_is_softened_within_range():
    logits = np.eye(5)[np.arange(500) % 5] * 30
    temperature = fit_temperature(logits, (np.arange(500) + 1) % 5)
    assert 10 < temperature <= TEMPERATURES[1]


def test_extreme_logits_stay_finite():
    for scale in (1e-30, 1e-6, 1e6, 1e30):
        logits, labels = sampled(1.0, 50, 4, seed=1)
        temperature = fit_temperature(logits * scale, labels)
        assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]


def test_tensors_and_half_precision_are_taken():
    logits, labels = sampled(2.0, 500, 5, seed=5)
    exact = fit_temperature(logits, labels)
    assert fit_temperature(torch.tensor(logits), torch.tensor(labels)) == pytest.approx(exact, rel=1e-9)
    assert fit_temperature(torch.tensor(logits).bfloat16(), torch.tensor(labels)) == pytest.approx(exact, rel=0.05)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(VitError, match="image 1 is not finite"):
        fit_temperature(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1]))


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    count, classes = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    logits = draw(hnp.arrays(np.float32, (count, classes), elements=st.floats(-60, 60, width=32)))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    return logits, labels


@settings(max_examples=200, deadline=None)
@given(cases())
def test_it_never_harms(case):
    logits, labels = case
    temperature = fit_temperature(logits, labels)
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
    assert loss(logits, labels, temperature) <= loss(logits, labels, 1.0) + 1e-9
    scaled = logits.astype(np.float64) / temperature
    assert (scaled.argmax(axis=1) == logits.argmax(axis=1)).all()


@settings(max_examples=50, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_order_of_images_and_classes_does_not_matter(case, random):
    logits, labels = case
    rows = list(range(len(logits)))
    columns = list(range(logits.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled = fit_temperature(logits[rows][:, columns], np.argsort(columns)[labels[rows]])
    assert shuffled == pytest.approx(fit_temperature(logits, labels), rel=1e-7)
