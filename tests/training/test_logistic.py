"""The head of a linear probe against scikit-learn's logistic regression and the condition of its minimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from vit.training.logistic import PENALTIES, StandardisedFeatures, fit_logistic


def sample(n=120, d=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[labels]
    # no two dimensions of one scale, and one that never varies
    return torch.tensor(np.column_stack([x * 10.0 ** np.arange(-2, d - 2) + 3, np.full(n, 2.0)])).float(), labels


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-3])
def test_the_solution_is_scikit_learns(penalty):
    x, labels = sample()
    ((_, weight, bias),) = fit_logistic(x, torch.tensor(labels), 4, [penalty])
    standard = StandardisedFeatures(x).features.numpy()
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit(standard, labels)
    ours = (x.double() @ weight.double().T + bias.double()).softmax(1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(standard), atol=1e-4)


def test_the_gradient_is_nothing_there():
    x, labels = sample(classes=3)
    y, standard = torch.tensor(labels), StandardisedFeatures(x)
    for penalty, weight, bias in fit_logistic(x, y, 3, [0.1, 0.001]):
        # back to the standardised space, where the penalty counts
        w = (weight.double() * standard.deviation).requires_grad_()
        b = (bias.double() + weight.double() @ standard.mean).requires_grad_()
        loss = F.cross_entropy(standard.features @ w.T + b, y) + penalty / 2 * w.square().sum()
        for gradient in torch.autograd.grad(loss, [w, b]):
            assert float(gradient.abs().max()) < 1e-4


def test_the_way_there_does_not_matter():
    x, labels = sample()
    y = torch.tensor(labels)
    ((_, alone, _),) = fit_logistic(x, y, 4, [1e-3])
    *_, (_, after, _) = fit_logistic(x, y, 4, [10, 1, 0.1, 0.01, 1e-3])
    torch.testing.assert_close(alone * x.std(0), after * x.std(0), atol=2e-3, rtol=1e-3)


def test_penalties_go_from_strong_to_weak():
    assert list(PENALTIES) == sorted(PENALTIES, reverse=True)
    assert PENALTIES[0] == pytest.approx(10)
    assert PENALTIES[-1] == pytest.approx(1e-6)


def test_a_class_without_images_gets_an_answer_and_never_wins():
    x, labels = sample(classes=3)
    ((_, weight, bias),) = fit_logistic(x, torch.tensor(labels), 5, [1e-2])
    assert weight.shape == (5, x.shape[1])
    assert set((x @ weight.T + bias).argmax(1).tolist()) <= {0, 1, 2}
