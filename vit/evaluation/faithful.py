"""Measure the faithfulness of attention maps: `python eval.py checkpoint=MODEL faithfulness=true`.

Notes:
- every measure is compared with random maps on the same images; a method is better only if the bootstrap interval of
  its difference from random, image by image, does not contain 0;
- the explained class is the predicted one when patches are removed, and the object's class for a data set with boxes of
  its objects (`data=shapes`).

`vit.explain.faithfulness` defines the measures.  Imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit.data.dataset import Split
from vit.data.parallel import progress
from vit.data.preprocess import Preprocessing
from vit.evaluation.table import LOWER_IS_BETTER
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
from vit.explain.methods import METHODS, trace
from vit.map_methods import BY_CLASS

_BATCH = 32
_RANDOMISED = 64  # images of the randomisation check
_REACH = 0.5  # distance in patches from the box within which "pointing" counts a hit: patches that the box touches


def measure_faithfulness(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    *,
    images: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every method of `METHODS` on images of `split`.

    Args:
        model: a `VisionTransformer`.
        split: the images.
        preprocessing: the preprocessing of the model.
        images: largest number of images, evenly spread over the split.
        temperature: probabilities are softmax(logits / temperature).
        seed: seed of random maps, ties and the bootstrap.

    Returns:
        {"images": n, "methods": {method: {measure: {"mean", "low", "high", "better"}}}, "chance": {measure: mean}}.
        "low" and "high" are a 95% bootstrap interval; "better" says whether the method beats random maps beyond the
        interval of the difference; None for "random" itself and without a value of random maps.
    """
    chosen = np.unique(np.linspace(0, len(split) - 1, min(images, len(split))).round().astype(np.int64))
    device = next(model.parameters()).device
    boxed = (
        split.boxes is not None and split.native_size is not None and preprocessing.leaves_unchanged(split.native_size)
    )
    found: dict[str, dict[str, list[np.ndarray]]] = {method: {} for method in METHODS}
    chance: dict[str, list[np.ndarray]] = {}
    with progress("Measuring faithfulness", len(chosen)) as advance:
        for start in range(0, len(chosen), _BATCH):
            rows = chosen[start : start + _BATCH]
            pixels = np.stack([split.resized(int(i), preprocessing) for i in rows])
            batch = torch.from_numpy(preprocessing.normalise(pixels)).to(device)
            traced = trace(model, batch)
            for method, maps_of in METHODS.items():
                maps = maps_of(traced, seed=seed + start)
                done = perturb(
                    model, batch, maps, traced.target, temperature=temperature, batch_size=4 * _BATCH, seed=seed + start
                )
                for name in ("deletion", "insertion", "positive", "negative"):
                    _note(found[method], name, getattr(done, name))
            if boxed:
                _measure_boxes(model, batch, split.subset(rows), preprocessing.image_size, found, chance, seed + start)
            advance(len(rows))
    _measure_randomisation(model, split, preprocessing, chosen[:_RANDOMISED], found, device, seed)
    values = {method: {name: np.concatenate(parts) for name, parts in each.items()} for method, each in found.items()}
    methods = {
        method: {name: _summarise(values, method, name, seed) for name in each} for method, each in values.items()
    }
    return {
        "images": len(chosen),
        "methods": methods,
        "chance": {name: float(np.concatenate(parts).mean()) for name, parts in chance.items()},
    }


def _measure_boxes(
    model: nn.Module,
    images: Tensor,
    split: Split,
    size: tuple[int, int],
    found: Mapping[str, dict[str, list[np.ndarray]]],
    chance: dict[str, list[np.ndarray]],
    seed: int,
) -> None:
    """Measure the pointing game and energy on the object that gives the image its class, or on both of two."""
    assert split.boxes is not None
    assert split.object_labels is not None
    boxes = torch.from_numpy(split.boxes).to(images.device)
    labels = torch.from_numpy(split.object_labels).to(images.device)
    objects = int((labels >= 0).all(dim=0).sum())  # class objects come first
    traces = [trace(model, images, labels[:, m]) for m in range(objects)]
    for method, maps_of in METHODS.items():
        maps = [maps_of(t, seed=seed) for t in traces]
        _note(found[method], "pointing", pointing(maps[0], boxes[:, 0], size, _REACH))
        _note(found[method], "pointing_centre", pointing(maps[0], boxes[:, 0], size))
        _note(found[method], "energy", energy(maps[0], boxes[:, 0], size))
        if objects == 2:
            both = torch.stack([pointing(each, boxes[:, m], size, _REACH) for m, each in enumerate(maps)])
            _note(found[method], "pointing_each", both.float().mean(dim=0))
            if method in BY_CLASS:
                _note(found[method], "agreement", rank_correlation(maps[0].flatten(1), maps[1].flatten(1)))
    grid = traces[0].grid
    _note(chance, "pointing", pointing_chance(grid, boxes[:, 0], size, _REACH))
    _note(chance, "pointing_centre", pointing_chance(grid, boxes[:, 0], size))
    _note(chance, "energy", covered(grid, boxes[:, 0], size).mean(dim=1))


def _measure_randomisation(
    model: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    rows: np.ndarray,
    found: Mapping[str, dict[str, list[np.ndarray]]],
    device: torch.device,
    seed: int,
) -> None:
    pixels = np.stack([split.resized(int(i), preprocessing) for i in rows])
    images = torch.from_numpy(preprocessing.normalise(pixels)).to(device)
    target = trace(model, images, methods=()).target
    for method in METHODS:
        if method != "random":  # which depends on no model
            parts = list(randomisation(model, images, target, method, seed=seed).values())
            _note(found[method], "random_head", parts[0])
            _note(found[method], "random_model", parts[-1])


def _note(into: dict[str, list[np.ndarray]], name: str, values: Tensor) -> None:
    into.setdefault(name, []).append(values.detach().cpu().double().numpy())


def _summarise(values: Mapping[str, Mapping[str, np.ndarray]], method: str, name: str, seed: int) -> dict[str, Any]:
    method_values = values[method][name]
    low, high = interval(method_values, seed=seed)
    row = {"mean": float(method_values.mean()), "low": low, "high": high, "better": None}
    random = values["random"].get(name)
    if method != "random" and random is not None:
        difference = interval(random - method_values if name in LOWER_IS_BETTER else method_values - random, seed=seed)
        row["better"] = difference[0] > 0
    return row
