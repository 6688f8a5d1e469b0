"""Measures of a map, against loops written out and against models whose right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from vit.explain.faithfulness import (
    covered,
    energy,
    interval,
    perturb,
    pointing,
    pointing_chance,
    randomisation,
    rank_correlation,
)
from vit.model import VisionTransformer

GRID, PATCH = (2, 3), 4


class Weighted(nn.Module):
    """Logit k is a weighted sum of the patches' mean values: the relevance of each patch is known exactly."""

    def __init__(self, weights_KP: torch.Tensor) -> None:
        super().__init__()
        self.weights_KP = weights_KP
        self.batches: list[int] = []
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        self.modes.append(self.training)
        patches = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), PATCH).flatten(1)
        return patches @ self.weights_KP.T


def images_of(values_BP: torch.Tensor) -> torch.Tensor:
    """Images (B, 2, 8, 12) whose patch p has the value [b, p]."""
    small = values_BP.view(-1, 1, *GRID).expand(-1, 2, -1, -1)
    return small.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def by_hand(model: Weighted, values: np.ndarray, order: list[int], target: int, steps: int, temperature: float):
    """Probability and hit at each step, one image at a time, in float64."""
    weights = model.weights_KP.double().numpy()
    probabilities, hits = [], []
    for step in range(steps + 1):
        gone = order[: round(step / steps * len(order))]
        left = np.array([0.0 if p in gone else values[p] for p in range(len(values))])
        logits = weights @ left
        powers = np.exp(logits / temperature - (logits / temperature).max())
        probabilities.append(powers[target] / powers.sum())
        hits.append(float(logits.argmax() == target))
    return np.array(probabilities), np.array(hits)


@pytest.fixture
def setting():
    generator = torch.Generator().manual_seed(3)
    model = Weighted(torch.randn(4, 6, generator=generator))
    values = torch.randn(5, 6, generator=generator) + 2
    maps = torch.rand(5, *GRID, generator=generator)
    return model, values, maps, torch.tensor([0, 3, 1, 2, 2])


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_curves_and_areas_are_those_of_the_definition(setting, batch_size):
    model, values, maps, target = setting
    found = perturb(model, images_of(values), maps, target, steps=6, temperature=1.7, batch_size=batch_size)
    fractions = np.linspace(0, 1, 7)
    assert found.fractions.numpy() == pytest.approx(fractions)
    for b in range(5):
        down = np.argsort(-maps[b].flatten().numpy()).tolist()
        most, most_hits = by_hand(model, values[b].double().numpy(), down, int(target[b]), 6, 1.7)
        least, least_hits = by_hand(model, values[b].double().numpy(), down[::-1], int(target[b]), 6, 1.7)
        assert found.most[b].numpy() == pytest.approx(most, abs=1e-5)
        assert found.least[b].numpy() == pytest.approx(least, abs=1e-5)
        assert found.most_hits[b].numpy().astype(float) == pytest.approx(most_hits)
        assert float(found.deletion[b]) == pytest.approx(np.trapezoid(most, fractions), abs=1e-5)
        # showing patches on a blank image, best first, is the other run read backwards
        shown = [by_hand(model, values[b].double().numpy(), down[n:], int(target[b]), 1, 1.7)[0][1] for n in range(7)]
        assert float(found.insertion[b]) == pytest.approx(np.trapezoid(shown, fractions), abs=1e-5)
        upto = fractions <= 0.9
        wanted = np.trapezoid(most_hits[upto], fractions[upto]) / fractions[upto][-1]
        assert float(found.positive[b]) == pytest.approx(wanted, abs=1e-6)
        wanted = np.trapezoid(least_hits[upto], fractions[upto]) / fractions[upto][-1]
        assert float(found.negative[b]) == pytest.approx(wanted, abs=1e-6)
    assert max(model.batches) <= batch_size


def test_pixels_that_fill_no_patch_change_nothing():
    """A model that leaves some out is perturbed like the same model on the image without them."""
    torch.manual_seed(0)
    options = dict(patch_size=4, num_classes=3, width=16, depth=2, heads=2)
    whole = VisionTransformer(image_size=(11, 14), crop_to_patches=True, **options).eval()
    cut = VisionTransformer(image_size=(8, 12), **options).eval()
    cut.load_state_dict(whole.state_dict())
    assert whole.covered == (8, 12)
    images, maps, target = torch.randn(3, 3, 11, 14), torch.rand(3, 2, 3), torch.tensor([0, 1, 2])
    found = perturb(whole, images, maps, target, steps=6)
    expected = perturb(cut, images[:, :, :8, :12], maps, target, steps=6)
    torch.testing.assert_close(found.most, expected.most)
    torch.testing.assert_close(found.least, expected.least)


def test_the_true_relevance_beats_noise_and_its_opposite_loses_to_it():
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(2, 6)
    weights[0] = torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1])
    model, values = Weighted(weights), torch.ones(64, 6)
    target = torch.zeros(64, dtype=torch.int64)
    truth = weights[0].view(1, *GRID).expand(64, -1, -1)
    right, wrong, noise = (
        perturb(model, images_of(values), maps, target)
        for maps in (truth, -truth, torch.rand(64, *GRID, generator=generator))
    )
    assert right.deletion.mean() < noise.deletion.mean() < wrong.deletion.mean()
    assert right.insertion.mean() > noise.insertion.mean() > wrong.insertion.mean()
    assert right.deletion[0] == pytest.approx(float(wrong.insertion[0]), abs=1e-6)


