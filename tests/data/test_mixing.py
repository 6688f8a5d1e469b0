"""Mixup and CutMix: the formulas written out pair by pair, and Beta variates against SciPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from vit.data.mixing import NUMBERS, BetaQuantiles, Mixing, soft_targets
from vit.data.random import uniform


def numbers(pairs: int, seed: int = 0) -> torch.Tensor:
    return uniform(seed, 0, torch.arange(pairs), 8, NUMBERS)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 1.7, 4.0, 10.0])
def test_quantiles_are_scipys(alpha: float) -> None:
    levels = torch.linspace(0, 1, 4001)[:-1]
    got = BetaQuantiles(alpha)(levels).double().numpy()
    expected = stats.beta.ppf(levels.double().numpy(), alpha, alpha)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0, 3.0])
def test_variates_have_the_distribution_and_its_moments(alpha: float) -> None:
    x = BetaQuantiles(alpha)(uniform(0, 0, torch.arange(20_000), 1, 1)).double().numpy().ravel()
    assert x.min() >= 0
    assert x.max() <= 1
    # the lower half: for small alphas much of the upper one is nearer to 1 than float32 can say
    assert stats.kstest(2 * stats.beta.cdf(x[x < 0.5], alpha, alpha), "uniform").pvalue > 1e-3
    assert stats.binomtest(int((x < 0.5).sum()), len(x)).pvalue > 1e-3
    assert x.mean() == pytest.approx(0.5, abs=0.01)
    assert x.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_mixup_is_the_formula() -> None:
    images = torch.randn(9, 2, 5, 4)
    drawn = numbers(4)
    mixed, kept = Mixing(0.8, 0, 1.0)(images.clone(), drawn)
    weights = stats.beta.ppf(drawn[:, 2].double(), 0.8, 0.8)
    for i in range(8):
        lam, partner = weights[i // 2], i ^ 1
        torch.testing.assert_close(mixed[i], lam * images[i] + (1 - lam) * images[partner], atol=1e-3, rtol=0,
                                   check_dtype=False)  # fmt: skip
        assert float(kept[i]) == pytest.approx(lam, abs=1e-4)
    assert torch.equal(mixed[8], images[8])
    assert kept[8] == 1


def test_cutmix_pastes_a_rectangle_and_weighs_its_true_area() -> None:
    images = torch.randn(40, 1, 12, 8)
    mixed, kept = Mixing(0, 1.0, 1.0)(images.clone(), numbers(20))
    sizes = set()
    for i in range(40):
        pasted = (mixed[i] - images[i ^ 1]).abs() < 1e-5
        own = mixed[i] == images[i]
        assert (pasted | own).all()
        assert float(kept[i]) == pytest.approx(float(own.double().mean()), abs=1e-6)
        rows, columns = pasted[0].any(1).nonzero(), pasted[0].any(0).nonzero()
        if len(rows):  # a full rectangle
            assert pasted[0].sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        sizes.add(int(pasted.sum()))
        assert torch.equal(pasted, (mixed[i ^ 1] - images[i]).abs() < 1e-5)  # both partners: the same place
    assert len(sizes) > 8


def test_with_both_on_either_comes_half_of_the_time() -> None:
    pairs = 2000
    images = torch.zeros(2 * pairs, 1, 4, 4)
    images[1::2] = 1
    mixed, kept = Mixing(1.0, 1.0, 0.8)(images, numbers(pairs))
    first = mixed[0::2].flatten(1)
    flat = (first - first[:, :1]).abs().amax(1) < 1e-6
    mixup = flat & (first[:, 0] > 1e-6) & (first[:, 0] < 1 - 1e-6)
    assert float(mixup.double().mean()) == pytest.approx(0.4, abs=0.03)
    # what an image keeps is what is left of it, in either kind
    torch.testing.assert_close(kept[0::2], 1 - first.mean(1), atol=1e-5, rtol=0)
    assert torch.equal(kept[0::2], kept[1::2])


def test_probability_decides_for_whole_pairs() -> None:
    images = torch.randn(2000, 1, 2, 2)
    mixed, kept = Mixing(1.0, 0, 0.3)(images.clone(), numbers(1000))
    same = (mixed == images).flatten(1).all(1)
    assert torch.equal(same[0::2], same[1::2])
    assert torch.equal(same, kept == 1)
    assert float(same.double().mean()) == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_soft_targets_give_torchs_smoothed_cross_entropy(smoothing: float) -> None:
    logits, labels = torch.randn(10, 7, dtype=torch.float64), torch.arange(10) % 7
    targets = soft_targets(labels, 7, smoothing)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, targets.double()), expected, atol=1e-6, rtol=0)


def test_soft_targets_of_mixed_images_are_timms() -> None:
    mixup = pytest.importorskip("timm.data.mixup")
    labels = torch.tensor([3, 1, 2, 2, 0])
    kept = torch.tensor([0.7, 0.7, 0.25, 0.25, 1.0])
    got = soft_targets(labels, 4, 0.1, kept)
    for i in range(4):
        pair = torch.stack((labels[i], labels[i ^ 1]))
        torch.testing.assert_close(got[i], mixup.mixup_target(pair, 4, float(kept[i]), 0.1)[0])
    torch.testing.assert_close(got[4], soft_targets(labels[4:], 4, 0.1)[0])
    torch.testing.assert_close(got.sum(1), torch.ones(5))
