"""Examples: the right ones, however the split is cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit.data.batches import Batch
from vit.training.examples import Example, Examples


def run(logits: torch.Tensor, labels: torch.Tensor, cuts: list[int], count: int) -> Examples:
    """Feed everything in batches that end at `cuts`; each batch is filled up with an invalid repeat."""
    examples = Examples(count)
    for start, end in zip([0, *cuts], [*cuts, len(labels)], strict=True):
        rows = torch.cat([torch.arange(start, end), torch.tensor([max(0, end - 1)])])
        valid = torch.arange(len(rows)) < end - start
        images = (rows[:, None, None, None] % 256).to(torch.uint8).expand(-1, 1, 2, 2)
        examples.add(logits[start:end], Batch(images, labels[rows], rows, valid))
    return examples


@given(st.integers(1, 60), st.integers(0, 8), st.data())
@settings(max_examples=60)
def test_the_most_confident_mistakes_and_a_fixed_sample(n: int, count: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(n)
    logits, labels = torch.randn(n, 4, generator=generator), torch.randint(0, 4, (n,), generator=generator)
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=4)))
    examples, whole = run(logits, labels, cuts, count), run(logits, labels, [], count)
    assert [e.index for e in examples.right()] == [e.index for e in whole.right()]

    probabilities = logits.double().softmax(1)
    top, predicted = probabilities.max(1)
    misses = [i for i in range(n) if predicted[i] != labels[i]]
    expected = sorted(misses, key=lambda i: -float(top[i]))[:count]
    assert [e.index for e in examples.wrong()] == expected
    assert len(examples.right()) == min(count, n - len(misses))
    for e in [*examples.right(), *examples.wrong()]:
        assert int(e.image[0, 0, 0]) == e.index % 256
        assert (e.label, e.predicted) == (int(labels[e.index]), int(predicted[e.index]))
        assert e.probability == pytest.approx(float(top[e.index]), rel=1e-5)
        assert e.label_probability == pytest.approx(float(probabilities[e.index, e.label]), rel=1e-5)
    assert all(e.label == e.predicted for e in examples.right())


def test_the_sample_is_mixed_and_stays() -> None:
    n = 1000
    labels = torch.arange(n) // 100  # sorted by class, as folders are
    logits = torch.eye(10)[labels]
    sample = [e.index for e in run(logits, labels, [300, 700], 16).right()]
    assert len({i // 100 for i in sample}) >= 6
    logits[::7] = 0  # ties go to class 0: some of the sample may be lost, the others stay
    logits[::7, 0] = 1
    later = {e.index for e in run(logits, labels, [500], 16).right()}
    kept = {i for i in sample if i % 7 or i < 100}
    assert kept <= later


def test_clearing_forgets() -> None:
    examples = run(torch.eye(4), torch.tensor([0, 1, 3, 2]), [], 4)
    assert len(examples.right()) == len(examples.wrong()) == 2
    assert isinstance(examples.wrong()[0], Example)
    examples.clear()
    assert examples.right() == examples.wrong() == []


def test_large_indices_and_half_precision() -> None:
    index = torch.tensor([2**40 + 1, 2**40])
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    examples = Examples(2)
    labels = torch.tensor([0, 0])
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]], dtype=torch.bfloat16)
    examples.add(logits, Batch(images, labels, index, torch.ones(2, dtype=torch.bool)))
    assert [e.index for e in examples.right()] == [2**40 + 1]
    assert [e.index for e in examples.wrong()] == [2**40]
    np.testing.assert_allclose(examples.wrong()[0].probability, 1 / (1 + np.exp(-5)), rtol=1e-3)