def test_ties_are_broken_at_random_and_the_same_way_for_one_seed(setting):
    model, values, _, _ = setting
    values, target = values[:1].expand(40, -1), torch.zeros(40, dtype=torch.int64)
    even = torch.full((40, *GRID), 1 / 6)
    first, again, other = (perturb(model, images_of(values), even, target, steps=6, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.most, again.most)
    assert not torch.equal(first.most, other.most)
    assert len({tuple(row.tolist()) for row in first.most}) > 20  # by place there would be one order


def test_the_model_runs_in_evaluation_mode_and_is_left_as_it_was(setting):
    model, values, maps, target = setting
    model.train()
    images = images_of(values).requires_grad_()
    found = perturb(model, images, maps, target)
    assert model.modes
    assert not any(model.modes)
    assert model.training
    assert not found.most.requires_grad


boxes = st.tuples(st.integers(0, 10), st.integers(0, 6), st.integers(1, 8), st.integers(1, 6)).map(
    lambda b: (b[0], b[1], min(b[0] + b[2], 12), min(b[1] + b[3], 8))
)


@settings(max_examples=60, deadline=None)
@given(box=boxes, seed=st.integers(0, 10_000))
def test_energy_and_pointing_are_what_counting_pixels_gives(box, seed):
    random = np.random.default_rng(seed)
    amounts = random.random(GRID).astype(np.float32)
    amounts /= amounts.sum()
    maps, where = torch.from_numpy(amounts)[None], torch.tensor([box], dtype=torch.float32)
    inside = np.zeros((8, 12), dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    pixels = amounts.repeat(PATCH, 0).repeat(PATCH, 1) / PATCH**2
    assert float(energy(maps, where, (8, 12))[0]) == pytest.approx(pixels[inside].sum(), abs=1e-5)
    assert float(covered(GRID, where, (8, 12)).mean()) == pytest.approx(inside.mean(), abs=1e-6)
    row, column = np.unravel_index(amounts.argmax(), GRID)
    x, y = (column + 0.5) * PATCH, (row + 0.5) * PATCH
    assert bool(pointing(maps, where, (8, 12))[0]) == (box[0] < x < box[2] and box[1] < y < box[3])
    own = np.zeros((8, 12), dtype=bool)
    own[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = True
    assert bool(pointing(maps, where, (8, 12), tolerance=0.5)[0]) == bool((own & inside).any())


def test_the_chance_of_pointing_is_what_random_maps_get():
    generator = torch.Generator().manual_seed(0)
    box = torch.tensor([[3.0, 1, 11, 7]]).expand(20_000, -1)
    hits = pointing(torch.rand(20_000, *GRID, generator=generator), box, (8, 12)).float().mean()
    chance = pointing_chance(GRID, box[:1], (8, 12))
    assert float(chance[0]) == pytest.approx(4 / 6)
    assert float(hits) == pytest.approx(4 / 6, abs=0.015)
    assert float(pointing_chance(GRID, box[:1], (8, 12), tolerance=0.5)[0]) == 1


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = VisionTransformer(image_size=16, patch_size=4, num_classes=5, size="nano", depth=3, pool="token")
        for parameter in model.parameters():  # as after training: nothing is at its start, or near 0
            parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
        return model.train()


def test_randomisation_goes_down_from_the_head_and_leaves_the_model_alone(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6) % 5
    found = randomisation(model, images, target, "relevance", seed=1)
    assert list(found) == ["head", "blocks.2", "blocks.1", "blocks.0", "patch_embed"]
    assert all(value.shape == (6,) and bool((value.abs() <= 1 + 1e-6).all()) for value in found.values())
    assert found["patch_embed"].abs().mean() < 0.6 < 1
    assert float(found["head"].max()) < 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    again = randomisation(model, images, target, "relevance", seed=1)
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_attention_alone_cannot_react_to_a_random_head(model):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = randomisation(model, images, torch.zeros(4, dtype=torch.int64), "rollout")
    assert found["head"].numpy() == pytest.approx(np.ones(4), abs=1e-5)
    assert float(found["blocks.2"].max()) < 1 - 1e-4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_rank_correlation_is_spearmans_with_ties(seed, levels):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, levels, 20).astype(np.float64), random.random(20)
    if len(set(a)) == 1:
        return
    found = rank_correlation(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    assert float(found[0]) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-6)


def test_a_constant_map_correlates_with_nothing():
    assert float(rank_correlation(torch.ones(1, 9), torch.arange(9.0)[None])[0]) == 0


def test_the_interval_holds_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    ends = [interval(random.normal(1, 2, 60), samples=400, seed=k) for k in range(300)]
    share = np.mean([low <= 1 <= high for low, high in ends])
    assert 0.90 <= share <= 0.98
    assert interval(np.full(9, 0.25)) == (0.25, 0.25)
    low, high = interval(random.normal(0, 1, 4000))
    assert high - low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.1)
