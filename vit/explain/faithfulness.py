"""How far to believe a map: measures that a map can fail, each with what a random map gets.

Notable:
- `perturb` removes patches in the map's order, most relevant first and least relevant first.  Showing the best patches
  on a blank image is removing the worst, so these two runs give deletion and insertion (Petsiuk et al. 2018, "RISE")
  and positive and negative perturbation (Chefer et al., CVPR 2021) together.
- A removed patch becomes the mean colour, 0 after normalisation: an image the model has not been trained on, so
  figures compare methods on one model, not models.
- Ties in a map are broken at random, not by place: a constant map is a random one.
- `pointing` and `energy` need boxes (`data=shapes` has them), `randomisation` a model to take apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.explain.methods import explain
from vit.explain.record import find
from vit.model import VisionTransformer


@dataclass(frozen=True)
class Perturbation:
    """What became of the target class as patches were removed.

    Attributes:
        fractions: (S,), the fraction of patches removed, from 0 to 1.
        most, least: probability of the target (B, S), the most or the least relevant patches removed first.
        most_hits, least_hits: whether the target was still the predicted class (B, S).
    """

    fractions: Tensor
    most: Tensor
    least: Tensor
    most_hits: Tensor
    least_hits: Tensor

    @property
    def deletion(self) -> Tensor:
        """Area under the probability as the most relevant patches go: (B,), in [0, 1]; lower is better."""
        return torch.trapezoid(self.most, self.fractions, dim=1)

    @property
    def insertion(self) -> Tensor:
        """Area under the probability as patches are shown on a blank image, the most relevant first: (B,); higher is
        better."""
        return torch.trapezoid(self.least, self.fractions, dim=1)

    @property
    def positive(self) -> Tensor:
        """Share of steps up to 90% removed, most relevant first, at which the prediction holds: (B,); lower is
        better."""
        return self._accuracy(self.most_hits)

    @property
    def negative(self) -> Tensor:
        """The same, least relevant first: (B,); higher is better."""
        return self._accuracy(self.least_hits)

    def _accuracy(self, hits: Tensor) -> Tensor:
        upto = self.fractions <= 0.9 + 1e-6
        return torch.trapezoid(hits[:, upto].float(), self.fractions[upto], dim=1) / self.fractions[upto][-1]


@torch.no_grad()
def perturb(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int = 10,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
) -> Perturbation:
    """Remove patches in the order of `maps` (B, rows, columns) from normalised `images` (B, C, height, width).

    Args:
        target: int64 (B,), the class to watch.
        steps: how many steps from all patches to none.
        temperature: probabilities are softmax(logits / temperature).
        batch_size: images at a time.
        seed: of the order of patches that a map does not tell apart.
    """
    B, P = len(images), maps[0].numel()
    order_BP = _ranked(maps.flatten(1), seed)
    fractions = torch.linspace(0, 1, steps + 1, device=images.device)
    counts = (fractions * P).round().long()
    index_BP = order_BP.argsort(dim=1)  # of each patch in the order: 0 is the most relevant
    found = []
    for rank_BP in (index_BP, P - 1 - index_BP):
        keep_SBP = rank_BP[None] >= counts[:, None, None]
        found.append(_scores(model, images, keep_SBP.flatten(0, 1), maps.shape[1:], target, temperature, batch_size))
    (most, most_hits), (least, least_hits) = ((p.view(steps + 1, B).T, hits.view(steps + 1, B).T) for p, hits in found)
    return Perturbation(fractions, most, least, most_hits, least_hits)


def _ranked(maps_BP: Tensor, seed: int) -> Tensor:
    """Rank patches from the most to the least relevant: int64 (B, P)."""
    B, P = maps_BP.shape
    shuffled = torch.rand(B, P, generator=torch.Generator().manual_seed(seed)).argsort(dim=1).to(maps_BP.device)
    within = maps_BP.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, within)


def _scores(
    model: nn.Module,
    images: Tensor,
    keep_MP: Tensor,
    grid: torch.Size,
    target: Tensor,
    temperature: float,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute probability of the target and whether it is predicted, for M = S B maskings of B images: (M,) each."""
    B, height, width = len(images), *images.shape[2:]
    patch = next(
        (module.patch_size for module in model.modules() if isinstance(module, VisionTransformer)),
        (height // grid[0], width // grid[1]),
    )
    training = [module for module in model.modules() if module.training]
    model.eval()
    probabilities, hits = [], []
    try:
        for start in range(0, len(keep_MP), batch_size):
            which = torch.arange(start, min(start + batch_size, len(keep_MP)), device=images.device) % B
            mask = keep_MP[start : start + batch_size].unflatten(1, tuple(grid))[:, None].to(images.dtype)
            mask = mask.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
            mask = F.pad(mask, (0, width - mask.shape[3], 0, height - mask.shape[2]))  # what no patch covers
            logits = model(images[which] * mask).float()
            own = target[which]
            probabilities.append((logits / temperature).softmax(dim=1).gather(1, own[:, None])[:, 0])
            hits.append(logits.argmax(dim=1) == own)
    finally:
        for module in training:
            module.training = True
    return torch.cat(probabilities), torch.cat(hits)


# against boxes


def pointing(maps: Tensor, boxes: Tensor, image_size: tuple[int, int], tolerance: float = 0.0) -> Tensor:
    """Play the pointing game (Zhang et al. 2016): whether the map's largest patch has its centre in the box, bool (B,).

    Takes maps (B, rows, columns) and boxes (B, 4), x0 y0 x1 y1 in pixels of an image of (height, width).
    `tolerance`, in patches, widens the box on every side, as the game's 15 pixels do: with 0.5 every patch that the
    box reaches into is right, and a map of patches tells no place more exactly than that.
    """
    best = maps.flatten(1).argmax(dim=1)
    return _right(maps.shape[1:], boxes, image_size, tolerance).gather(1, best[:, None])[:, 0]


def pointing_chance(
    grid: tuple[int, int], boxes: Tensor, image_size: tuple[int, int], tolerance: float = 0.0
) -> Tensor:
    """Return what a random map gets in the pointing game: the fraction of patches that would be right, (B,)."""
    return _right(torch.Size(grid), boxes, image_size, tolerance).float().mean(dim=1)


def energy(maps: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Compute the fraction of the map's mass inside the box, (B,); a patch counts by the part of it that the box covers
    (Wang et al. 2020, "Score-CAM")."""
    return (maps.flatten(1) * covered(maps.shape[1:], boxes, image_size)).sum(dim=1)


def covered(grid: torch.Size | tuple[int, int], boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Compute the part of each patch in the box: (B, P), in [0, 1].  Its mean is the `energy` of an even map."""
    sides = []
    for count, extent, low, high in zip(grid, image_size, (1, 0), (3, 2), strict=True):
        edges = torch.arange(count + 1, device=boxes.device) * (extent / count)
        inside = torch.minimum(edges[1:], boxes[:, high, None]) - torch.maximum(edges[:-1], boxes[:, low, None])
        sides.append(inside.clamp(min=0) * (count / extent))
    return (sides[0][:, :, None] * sides[1][:, None]).flatten(1)


def _right(grid: torch.Size, boxes: Tensor, image_size: tuple[int, int], tolerance: float) -> Tensor:
    sides = []
    for count, extent, low, high in zip(grid, image_size, (1, 0), (3, 2), strict=True):
        patch = extent / count
        centres = (torch.arange(count, device=boxes.device) + 0.5) * patch
        margin = tolerance * patch
        sides.append((centres > boxes[:, low, None] - margin) & (centres < boxes[:, high, None] + margin))
    return (sides[0][:, :, None] & sides[1][:, None]).flatten(1)


# against the model


def randomisation(model: nn.Module, images: Tensor, target: Tensor, method: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Run the sanity check of Adebayo et al. 2018: parts of the model are started anew, from the head downwards.

    Returns, by the lowest part that is random ("head", "blocks.5", ..., "patch_embed"), the rank correlation of each
    image's map with its map from the whole model, (B,).  A map that explains the model loses it.  Class-agnostic
    methods read attention alone, so they cannot react to a random head.
    """
    intact = explain(model, images, method, target=target, seed=seed).flatten(1)
    found = {}
    for name, broken in _cascade(find(model), seed):
        found[name] = rank_correlation(intact, explain(broken, images, method, target=target, seed=seed).flatten(1))
    return found


def _cascade(model: VisionTransformer, seed: int) -> Iterator[tuple[str, VisionTransformer]]:
    broken = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = VisionTransformer(**model.architecture).state_dict()
    parts = ["head", *(f"blocks.{layer}" for layer in reversed(range(len(model.blocks)))), "patch_embed"]
    if model.attn_pool is not None:
        parts.insert(1, "attn_pool")
    for part in parts:
        new = {key: value for key, value in fresh.items() if key.startswith(part + ".")}
        broken.load_state_dict(new, strict=False)
        yield part, broken


def rank_correlation(a_BP: Tensor, b_BP: Tensor) -> Tensor:
    """Compute Spearman's correlation of each row of `a` with that of `b`, (B,); equal values share their mean rank."""
    a, b = (_ranks(each) for each in (a_BP, b_BP))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def _ranks(x_BP: Tensor) -> Tensor:
    less = (x_BP[:, :, None] > x_BP[:, None]).sum(dim=2)
    same = (x_BP[:, :, None] == x_BP[:, None]).sum(dim=2)
    return less + (same - 1) / 2


# intervals


def interval(values: np.ndarray, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Compute the bootstrap interval of the mean of `values` (n,) by percentiles (Efron 1979): both its ends."""
    values = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    low, high = np.quantile(values[picked].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
